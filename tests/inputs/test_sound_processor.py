"""Frames of sounds are those of transformers' extractors: every model, signal and length."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from transformers import Gemma3nAudioFeatureExtractor

from beam_gemma.errors import RecordError
from beam_gemma.inputs.mel import MelFrames
from beam_gemma.inputs.sound_file import file_of_array, read_sound_header
from beam_gemma.inputs.sound_processor import SoundProcessor
from tests.doubles.sound_files import (
    GEMMA4,
    GEMMA4_UNIFIED,
    SOUNDS,
    gemma3n_sound,
    published,
    signal,
)

RNG = np.random.default_rng(0)
SIGNALS = {
    "noise": lambda number: (RNG.standard_normal(number) * 0.1).astype(np.float32),
    "a tone, whose other bins hold the rounding of float32": lambda number: np.sin(
        np.arange(number) * 0.3
    ).astype(np.float32),
    "silence": lambda number: np.zeros(number, np.float32),
    "a click": lambda number: np.eye(1, number, number // 2, dtype=np.float32)[0],
}
LENGTHS = [*range(513, 513 + 320, 7), 16_000, 16_127, 16_128, 16_129, 47_999]
"""Numbers of samples with all remainders by a hop of 160, and around a multiple of 128."""


def check(config, extractor, samples):
    """Compare the frames of a clip with the published ones."""
    data = file_of_array(samples, 16_000)
    processor = SoundProcessor(config)
    header = read_sound_header(data)
    [frames] = processor.frames(data)
    expected = published(extractor, samples)
    assert (
        frames.shape == expected.shape == (config.num_frames_of(len(samples)), config.num_features)
    )
    assert frames.dtype == expected.dtype == np.float32
    assert frames.flags.c_contiguous
    assert processor.num_clips(header) == 1
    assert processor.num_tokens(header) == (config.tokens_of_frames(len(frames)),)
    # In float32 with values up to 10. On the machine where this was written they are equal.
    np.testing.assert_allclose(frames, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", SOUNDS)
class TestFrames:
    @pytest.mark.parametrize("name", SIGNALS)
    def test_of_every_signal_and_remainder(self, model, name):
        for number in LENGTHS:
            check(*SOUNDS[model], SIGNALS[name](number))

    def test_of_the_longest_clip(self, model):
        check(*SOUNDS[model], SIGNALS["noise"](480_000))

    def test_of_the_shortest_clip_and_none_that_is_shorter(self, model):
        config, extractor = SOUNDS[model]
        shortest = {"gemma3n": 513, "gemma4": 161, "gemma4_unified": 1}[model]
        if model == "gemma3n":
            shortest = 4 * 128 + 1  # zeros fill it up to 5 * 128
        check(config, extractor, SIGNALS["noise"](shortest))
        if shortest == 1:
            return
        for number in {1, shortest // 2, shortest - 1}:
            samples = SIGNALS["noise"](number)
            assert len(published(extractor, samples)) == config.tokens_of(number) == 0
            data = file_of_array(samples, 16_000)
            error = (
                rf"^column 'call': expected a sound that is long enough .*got {number / 16e3:.4f} s"
            )
            with pytest.raises(RecordError, match=error):
                SoundProcessor(config).frames(data, "column 'call'")
            with pytest.raises(RecordError, match=error):
                SoundProcessor(config).num_tokens(read_sound_header(data), "column 'call'")

    def test_have_the_same_bits_in_threads_and_in_any_company(self, model):
        processor = SoundProcessor(SOUNDS[model][0], split=True)
        files = [file_of_array(signal(9_000 + 777 * n, seed=n)[:, 0], 16_000) for n in range(8)]
        alone = [processor.frames(data)[0].tobytes() for data in files]
        with ThreadPoolExecutor(4) as threads:
            for _ in range(3):
                found = threads.map(processor.frames, files)
                assert [frames[0].tobytes() for frames in found] == alone


@pytest.mark.parametrize(
    "settings",
    [
        {"preemphasis_htk_flavor": False},
        {"preemphasis": 0.0},
        {"input_scale_factor": 0.25},
        {"per_bin_mean": tuple(np.linspace(-3, 1, 128))},
        {"per_bin_stddev": tuple(np.linspace(0.5, 2, 128)), "per_bin_mean": (1.5,) * 128},
        {"mel_floor": 0.1, "min_frequency": 0.0, "max_frequency": 8000.0},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_settings_of_mel_bins_are_the_published_ones(settings):
    check(gemma3n_sound(**settings), Gemma3nAudioFeatureExtractor(**settings), signal(5_000)[:, 0])


def test_windows_of_gemma_3n_are_rounded_as_the_published_one():
    """Where a tone leaves bins silent, another rounding of the window is another feature."""
    config, extractor = SOUNDS["gemma3n"]
    mel = MelFrames(config)
    np.testing.assert_array_equal(mel._window, extractor.window)
    tone = SIGNALS["a tone, whose other bins hold the rounding of float32"](4_000)
    mel._window = np.hanning(513)[:-1].astype(np.float32)
    assert np.abs(mel(tone) - published(extractor, tone)).max() > 1e-5


class TestClips:
    CONFIG = replace(GEMMA4, max_samples=4_000)

    def test_a_longer_sound_is_an_error(self):
        """Known from the header, and once more where the clip is decoded."""
        processor = SoundProcessor(self.CONFIG)
        assert processor.num_clips(read_sound_header(file_of_array(signal(4_000).T, 16_000))) == 1
        data = file_of_array(signal(4_001)[:, 0], 16_000)
        for use in (
            lambda: processor.read_header(data, "column 'call'"),
            lambda: processor.num_clips(read_sound_header(data), "column 'call'"),
            lambda: processor.num_tokens(read_sound_header(data), "column 'call'"),
            lambda: processor.frames(data, "column 'call'"),
        ):
            with pytest.raises(RecordError, match=r"^column 'call': expected .* at most 0.25 s"):
                use()

    @pytest.mark.parametrize("num_samples", [1_000, 4_000, 4_001, 7_999, 8_000, 8_001, 30_011])
    def test_a_split_loses_nothing_and_makes_no_clip_too_short(self, num_samples):
        config = replace(GEMMA4_UNIFIED, max_samples=4_000, num_features=1)
        samples = signal(num_samples)[:, 0]
        data = file_of_array(samples, 16_000)
        processor = SoundProcessor(config, split=True)
        header = processor.read_header(data)
        clips = processor.frames(data)
        assert len(clips) == processor.num_clips(header) == -(-num_samples // 4_000)
        assert tuple(map(len, clips)) == processor.num_tokens(header)
        np.testing.assert_array_equal(np.concatenate(clips)[:, 0], samples)
        lengths = {len(clip) for clip in clips}
        assert max(lengths) <= 4_000
        assert max(lengths) - min(lengths) <= 1

    def test_each_clip_of_a_split_is_computed_as_if_it_were_alone(self):
        samples = signal(9_001)[:, 0]
        clips = SoundProcessor(self.CONFIG, split=True).frames(file_of_array(samples, 16_000))
        alone = SoundProcessor(self.CONFIG)
        for clip, part in zip(clips, np.split(samples, [3_000, 6_000]), strict=True):
            [frames] = alone.frames(file_of_array(part, 16_000))
            np.testing.assert_array_equal(clip, frames)

    def test_a_split_sound_ends_after_an_hour(self):
        processor = SoundProcessor(GEMMA4_UNIFIED, split=True)
        header = read_sound_header(file_of_array(np.zeros(4_000), 4_000))
        assert processor.num_clips(replace(header, num_samples=4_000 * 3_600)) == 120
        with pytest.raises(RecordError, match="at most 3600 s, got 3,600"):
            processor.num_clips(replace(header, num_samples=4_000 * 3_600 + 1))
