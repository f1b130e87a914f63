"""Samples of files are those of transformers' `load_audio`, and headers tell how many they are."""

import io
import struct
import wave

import numpy as np
import pytest
import soundfile
from transformers.audio_utils import _load_audio_soundfile

from beam_gemma.errors import RecordError
from beam_gemma.inputs import sound_file as module
from beam_gemma.inputs.sound_file import SoundHeader, decode, file_of_array, read_sound_header
from tests.doubles.sound_files import FORMS, signal, sound_file

RATES = [8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 44_100, 48_000, 96_000, 192_000]
ID3 = b"ID3\x04\0\0\0\0\x01\x7f" + bytes(255)
"""A tag before the sound, of 255 bytes."""


def check(data, kind, rate, num_channels, num_samples):
    """Compare samples with the published ones, and the header with what decoding gives."""
    header = read_sound_header(data)
    assert header == SoundHeader(kind, rate, num_channels, num_samples)
    for goal in (16_000, 24_000):
        found = decode(data, goal)
        assert found.dtype == np.float32
        assert len(found) == header.num_samples_at(goal) == -(-num_samples * goal // rate)
        np.testing.assert_array_equal(found, _load_audio_soundfile(data, goal))


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=[" ".join(form) for form in FORMS])
@pytest.mark.parametrize("num_channels", [1, 2, 6])
def test_samples_of_every_kind_and_number_of_channels(kind, form, num_channels):
    if kind == "MP3" and num_channels > 2:
        pytest.skip("an MP3 has at most two channels")
    rate = 48_000 if form == "OPUS" else 44_100
    for number in (1, 5_000, module.BLOCK + 1):
        data = sound_file(signal(number, num_channels), rate, kind, form)
        check(data, {"WAVEX": "WAV"}.get(kind, kind), rate, num_channels, number)


@pytest.mark.parametrize("rate", RATES)
def test_samples_of_every_rate(rate):
    for number in (1, 2, 3, 999, 10_007):
        check(sound_file(signal(number, 2), rate, "FLAC", "PCM_16"), "FLAC", rate, 2, number)
    if rate in (8_000, 12_000, 16_000, 24_000, 48_000):
        data = sound_file(signal(5_001), rate, "OGG", "OPUS")
        check(data, "OGG", rate, 1, 5_001)
    if rate <= 48_000:
        data = sound_file(signal(5_001), rate, "MP3", "MPEG_LAYER_III")
        check(data, "MP3", rate, 1, 5_001)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("num_channels", [1, 2, 5])
