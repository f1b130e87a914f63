"""What libsndfile does not say of a file of sound: that its end is missing, or that it holds two.

libsndfile reads a WAV, OGG or MP3 that is cut off as a shorter sound, and of an MP3 or OGG no more
than its first header tells. A model would then answer for a part of what the row has.
"""

import re
from dataclasses import dataclass

from beam_gemma.errors import RecordError
from beam_gemma.inputs.ogg_checks import check_ogg

KINDS = ("WAV", "FLAC", "OGG", "MP3")
"""Kinds of files that are opened; libsndfile sees the bytes of no other."""
MAX_CHUNKS = 1_000
"""Most chunks of a WAV before its samples."""
_PIPED = 0x7FFF_0000
"""Sizes from here on stand in a WAV that was written to a pipe, whose writer did not know them."""
_MOST_OFF = 10
"""Frames of an MP3 that its header may leave out: those of its own and of the encoder's delay."""
MAX_FRAMES = 160_000
"""Most frames of an MP3 that are looked at: an hour and more, as each has at least 24 ms."""
_BIT_RATES = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Thousand bits a second of layer III, by the version in a frame: MPEG 1, and MPEG 2 and 2.5."""
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""Samples of a second, by the version: MPEG 1, 2 and 2.5."""
_LENGTH_TAG = re.compile(rb"Xing|Info|VBRI")
"""What the first frame of an MP3 has that tells how many frames follow."""
_FOREIGN = {
    rb".{4}ftyp": "MP4, as M4A files are",
    rb"\xff[\xf0-\xf1\xf8-\xf9]": "AAC",
    rb"FORM.{4}AIF": "AIFF",
    rb"\x1a\x45\xdf\xa3": "WebM or Matroska",
    rb"#!AMR": "AMR",
    rb"\x30\x26\xb2\x75": "WMA or ASF",
    rb"\.snd": "AU",
    rb"caff": "CAF",
    rb"RF64|BW64|RIFX|riff": "a WAV of another form, with sizes of 64 bits or the other byte order",
    rb"MThd": "MIDI, which holds notes and no sound",
    rb"\s*<(!doctype )?html": "a page of HTML",
    rb"version https://git-lfs": "a pointer of Git LFS, without the file",
}
"""What a file may be that is not opened, by how it begins."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What the bytes of a file say before it is opened."""

    kind: str
    """One of `KINDS`."""
    start: int = 0
    """Where the sound begins, behind ID3 tags."""
    end: int | None = None
    """Where an MP3 ends, before the tags at its end; None for the end of the file."""
    least_samples: int = 0
    """Fewest samples of each channel that an MP3 decodes to if it is whole."""
    tells_length: bool = True
    """False for an MP3 without a header of its own, whose length libsndfile estimates."""


def check_file(data: bytes, name: str) -> Checked:
    """Return what kind of sound a file is.

    Args:
        data: The bytes of the file.
        name: What errors call the sound.

    Raises:
        RecordError: it is none of `KINDS`, ends early, or holds several sounds.
    """
    if not data:
        raise RecordError(f"{name}: expected the file of a sound, got zero bytes")
    start = _behind_tags(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        _check_wav(data, name)
        return Checked("WAV")
    if data.startswith(b"OggS"):
        check_ogg(data, name)
        return Checked("OGG")
    if data.startswith(b"fLaC", start):
        return Checked("FLAC", start)
    if _Frame.at(data, start) is not None:
        return _checked_mp3(data, start, name)
    raise RecordError(
        f"{name}: expected a sound in one of {', '.join(KINDS)}, got {_described(data)}; convert "
        "it to one of these"
    )


def _behind_tags(data: bytes) -> int:
    """Return where a file begins behind its ID3 tags, of which it may have several."""
    start = 0
    while data.startswith(b"ID3", start) and start + 10 <= len(data):
        # The size has seven bits in each byte; a flag says that the header stands at the end again.
        size = sum(
            (byte & 127) << shift
            for byte, shift in zip(data[start + 6 : start + 10], (21, 14, 7, 0), strict=True)
        )
        start += 10 + size + (10 if data[start + 5] & 16 else 0)
    return start


def _check_wav(data: bytes, name: str) -> None:
    at = 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return  # libsndfile says what is missing
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            if len(data) - at - 8 < size < _PIPED:
                raise _cut_off(name, f"{size:,} bytes of samples", f"{len(data) - at - 8:,}")
            return
        at += 8 + size + size % 2
    raise RecordError(
        f"{name}: expected at most {MAX_CHUNKS:,} chunks before the samples of a WAV, got more; "
        "write it anew"
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame of an MP3, by its header of four bytes."""

    num_bytes: int
    """Bytes of the frame with its header; 0 if its bit rate is free, so that nothing tells them."""
    num_samples: int

    @classmethod
    def at(cls, data: bytes, at: int) -> "_Frame | None":
        """Return the frame at a position; None if none of layer III begins there."""
        head = int.from_bytes(data[at : at + 4]) if at + 4 <= len(data) else 0
        version, layer, index, rate = (
            head >> 19 & 3,
            head >> 17 & 3,
            head >> 12 & 15,
            head >> 10 & 3,
        )
        if head >> 21 != 0x7FF or version == 1 or layer != 1 or index == 15 or rate == 3:
            return None
        num_samples = 1152 if version == 3 else 576
        bits = _BIT_RATES[3 if version == 3 else 2][index] * 1000
        num_bytes = num_samples // 8 * bits // _RATES[version][rate] + (head >> 9 & 1)
        return cls(num_bytes if bits else 0, num_samples)


def _checked_mp3(data: bytes, start: int, name: str) -> Checked:
    at, number, num_samples = start, 0, 0
    while (frame := _Frame.at(data, at)) and frame.num_bytes and number < MAX_FRAMES:
        if at + frame.num_bytes > len(data):
            raise _cut_off(
                name, f"a last frame of {frame.num_bytes:,} bytes", f"{len(data) - at:,}"
            )
        at += frame.num_bytes
        number += 1
        num_samples += frame.num_samples
    least = num_samples * max(0, number - _MOST_OFF) // max(1, number)
    tells_length = _LENGTH_TAG.search(data, start, start + 200) is not None
    end = at if not data[_behind_end_tags(data, at) :].strip(b"\0") else None
    return Checked("MP3", start, end, least, tells_length)


def _behind_end_tags(data: bytes, at: int) -> int:
    """Return where an MP3 goes on behind tags of APE and ID3v1, which decoders take for damage."""
    while at < len(data):
        if data.startswith(b"APETAGEX", at):
            at += 32 + int.from_bytes(data[at + 12 : at + 16], "little")
        elif data.startswith(b"TAG", at):
            at += 128
        else:
            break
    return at


def _cut_off(name: str, expected: str, got: str) -> RecordError:
    return RecordError(
        f"{name}: expected {expected}, got {got}, as the file is cut off; copy it once more"
    )


def _described(data: bytes) -> str:
    """Return what bytes are that are no sound which is opened."""
    for beginning, what in _FOREIGN.items():
        if re.match(beginning, data[:1000], re.DOTALL | re.IGNORECASE):
            return what
    # Of what else a path may lead to, as a file with a password, an error shows nothing.
    return f"{len(data):,} bytes that are none, or are damaged at the start"
