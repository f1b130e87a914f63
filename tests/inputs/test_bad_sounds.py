"""What is no sound is the error of its row: one sentence with column and cause, nothing else."""

import struct
import warnings
from contextlib import suppress

import pytest
import soundfile

from beam_gemma.errors import RecordError
from beam_gemma.inputs.prompt_settings import PromptSettings
from beam_gemma.inputs.sound_file import SUBTYPES, decode, file_of_array, read_sound_header
from beam_gemma.inputs.sound_processor import SoundProcessor
from beam_gemma.inputs.sounds import column_sounds
from tests.doubles.nested import nested
from tests.doubles.sound_files import FORMS, GEMMA4, signal, sound_file

NAME = "column 'call'"
FILES = {
    form: sound_file(signal(20_000), 48_000, kind, form)
    for kind, form in FORMS
    if kind != "WAVEX" and form in ("PCM_16", "VORBIS", "OPUS", "MPEG_LAYER_III", "FLOAT")
    if (kind, form) != ("FLAC", "PCM_16")
}
FILES["FLAC"] = sound_file(signal(20_000), 48_000, "FLAC", "PCM_16")
"""Whole files, by the form of their samples."""


def late(form, share):
    """Return a file that ends early."""
    return FILES[form][: int(len(FILES[form]) * share)]


def changed(form, field, value, offset):
    """Return a WAV with another number of 16 or 32 bits at an offset from a chunk's name."""
    data = bytearray(FILES[form])
    at = data.index(field) + offset
    size = 2 if offset in (10, 20) else 4
    data[at : at + size] = value.to_bytes(size, "little")
    return bytes(data)


def other(kind, form, rate=16_000):
    return sound_file(signal(4_000), rate, kind, form)


