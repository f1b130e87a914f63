"""Files of sound to samples: which kinds are read, within which bounds, and how.

libsndfile decodes them, as in `load_audio` of transformers 5.23 with the backend `soundfile`.
Channels become one by their mean, and soxr resamples it, with the same values as there.
`sound_checks.py` looks at a file first: libsndfile takes an end that is missing for the end of the
sound, and reads the first only of several sounds in one file.

Dimensions: N samples.
"""

import io
import math
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32

from beam_gemma.errors import RecordError, one_line
from beam_gemma.inputs.sound_checks import Checked, check_file

SUBTYPES = {
    "WAV": ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"),
    "FLAC": ("PCM_S8", "PCM_16", "PCM_24"),
    "OGG": ("VORBIS", "OPUS"),
    "MP3": ("MPEG_LAYER_III",),
}
"""Forms of samples that are decoded in each kind of file, by libsndfile's names."""
MAX_SECS = 3600
"""Longest sound that is read at all, in seconds, in how many clips ever."""
MIN_RATE, MAX_RATE = 4_000, 192_000
"""Samples of a second that a file may have."""
MAX_CHANNELS = 8
MAX_PARTS = 10_000
"""Most reads of a header; libsndfile asks for each of its parts, and a part may have 8 bytes."""
MAX_VALUE = 1e6
"""Largest sample; 1 is full volume, and files of fractions may have more."""
BLOCK = 1 << 16
"""Samples of each channel that are decoded at once."""
_UNKNOWN = 1 << 62
"""libsndfile's number of samples is larger where a FLAC does not say it."""


