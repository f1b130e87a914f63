"""Sounds to the frames that a model's tower takes, as transformers' feature extractors make them.

Gemma 3n has `Gemma3nAudioFeatureExtractor`, Gemma 4 `Gemma4AudioFeatureExtractor` and, without a
tower, `Gemma4UnifiedAudioFeatureExtractor` (transformers 5.23); files are read as its `load_audio`
does. In one point this module does otherwise: those cut a sound behind 30 seconds without a word.

Dimensions: N samples, F frames, M mel bins, or samples, of a frame.
"""

from fractions import Fraction
from itertools import pairwise

import numpy as np
from jaxtyping import Float32

from beam_gemma.errors import RecordError
from beam_gemma.inputs.mel import MelFrames
from beam_gemma.inputs.sound_file import MAX_SECS, SoundHeader, decode, read_sound_header
from beam_gemma.model.sound_config import SoundConfig


class SoundProcessor:
    """Makes what a model takes of the files of sounds; for any number of threads.

    A sound is one clip of at most `SoundConfig.max_samples`, 30 seconds in all models so far. With
    `split`, a longer one becomes as few consecutive clips as hold all of it, which are equally long
    up to one sample: 31 s are two clips of 15.5 s. So no sample is lost or doubled, and no clip is
    shorter than half of the longest one, with a rest that has no token.

    Args:
        config: The sound half of a model.
        split: Whether to cut longer sounds, up to `MAX_SECS`; otherwise they are errors.

    Example:
        >>> processor = SoundProcessor(artifact.sound, split=True)
        >>> header = processor.read_header(data)
        >>> header
        SoundHeader(kind='MP3', sampling_rate=44100, num_channels=2, num_samples=1367100)
        >>> processor.num_clips(header), processor.num_tokens(header)
        (2, (388, 388))
        >>> [frames.shape for frames in processor.frames(data)]
        [(1549, 128), (1549, 128)]
    """

    def __init__(self, config: SoundConfig, *, split: bool = False) -> None:
        self._config = config
        self._mel = None if config.mel is None else MelFrames(config)
        clip_secs = Fraction(config.max_samples, config.sampling_rate)
        self._max_secs = max(clip_secs, Fraction(MAX_SECS)) if split else clip_secs

    def read_header(self, data: bytes, name: str = "sound") -> SoundHeader:
        """Return the header of a sound that is not too long; see `read_sound_header`.

        Args:
            data: The bytes of its file.
            name: What errors call the sound.

        Raises:
            RecordError: the file is no sound, is damaged, or is too long.
        """
        return read_sound_header(data, max_secs=self._max_secs, name=name)

    def num_clips(self, header: SoundHeader, name: str = "sound") -> int:
        """Return how many clips a sound is.

        Raises:
            RecordError: it is longer than this processor takes.
        """
        return len(self._clips(header.num_samples_at(self._config.sampling_rate), name))

    def num_tokens(self, header: SoundHeader, name: str = "sound") -> tuple[int, ...]:
        """Return how many tokens each clip of a sound takes; at least one.

        Args:
            header: What `read_header` returned.
            name: What errors call the sound.

        Raises:
            RecordError: the sound is too long, or too short to have a token.
        """
        clips = self._clips(header.num_samples_at(self._config.sampling_rate), name)
        tokens = tuple(self._config.tokens_of(len(clip)) for clip in clips)
        if not all(tokens):
            raise self._too_short(header.num_samples / header.sampling_rate, name)
        return tokens

    def frames(self, data: bytes, name: str = "sound") -> list[Float32[np.ndarray, "F M"]]:
        """Return the frames of each clip, F as `SoundConfig.num_frames_of` counts them.

        They are the valid frames that transformers' extractor makes of the clip alone; frames that
        its mask marks as padding are left out.

        Args:
            data: The bytes of the sound's file.
            name: What errors call the sound.

        Raises:
            RecordError: the file is no sound, is damaged, too long, or too short to have a token.
        """
        samples = decode(data, self._config.sampling_rate, max_secs=self._max_secs, name=name)
        clips = [samples[clip.start : clip.stop] for clip in self._clips(len(samples), name)]
        if not all(self._config.tokens_of(len(clip)) for clip in clips):
            raise self._too_short(len(samples) / self._config.sampling_rate, name)
        return [self._frames(clip) for clip in clips]

    def _clips(self, num_samples: int, name: str) -> list[range]:
        """Return the samples of each clip of a sound."""
        if num_samples > self._max_secs * self._config.sampling_rate:
            raise RecordError(
                f"{name}: expected a sound of at most {float(self._max_secs):g} s, got "
                f"{num_samples / self._config.sampling_rate:,.3f} s; cut it into parts"
            )
        number = max(1, -(-num_samples // self._config.max_samples))
        bounds = [index * num_samples // number for index in range(number + 1)]
        return [range(*pair) for pair in pairwise(bounds)]

    def _frames(self, clip: Float32[np.ndarray, " N"]) -> Float32[np.ndarray, "F M"]:
        if self._mel is not None:
            return self._mel(clip)
        size = self._config.num_features
        return np.pad(clip, (0, -len(clip) % size)).reshape(-1, size)

    def _too_short(self, secs: float, name: str) -> RecordError:
        return RecordError(
            f"{name}: expected a sound that is long enough for a token of the model, got "
            f"{secs:.4f} s; leave such rows out"
        )