REFUSED = {
    "zero bytes": (b"", "expected the file of a sound, got zero bytes"),
    "one byte": (b"x", "got 1 bytes that are none, or are damaged at the start; convert it"),
    "text": (b"hello, this is no sound at all", "30 bytes that are none"),
    "text of 16 bits": ("hello".encode("utf-16"), "12 bytes that are none"),
    "zeros": (bytes(1_000), "1,000 bytes that are none"),
    "a signature alone": (b"RIFF\0\0\0\0WAVE", "got a damaged file"),
    "the signature of a FLAC": (b"fLaC", "got a damaged file"),
    "a tag alone": (b"ID3\x04\0\0\0\0\0\0", "10 bytes that are none"),
    "a tag that goes beyond the file": (b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(9), "are none"),
    "AIFF": (other("AIFF", "PCM_16"), "expected a sound in one of WAV, FLAC, OGG, MP3, got AIFF"),
    "AU": (other("AU", "PCM_16"), "got AU"),
    "CAF": (other("CAF", "PCM_16"), "got CAF"),
    "RF64": (other("RF64", "PCM_16"), "a WAV of another form"),
    "M4A": (b"\0\0\0\x20ftypM4A " + bytes(50), "got MP4, as M4A files are; convert it"),
    "AAC": (b"\xff\xf1\x50\x80" + bytes(50), "got AAC"),
    "WebM": (b"\x1a\x45\xdf\xa3" + bytes(50), "got WebM or Matroska"),
    "AMR": (b"#!AMR\n" + bytes(50), "got AMR"),
    "MIDI": (b"MThd" + bytes(50), "got MIDI, which holds notes"),
    "HTML": (b"<!DOCTYPE html><html>", "a page of HTML"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "a WAV of ADPCM": (other("WAV", "IMA_ADPCM"), "got IMA_ADPCM in WAV; convert it to one of"),
    "a WAV of GSM": (other("WAV", "GSM610", 8_000), "got GSM610 in WAV"),
    "a low rate": (other("WAV", "PCM_16", 3_999), "rate from 4,000 to 192,000, got 3,999; resamp"),
    "a high rate": (other("WAV", "PCM_16", 192_001), "to 192,000, got 192,001"),
    "no rate": (changed("PCM_16", b"fmt ", 0, 12), "got"),
    "nine channels": (
        sound_file(signal(9, 9), 16_000, "WAV", "PCM_16"), "expected 1 to 8 channels, got 9; mix"
    ),
    "60,000 channels": (changed("PCM_16", b"fmt ", 60_000, 10), "got"),
    "no channel": (changed("PCM_16", b"fmt ", 0, 10), "got"),
    "a WAV without samples": (changed("PCM_16", b"data", 0, 4), "got a file with zero samples"),
    "a WAV with half a sample": (changed("PCM_16", b"data", 1, 4), "got a file with zero samples"),
    "a WAV that is cut off": (
        late("PCM_16", 0.5), r"expected 40,000 bytes of samples, got 19,978, as the file is cut off"
    ),
    "an OGG that is cut off": (late("VORBIS", 0.9), "a whole page at the end of an OGG, got a par"),
    "an Opus that is cut off": (late("OPUS", 0.9), "whole page at the end of an OGG, got a part"),
    "an MP3 that is cut off": (late("MPEG_LAYER_III", 0.5), "a last frame of .* bytes, got"),
    "an MP3 that lacks frames": (
        FILES["MPEG_LAYER_III"][: FILES["MPEG_LAYER_III"].rindex(b"\xff\xfb")],
        "expected 20,000 samples or more, as the file tells, got",
    ),
    "two MP3 in one": (
        FILES["MPEG_LAYER_III"] * 2, "got 20,000, as it is damaged, cut off, or two files in one"
    ),
    "two OGG in one": (FILES["VORBIS"] * 2, "expected one sound in an OGG, got 2 behind or beside"),
    "an OGG of Vorbis and Opus": (FILES["OPUS"] + FILES["VORBIS"], "one sound in an OGG, got 2"),
    "an integer": (7, r"a struct {bytes, path}, a struct {array, samp.*got int"),
    "a struct of others": ({"height": 1, "width": 2}, "got a struct of height, width"),
    "an array without rate": ({"array": [0.5]}, "expected a whole sampling_rate, got None"),
    "an array of text": ({"array": ["a"], "sampling_rate": 16_000}, "an array of samples"),
    "an empty array": ({"array": [], "sampling_rate": 16_000}, "got a file with zero samples"),
    "a list within a list": ([[FILES["PCM_16"]]], "got list"),
    "a list of samples": ([0.5, 0.25], "sound 1: expected bytes.*, got float"),
    "many lists": (nested(100_000), "got list"),
    "a failed fetch": ({"bytes": None, "error": "expected a file, got none"}, "got none"),
    "a path": ("calls/1.wav", "expected the bytes of a sound, got a path or URI, 'calls/1.wav'"),
    "an ObjectRef": ({"uri": "gs://b/1.wav", "version": "1"}, "or URI, 'gs://b/1.wav'; give its"),
    "a null": (None, "expected a sound, got null; filter such rows out, or allow missing audio"),
    "a struct of nulls": ({"bytes": None, "path": None}, "expected a sound, got null"),
    "a null in a list": ([FILES["PCM_16"], None], "sound 2: expected a sound, got null"),
    "a bad one in a list": ([FILES["PCM_16"], b"x"], "sound 2: expected a sound in one of"),
}  # fmt: skip
"""Values that a prompt is not made of, and what their error says."""
DAMAGED = {
    "a FLAC that is cut off": (late("FLAC", 0.7), "got a damaged file: "),
    "a FLAC of another sum": (FILES["FLAC"][:-9] + b"\xff" * 9, "got a damaged file: "),
    "a FLAC that promises more": (
        FILES["FLAC"][:22] + struct.pack(">I", 20_001) + FILES["FLAC"][26:], "got"
    ),
    "a sample that is no number": (changed("FLOAT", b"data", 0x7FC00000, 8), "got one that is no"),
    "an infinite sample": (changed("FLOAT", b"data", 0x7F800000, 8), "got one that is no number"),
    "infinite samples of both signs": (
        file_of_array([[float("inf")], [float("-inf")]], 16_000), "got one that is no number"
    ),
    "samples whose sum is too large": (
        file_of_array([[3e38], [3e38]], 16_000), "got one that is no number, or is larger"
    ),
    "samples that float32 cannot hold": (file_of_array([1e300], 16_000), "or is larger than 1,000"),
    "a huge sample": (changed("FLOAT", b"data", 0x7F000000, 8), "is larger than 1,000,000; write"),
}  # fmt: skip
"""Files whose headers may be read; the error comes when they are decoded."""


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not caught


def headers_of(value, **options):
    settings = PromptSettings(prompt="say", audio_columns=("call",), **options)
    sounds = column_sounds({"call": value}, "call", settings)
    return [read_sound_header(sound.data, name=name) for name, sound in sounds]


def check_sentence(error):
    message = str(error)
    assert message.startswith(NAME)
    assert "expected" in message
    assert "got" in message
    assert "\n" not in message
    assert " object at 0x" not in message
    assert len(message) < 500


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_sound_is_the_error_of_its_row(kind):
    value, match = REFUSED[kind]
    with pytest.raises(RecordError, match=match) as caught:
        headers_of(value)
    check_sentence(caught.value)
    if isinstance(value, bytes):
        with pytest.raises(RecordError, match=match) as caught:
            SoundProcessor(GEMMA4).frames(value, NAME)
        check_sentence(caught.value)


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_cannot_be_decoded_is_the_error_of_its_row(kind):
    data, match = DAMAGED[kind]
    with pytest.raises(RecordError, match=match) as caught:
        decode(data, 16_000, name=NAME)
    check_sentence(caught.value)


def test_values_that_are_sounds():
    data = FILES["PCM_16"]
    header = read_sound_header(data)
    for value in (
        data, bytearray(data), memoryview(data), [data], {"bytes": data, "path": "1.wav"},
        {"bytes": memoryview(data), "path": None}, {"bytes": data, "error": None},
    ):  # fmt: skip
        assert headers_of(value) == [header]
    assert headers_of([data, FILES["OPUS"]]) == [header, read_sound_header(FILES["OPUS"])]
    for empty in (None, [], [None], {"bytes": None}):
        assert headers_of(empty, allow_missing_audio=True) == []


def test_an_array_of_a_row_is_its_sound():
    """Decoded by `datasets`, whose path says where it is from and need not be read."""
    samples = signal(700, 2).T
    value = {"path": "call.mp3", "array": samples.tolist(), "sampling_rate": 22_050}
    settings = PromptSettings(prompt="say", audio_columns=("call",))
    [(name, sound)] = column_sounds({"call": value}, "call", settings)
    assert name == NAME
    assert sound.data == file_of_array(samples, 22_050)


def test_only_kinds_that_are_listed_are_opened():
    """libsndfile reads 26 kinds, of which most are seldom tried with hostile files."""
    read = set()
    # Of SD2, libsndfile writes a part to a file of its own, in the working directory.
    for kind in soundfile.available_formats().keys() - {"SD2"}:
        for form in soundfile.available_subtypes(kind):
            with suppress(soundfile.LibsndfileError, RecordError):
                read.add((read_sound_header(other(kind, form)).kind, form))
    assert read == {(kind, form) for kind, forms in SUBTYPES.items() for form in forms}
