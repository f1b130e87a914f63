"""Samples to frames of mel bins, as the feature extractors of transformers 5.23 make them.

The steps have their dtypes: frames, window and Fourier transform are in float32, and the bins from
the filters on in float64. Where a band of a loud sound is silent, its bins hold the rounding of
those steps, so other dtypes would give other features there.

Dimensions: N samples, F frames, L samples of a frame, K frequencies, M mel bins.
"""

from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from beam_gemma.model.sound_config import PAD_TO_MULTIPLE_OF, MelConfig, SoundConfig


class MelFrames:
    """Makes frames of mel bins of the samples of a clip; for any number of threads.

    Each number is made by operations on single values in one order, with no matrix product whose
    order depends on threads, so a clip has the same bits wherever it is computed on a machine.

    Source: `Gemma3nAudioFeatureExtractor` and `Gemma4AudioFeatureExtractor`.

    Args:
        config: The sound half of a model, with `mel`.
    """

    def __init__(self, config: SoundConfig) -> None:
        if config.mel is None:
            raise ValueError("mel: expected settings of mel bins, got a model of plain frames")
        self._mel = config.mel
        self._pads_right = config.encoder == "usm"
        self._window = _hann_window(self._mel.frame_length, in_float32=config.encoder == "usm")
        filters = mel_filters(self._mel, config.num_features, config.sampling_rate)
        self._num_features = config.num_features
        self._weights = [
            (int(k), int(m), float(filters[k, m]))
            for k, m in zip(*np.nonzero(filters), strict=True)
        ]
        self._mean, self._stddev = (
            None if values is None else np.array(values)[:, None]
            for values in (self._mel.per_bin_mean, self._mel.per_bin_stddev)
        )

    def __call__(self, samples: Float32[np.ndarray, " N"]) -> Float32[np.ndarray, "F M"]:
        """Return the valid frames of a clip: none if it is shorter than one."""
        magnitudes = np.abs(np.fft.rfft(self._windowed(samples), n=self._mel.fft_length, axis=-1))
        columns = np.ascontiguousarray(magnitudes.T, np.float64)
        bins = np.zeros((self._num_features, len(magnitudes)))
        for frequency, bin_, weight in self._weights:
            bins[bin_] += columns[frequency] * weight
        floor = self._mel.mel_floor
        values = np.log(bins + floor if self._mel.adds_floor else np.maximum(bins, floor))
        if self._mean is not None:
            values -= self._mean
        if self._stddev is not None:
            values /= self._stddev
        return np.ascontiguousarray(values.T, np.float32)

    def _windowed(self, samples: Float32[np.ndarray, " N"]) -> Float32[np.ndarray, "F L"]:
        """Return overlapping frames of samples under the window."""
        mel = self._mel
        pads_right = -len(samples) % PAD_TO_MULTIPLE_OF if self._pads_right else 0
        padded = np.pad(samples, (mel.pads_left, pads_right))
        if mel.input_scale_factor != 1.0:
            padded *= np.float32(mel.input_scale_factor)
        length = mel.frame_length + 1  # one more, for the difference of neighbours
        if len(padded) < length:
            return np.zeros((0, mel.frame_length), np.float32)
        frames: Any = np.lib.stride_tricks.sliding_window_view(padded, length)[:: mel.hop_length]
        share = np.float32(mel.preemphasis)
        if not mel.preemphasis:
            return frames[:, :-1] * self._window
        if not mel.preemphasis_htk_flavor:
            return (frames[:, 1:] - share * frames[:, :-1]) * self._window
        result = np.empty((len(frames), mel.frame_length), np.float32)
        result[:, 0] = frames[:, 0] * np.float32(1.0 - mel.preemphasis)
        result[:, 1:] = frames[:, 1:-1] - share * frames[:, :-2]
        result *= self._window
        return result


def mel_filters(
    mel: MelConfig, num_features: int, sampling_rate: int
) -> Float64[np.ndarray, "K M"]:
    """Return the share of each frequency in each mel bin.

    A bin is a triangle over frequencies whose corners are three neighbours of M + 2 points, which
    are evenly spaced in mel, which is 2595 log10(1 + f / 700) as in HTK. Upper bins whose
    triangle lies between two frequencies are 0.
    """
    lowest, highest = (
        2595.0 * np.log10(1.0 + frequency / 700.0)
        for frequency in (mel.min_frequency, mel.max_frequency)
    )
    points = 700.0 * (10.0 ** (np.linspace(lowest, highest, num_features + 2) / 2595.0) - 1.0)
    frequencies = np.arange(mel.fft_length // 2 + 1)[:, None] * (sampling_rate / mel.fft_length)
    rising = (frequencies - points[:-2]) / np.diff(points)[:-1]
    falling = (points[2:] - frequencies) / np.diff(points)[1:]
    return np.maximum(0.0, np.minimum(rising, falling))


def _hann_window(length: int, *, in_float32: bool) -> Float32[np.ndarray, " L"]:
    """Return Hann's window of a period, whose angles Gemma 3n rounds to float32."""
    if in_float32:
        angles = 2 * np.pi * np.arange(length, dtype=np.float32) / length
        return (0.5 * (1 - np.cos(angles))).astype(np.float32)
    return np.hanning(length + 1)[:-1].astype(np.float32)
