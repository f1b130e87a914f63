"""Files of sound that would end the process, or cost far more than their size, are refused."""

import random
import struct
import time

import pytest

from beam_gemma.errors import RecordError
from beam_gemma.inputs import sound_file as module
from beam_gemma.inputs.ogg_checks import MAX_ENTRIES
from beam_gemma.inputs.sound_file import decode, read_sound_header
from beam_gemma.inputs.sound_processor import SoundProcessor
from tests.doubles.damage import damaged, judged
from tests.doubles.ogg_pages import FIRST, LAST, page, repaired, vorbis, vorbis_file
from tests.doubles.sound_files import GEMMA4_UNIFIED, signal, sound_file

PROCESSOR = SoundProcessor(GEMMA4_UNIFIED)
NUM_CASES = 120
SMALL_BOOKS, LARGE_BOOKS = vorbis(1, 4), vorbis(1, 20)


def wav_of_chunks(number, *, after=0):
    """Return a WAV with empty chunks before its samples, and after them."""
    about = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    samples = b"data" + struct.pack("<I", 2_000) + bytes(2_000)
    chunks = about + b"junk\0\0\0\0" * number + samples + b"junk\0\0\0\0" * after
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def flac_of_silence(num_samples, *, told):
    """Return a FLAC whose header tells of some number of samples, or of none."""
    data = bytearray(sound_file(signal(num_samples) * 0, 16_000, "FLAC", "PCM_16"))
    data[21] = data[21] & 0xF0 | told >> 32
    data[22:26] = struct.pack(">I", told & 0xFFFFFFFF)
    return bytes(data)


def with_pages(*pages):
    """Return a Vorbis file whose code books are on other pages."""
    sound = page([bytes(10)] * 5, LAST, 2, position=1_000)
    return page([SMALL_BOOKS[0]], FIRST, 0) + b"".join(pages) + sound


def spoilt(data):
    """Return a page whose checksum is wrong, which a decoder passes over."""
    return data[:22] + bytes([data[22] ^ 1]) + data[23:]


OFFERED, REAL = page(SMALL_BOOKS[1:], 0, 1), page(LARGE_BOOKS[1:], 0, 1)
BOOKS = "code books of Vorbis with at most 16,384 entries each and 4,194,304 values in all"
HOSTILE = {
    "days of silence, as its header tells": (
        flac_of_silence(9_000, told=(1 << 36) - 1), "at most 30 s, got 4,294,967.296 s; cut it"
    ),
    "silence of unknown length": (flac_of_silence(16_000 * 31, told=0), "at most 30 s, got more"),
    "an MP3 of silence": (
        sound_file(signal(16_000 * 31) * 0, 16_000, "MP3", "MPEG_LAYER_III"), "30 s, got more; cut"
    ),
    "chunks of a WAV": (wav_of_chunks(1_000_000), "at most 1,000 chunks before the samples"),
    "a large code book": (vorbis_file(1, 20), BOOKS),
    "a code book that is just too large": (vorbis_file(1, 15), BOOKS),
    "code books with many values": (vorbis_file(256, 14, num_dimensions=2), BOOKS),
    "books behind a page that is passed over": (with_pages(spoilt(OFFERED), REAL), BOOKS),
    "books behind a page of another sound": (
        with_pages(page(SMALL_BOOKS[1:], 0, 1, serial=8), REAL), BOOKS
    ),
    "books behind a page of another number": (with_pages(page(SMALL_BOOKS[1:], 0, 3), REAL), BOOKS),
    "books behind bytes that are no page": (with_pages(b"x", REAL), BOOKS),
    "books behind a page that continues nothing": (
        with_pages(page(SMALL_BOOKS[1:], 1, 1), REAL), BOOKS
    ),
    "a second sound whose flags have more": (
        vorbis_file(1, 4) + page([LARGE_BOOKS[0]], FIRST | 8, 0, serial=8) + REAL, "one sound in an"
    ),
    "an OGG of another codec": (page([b"Speex   "], FIRST, 0), "expected Vorbis or Opus, got"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_cost_more_than_their_size_are_refused(name):
    data, error = HOSTILE[name]
    for use in (PROCESSOR.read_header, PROCESSOR.frames):
        start = time.process_time()
        with pytest.raises(RecordError, match=error) as caught:
            use(data, "column 'call'")
        assert str(caught.value).startswith("column 'call': expected ")
        assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "data",
    [
        wav_of_chunks(100, after=1_000_000),
        vorbis_file(1, 4),
        vorbis_file(100, MAX_ENTRIES.bit_length() - 1),
        with_pages(OFFERED),
        flac_of_silence(16_000 * 30, told=0),
    ],
)
def test_such_files_of_a_usual_size_are_sounds(data):
    assert PROCESSOR.num_tokens(PROCESSOR.read_header(data)) == (len(PROCESSOR.frames(data)[0]),)


@pytest.mark.parametrize("quality", [0, 0.5, 1])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 96_000])
def test_code_books_of_an_encoder_are_harmless(rate, quality):
    for num_channels in (1, 2, 6):
        samples = signal(3_000, num_channels)
        data = sound_file(samples, rate, "OGG", "VORBIS", compression_level=quality)
        assert read_sound_header(data).num_samples == 3_000


def test_a_sound_is_decoded_in_blocks_up_to_its_limit(monkeypatch):
    """Of 31 s, no more than the block in which the limit is passed."""
    read = []
    before = module._Stream.read
    monkeypatch.setattr(
        module._Stream, "read", lambda self, out: read.append(len(out)) or before(self, out=out)
    )
    for data in (HOSTILE["silence of unknown length"][0], HOSTILE["an MP3 of silence"][0]):
        read.clear()
        with pytest.raises(RecordError, match="at most 1 s, got more"):
            decode(data, 16_000, max_secs=1)
        assert sum(read) == 16_001
        assert max(read) <= module.BLOCK


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"),
        ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
    ],
)  # fmt: skip
def test_any_damage_gives_frames_or_an_error(kind, form, capfd):
    """Never a raw exception, nor one within a function that libsndfile calls, which is printed."""
    content = sound_file(signal(9_000, 2), 48_000, kind, form)
    rng = random.Random(1)
    fields = [(place, width) for place in range(100) for width in (1, 2, 4)]
    cases = [damaged(content, rng, fields) for _ in range(NUM_CASES)]
    if kind == "OGG":  # its decoder passes over pages with wrong checksums
        cases += [repaired(case) for case in cases]
    counts = judged(cases, frames_that_agree)
    assert counts["read"]
    assert counts["refused"]
    output = capfd.readouterr()
    assert "Traceback" not in output.err
    assert "callback" not in output.err


def frames_that_agree(data):
    """Read a file twice: its header, and its frames."""
    header = PROCESSOR.read_header(data)
    frames = PROCESSOR.frames(data)
    assert tuple(map(len, frames)) == PROCESSOR.num_tokens(header)


def test_an_error_shows_nothing_of_what_a_path_may_lead_to():
    """Nobody wants to read in a table what `/proc/self/environ` holds, or a file of passwords."""
    with pytest.raises(RecordError) as caught:
        read_sound_header(b"TOKEN=secret")
    assert "TOKEN" not in str(caught.value)
    assert "got 12 bytes that are none, or are damaged at the start" in str(caught.value)