def test_files_of_another_writer(width, num_channels):
    """Python's own, whose samples are whole numbers of a number of bytes."""
    values = np.random.default_rng(width).integers(0, 256, (700, num_channels, width), np.uint8)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(num_channels)
        writer.setsampwidth(width)
        writer.setframerate(16_000)
        writer.writeframes(values.tobytes())
    check(file.getvalue(), "WAV", 16_000, num_channels, 700)
    whole = np.zeros((700, num_channels), np.int64)
    for index in range(width):
        whole |= values[..., index].astype(np.int64) << 8 * index
    middle = 1 << (8 * width - 1)
    signed = whole - middle if width == 1 else (whole ^ middle) - middle
    expected = (signed / middle).mean(axis=1)
    # float32 holds 24 bits of each channel.
    np.testing.assert_allclose(decode(file.getvalue(), 16_000), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_between_tags(mode):
    """Their bytes are no sound, and a picture of the album may hold anything."""
    plain = sound_file(signal(44_100), 44_100, "MP3", "MPEG_LAYER_III", bitrate_mode=mode)
    for data in (ID3 + plain, ID3 + ID3 + plain, ID3 + plain + b"TAG" + bytes(125)):
        check(data, "MP3", 44_100, 1, 44_100)
        np.testing.assert_array_equal(decode(data, 16_000), decode(plain, 16_000))


def without_header(mode):
    """Return an MP3 without its first frame, which holds no sound but tells how much follows."""
    samples, options = signal(44_100), {"bitrate_mode": mode, "compression_level": 0.5}
    data = sound_file(samples, 44_100, "MP3", "MPEG_LAYER_III", **options)
    start = data.index(data[:2], 100)
    assert {"CONSTANT": b"Info", "VARIABLE": b"Xing"}[mode] in data[:start]
    return data[start:]


def test_an_mp3_of_constant_rate_without_a_header_of_its_own():
    for tag in (b"", b"TAG" + bytes(125), b"APETAGEX" + bytes(3_000)):
        data = without_header("CONSTANT") + tag
        header = read_sound_header(data)
        assert len(decode(data, 44_100)) == header.num_samples
        assert abs(header.num_samples - 44_100) < 4 * 1152


def test_an_mp3_of_variable_rate_without_a_header_of_its_own():
    """libsndfile takes the first frame for the size of all, and would leave half of it unread."""
    for use in (read_sound_header, lambda data: decode(data, 16_000)):
        with pytest.raises(
            RecordError, match=r"expected 3.,... samples or more, as the file tells"
        ):
            use(without_header("VARIABLE"))


def test_a_flac_between_tags():
    plain = sound_file(signal(5_000), 44_100, "FLAC", "PCM_16")
    for data in (ID3 + plain, plain + b"TAG" + bytes(125)):
        assert read_sound_header(data) == read_sound_header(plain)
        np.testing.assert_array_equal(decode(data, 16_000), decode(plain, 16_000))


def test_a_flac_that_was_written_to_a_pipe_is_counted():
    data = bytearray(sound_file(signal(70_000), 44_100, "FLAC", "PCM_16"))
    whole = decode(bytes(data), 16_000)
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    assert soundfile.SoundFile(io.BytesIO(data)).frames > 1 << 62
    assert read_sound_header(bytes(data)).num_samples == 70_000
    np.testing.assert_array_equal(decode(bytes(data), 16_000), whole)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_that_was_written_to_a_pipe(size):
    data = bytearray(sound_file(signal(700), 16_000, "WAV", "PCM_16"))
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", size)
    check(bytes(data), "WAV", 16_000, 1, 700)


def test_the_header_of_a_kind_that_tells_its_length_decodes_nothing(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 0)
    for kind, form in [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")]:
        data = sound_file(signal(9_000), 48_000, kind, form)
        assert read_sound_header(data).num_samples == 9_000


class TestArrays:
    def test_keep_every_sample(self):
        samples = signal(333, 2)
        data = file_of_array(samples.T, 22_050)
        check(data, "WAV", 22_050, 2, 333)
        found, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        assert rate == 22_050
        np.testing.assert_array_equal(found, samples)

    @pytest.mark.parametrize(
        "array", [[0.5, -0.25, 1], [[0.5, -0.25, 1]], np.array([0.5, -0.25, 1]), (0.5, -0.25, 1)]
    )
    def test_may_be_lists(self, array):
        np.testing.assert_array_equal(
            decode(file_of_array(array, 16_000.0), 16_000), [0.5, -0.25, 1]
        )

    @pytest.mark.parametrize(
        ("array", "rate", "error"),
        [
            ([0.5], None, "expected a whole sampling_rate, got None"),
            ([0.5], True, "expected a whole sampling_rate, got True"),
            ([0.5], 16_000.5, "expected a whole sampling_rate, got 16000.5"),
            ([0.5], float("nan"), "expected a whole sampling_rate, got nan"),
            ([0.5], "16000", "expected a whole sampling_rate, got '16000'"),
            ([0.5], 10, "expected a sampling rate from 4,000 to 192,000, got 10"),
            ([["a"]], 16_000, "expected an array of samples from -1 to 1, got <U1 in 2"),
            ([None], 16_000, "got object in 1 dimensions"),
            ([[0.5], [0.5, 0.5]], 16_000, "got lists of several lengths"),
            ([[[0.5]]], 16_000, "got float64 in 3 dimensions"),
            (0.5, 16_000, "got float64 in 0 dimensions"),
            ([True], 16_000, "got bool in 1 dimensions"),
            ([3000, -12], 16_000, "got whole numbers, whose full volume is unknown"),
            (np.zeros((9, 5)), 16_000, "expected 1 to 8 channels, got 9"),
            ([], 16_000, "got a file with zero samples"),
            ([0.5, float("nan")], 16_000, "got one that is no number"),
            ([0.5, 1e7], 16_000, "is larger than 1,000,000"),
        ],
    )
    def test_of_anything_else_are_errors(self, array, rate, error):
        with pytest.raises(RecordError, match=f"^column 'call': .*{error}"):
            decode(file_of_array(array, rate, "column 'call'"), 16_000, name="column 'call'")