@dataclass(frozen=True, slots=True)
class SoundHeader:
    """Kind and length of a sound, from the header of its file, or counted where that is unsure."""

    kind: str
    """`WAV`, `FLAC`, `OGG` (Vorbis or Opus) or `MP3`."""
    sampling_rate: int
    """Samples of a second."""
    num_channels: int
    num_samples: int
    """Samples of each channel: exactly those that decoding gives."""

    def num_samples_at(self, sampling_rate: int) -> int:
        """Return how many samples the sound has once it is resampled; a part of one is one."""
        return -(-self.num_samples * sampling_rate // self.sampling_rate)


def read_sound_header(
    data: bytes, *, max_secs: Fraction | int = MAX_SECS, name: str = "sound"
) -> SoundHeader:
    """Return the header of a file of sound.

    Nothing of a WAV, OGG or most FLAC files is decoded. The header of an MP3 tells its length only
    roughly, and that of a FLAC written to a pipe not at all, so such files are decoded in blocks to
    count their samples. `decode` gives the same number, or an error.

    Args:
        data: The bytes of the file.
        max_secs: Longest sound that is taken, in seconds.
        name: What errors call the sound.

    Raises:
        RecordError: the file is no sound of the kinds in `SUBTYPES`, is damaged, has no samples, is
            too long, or has a rate or number of channels that is out of bounds.

    Example:
        >>> read_sound_header(Path("call.flac").read_bytes())
        SoundHeader(kind='FLAC', sampling_rate=44100, num_channels=2, num_samples=132300)
    """
    with _opened(data, name, max_secs) as sound:
        number = sound.num_samples
        if number is None:
            number = sum(map(len, sound.blocks()))
        if not number:
            raise RecordError(f"{name}: expected a sound, got a file with zero samples")
        return SoundHeader(sound.kind, sound.rate, sound.num_channels, number)


def decode(
    data: bytes,
    sampling_rate: int,
    *,
    max_secs: Fraction | int = MAX_SECS,
    name: str = "sound",
) -> Float32[np.ndarray, " N"]:
    """Return the samples of a file, the mean of its channels, at a rate; see `read_sound_header`.

    The values are those of `load_audio` of transformers, whose resampler is soxr's HQ: from -1 to 1
    at full volume. At most one block is decoded before it is resampled, so the memory that is taken
    is that of the result.

    Args:
        data: The bytes of the file.
        sampling_rate: Samples of a second of the result.
        max_secs: Longest sound that is taken, in seconds.
        name: What errors call the sound.

    Raises:
        RecordError: the same as `read_sound_header`, or the file is damaged behind its header.
    """
    with _opened(data, name, max_secs) as sound:
        number, parts = 0, []
        change = None
        if sound.rate != sampling_rate:
            change = soxr.ResampleStream(sound.rate, sampling_rate, 1, "float32", "HQ")
        for block in sound.blocks():
            number += len(block)
            parts.append(block if change is None else change.resample_chunk(block))
        if change is not None:
            parts.append(change.resample_chunk(np.empty(0, np.float32), last=True))
        if not number:
            raise RecordError(f"{name}: expected a sound, got a file with zero samples")
        header = SoundHeader(sound.kind, sound.rate, sound.num_channels, number)
        samples = np.zeros(header.num_samples_at(sampling_rate), np.float32)
        # soxr rounds the length; as in `load_audio`, zeros make up for a part of a sample.
        found = np.concatenate(parts)[: len(samples)]
        samples[: len(found)] = found
        return samples


def file_of_array(array: Any, sampling_rate: Any, name: str = "sound") -> bytes:
    """Return samples as the bytes of a WAV file of fractions, which keeps each in float32.

    Args:
        array: Samples from -1 to 1 [N], or [C, N] of several channels, as `datasets` has them; an
            array, or lists.
        sampling_rate: Samples of a second.
        name: What errors call the sound.

    Raises:
        RecordError: the values are no samples, or their rate is no whole number within bounds.
    """
    rate = sampling_rate
    is_number = isinstance(rate, int | float | np.number) and not isinstance(rate, bool)
    if not is_number or not float(rate).is_integer():
        raise RecordError(f"{name}: expected a whole sampling_rate, got {rate!r}"[:300])
    _check_form(int(rate), 1, name)
    values = _values(array, name)
    channels = 1 if values.ndim == 1 else len(values)
    _check_form(int(rate), channels, name)
    with np.errstate(over="ignore"):  # decoding refuses the infinite sample that it leaves
        body = np.ascontiguousarray(values.T, "<f4").tobytes()
    about = struct.pack(
        "<HHIIHH", 3, channels, int(rate), int(rate) * channels * 4, channels * 4, 32
    )
    parts = b"WAVEfmt " + struct.pack("<I", len(about)) + about + b"data"
    sizes = struct.pack("<I", len(parts) + 4 + len(body)), struct.pack("<I", len(body))
    return b"RIFF" + sizes[0] + parts + sizes[1] + body


def _values(array: Any, name: str) -> np.ndarray:
    expected = f"{name}: expected an array of samples from -1 to 1"
    try:
        values = np.asarray(array)
    except ValueError as error:  # of lists of several lengths
        raise RecordError(f"{expected}, got lists of several lengths") from error
    if values.dtype.kind not in "fiu" or values.ndim not in (1, 2):
        raise RecordError(f"{expected}, got {values.dtype} in {values.ndim} dimensions")
    if values.dtype.kind != "f" and np.abs(values).max(initial=0) > 1:
        raise RecordError(
            f"{expected}, got whole numbers, whose full volume is unknown; divide by it"
        )
    return values


class _Sound:
    """A file of sound that is open."""

    def __init__(
        self,
        opened: soundfile.SoundFile,
        checked: Checked,
        max_secs: Fraction | int,
        name: str,
    ) -> None:
        self.kind = checked.kind
        self.rate: int = opened.samplerate
        self.num_channels: int = opened.channels
        self._opened, self._checked, self._name = opened, checked, name
        self._max_secs = max_secs
        self._limit = math.floor(max_secs * self.rate)
        _check_form(self.rate, self.num_channels, name)
        if self.num_samples is not None and self.num_samples > self._limit:
            raise self._too_long(f"{self.num_samples / self.rate:,.3f} s")

    @property
    def num_samples(self) -> int | None:
        """Samples of each channel, of which `blocks` gives no more and no less; None if unsure."""
        is_sure = self.kind != "MP3" and self._opened.frames < _UNKNOWN
        return self._opened.frames if is_sure else None

    def blocks(self) -> Iterator[Float32[np.ndarray, " N"]]:
        """Yield the mean of the channels, block by block.

        Raises:
            RecordError: the file is damaged or too long.
        """
        number = 0
        # Behind the samples of a FLAC there may be a tag, which would be an error to the decoder.
        most = self._limit + 1 if self.num_samples is None else self.num_samples
        buffer = np.empty((BLOCK, self.num_channels), np.float32)
        while number < most:
            block = self._opened.read(out=buffer[: most - number])
            if not len(block):
                break
            number += len(block)
            if number > self._limit:
                raise self._too_long("more")
            # The sum has the order that numpy gives it for a whole file in `load_audio`.
            with np.errstate(invalid="ignore", over="ignore"):
                mono = block.T.mean(axis=0) if self.num_channels > 1 else block[:, 0].copy()
            if not (np.abs(mono) <= MAX_VALUE).all():
                raise RecordError(
                    f"{self._name}: expected samples from -1 to 1, got one that is no number, or "
                    f"is larger than {MAX_VALUE:,.0f}; write the file anew"
                )
            yield mono
        self._check_number(number)

    def _check_number(self, number: int) -> None:
        """Refuse a file that gives fewer samples than it tells of."""
        least = self._opened.frames if self._checked.tells_length else 0
        least = max(least if least < _UNKNOWN else 0, self._checked.least_samples)
        if number < least:
            raise RecordError(
                f"{self._name}: expected {least:,} samples or more, as the file tells, got "
                f"{number:,}, as it is damaged, cut off, or two files in one; write it anew"
            )

    def _too_long(self, got: str) -> RecordError:
        return RecordError(
            f"{self._name}: expected a sound of at most {float(self._max_secs):g} s, got {got}; "
            "cut it into parts"
        )


class _Stream(soundfile.SoundFile):  # type: ignore[misc]  # no stubs
    """A file that is read from its start to its end; soundfile would seek after each block."""

    def seekable(self) -> bool:
        """Return False."""
        return False


class _Content(io.BytesIO):
    """The bytes of a file, with a limited number of reads of its header.

    libsndfile calls its methods through C, where an exception could only be printed. So none raises
    one: a read too many returns nothing, and a place that is no place is the nearest one.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.num_left = MAX_PARTS
        self._size = len(data)  # `getbuffer` would copy the bytes

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer with the next bytes, and return how many there are."""
        self.num_left -= 1
        return super().readinto(buffer) if self.num_left >= 0 else 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a place within the file, or to its end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}.get(whence, 0)
        return super().seek(min(max(base + offset, 0), self._size))


@contextmanager
def _opened(data: bytes, name: str, max_secs: Fraction | int) -> Iterator[_Sound]:
    """Context manager of an open file; whatever a decoder raises in it is an error of the row."""
    checked = check_file(data, name)
    content = _Content(data[checked.start : checked.end])
    try:
        with _Stream(content) as opened:
            _check_kind(opened, checked.kind, name)
            content.num_left = sys.maxsize
            yield _Sound(opened, checked, max_secs, name)
    except RecordError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        if content.num_left < 0:
            got = f"one whose header has more than {MAX_PARTS:,} parts"
        elif isinstance(error, soundfile.LibsndfileError):
            got = f"a damaged file: {error.error_string}"
        else:
            got = f"a damaged file: {one_line(error)}"
        raise RecordError(
            f"{name}: expected a sound that can be decoded, got {got[:300]}"
        ) from error


def _check_kind(opened: soundfile.SoundFile, kind: str, name: str) -> None:
    found = "WAV" if opened.format == "WAVEX" else opened.format
    if found != kind or opened.subtype not in SUBTYPES[kind]:
        raise RecordError(
            f"{name}: expected a {kind} with samples in one of {', '.join(SUBTYPES[kind])}, got "
            f"{opened.subtype} in {opened.format}; convert it to one of these"
        )


def _check_form(rate: int, num_channels: int, name: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise RecordError(
            f"{name}: expected a sampling rate from {MIN_RATE:,} to {MAX_RATE:,}, got {rate:,}; "
            "resample it"
        )
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise RecordError(
            f"{name}: expected 1 to {MAX_CHANNELS} channels, got {num_channels:,}; mix them"
        )
