"""Small files that decoders would work on for minutes, or in gigabytes, are refused by a header."""

import io
import struct
import time
import zlib

import pytest
from PIL import Image

from beam_gemma.errors import RecordError
from beam_gemma.inputs import image_processor
from beam_gemma.inputs.image_processor import ImageProcessor, read_header
from tests.doubles.published_processors import GEMMA3_VISION

PROCESSOR = ImageProcessor(GEMMA3_VISION)
GIF_START = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + bytes(6)
GIF_END = b"," + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\2\2\x44\1\0;"


def file_of(kind, picture, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def bmp_of_runs(width, height, runs):
    """Return a BMP of grey values with run lengths."""
    start = 54 + 1024
    header = struct.pack("<IHHI", start + len(runs), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    palette = b"".join(bytes((n, n, n, 0)) for n in range(256))
    return b"BM" + header + info + palette + runs


def jpeg_of_scans(size, more):
    """Return a progressive JPEG whose last scan is repeated."""
    data = file_of("JPEG", Image.new("L", size), progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * more + b"\xff\xd9"


def tiff_of_tile(side):
    """Return a TIFF of 10 x 10 pixels with one tile."""
    pixels = zlib.compress(bytes(min(side * side, 1 << 18)))
    tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8}
    tags[325] = len(pixels)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def chunk(name, data=b""):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_chunks(number):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"abCd") * number + pixels + chunk(b"IEND")


HOSTILE = {
    "a BMP of one long line": (bmp_of_runs(49_000_000, 2, b"\1\5\0\0\1\5\0\1"), "2,000,000 pixels"),
    "a PPM of 12 bits": (b"P5\n1500 1500\n4095\n" + bytes(99), "2,000,000 pixels of a PPM"),
    "comments of a PPM": (b"P3\n9 9\n255\n" + b"#\n" * 2_000_000, "at most 1,000 comments"),
    "a PPM that starts with comments": (b"P6\n" + b"#\n" * 2_000_000, "10,000 parts"),
    "notes of a GIF": (GIF_START + (b"!\xfe\1a\0") * 99_000 + GIF_END, "10,000 parts"),
    "a long note of a GIF": (GIF_START + b"!\xfe" + b"\1a" * 99_000 + b"\0" + GIF_END, "10,000"),
    "chunks of a PNG": (png_of_chunks(99_000), "header has at most 10,000 parts"),
    "scans of a JPEG": (jpeg_of_scans((5_000, 4_000), 120), r"at most 100 scans, got more"),
    "a tile of a TIFF": (tiff_of_tile(40_000), r"tiles of at most 16,000,000 pixels, got 40,000 x"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("use", [read_header, PROCESSOR.pixels])
def test_files_that_cost_more_than_their_size_are_refused(name, use):
    data, error = HOSTILE[name]
    start = time.process_time()
    with pytest.raises(RecordError, match=error) as caught:
        use(data, name="column 'photo'")
    assert str(caught.value).startswith("column 'photo': expected ")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "data",
    [
        bmp_of_runs(4, 2, b"\4\7\0\0\4\7\0\1"),
        b"P5\n2 2\n4095\n" + bytes(8),
        b"P3 # red\n1 1\n255\n255 0 0\n",
        GIF_START + b"!\xfe\1a\0" * 99 + GIF_END,
        png_of_chunks(99),
        jpeg_of_scans((40, 30), 120),
        jpeg_of_scans((2_000, 1_000), 2),
        tiff_of_tile(512),
    ],
)
def test_such_files_of_a_usual_size_are_pictures(data):
    assert PROCESSOR.pixels(data)[0].shape == (3, 28, 28)


def test_what_looks_like_scans_behind_a_picture_is_none(monkeypatch):
    """As phones write a film behind their JPEG."""
    monkeypatch.setattr(image_processor, "MAX_SCANNED_PIXELS", 12 * 40 * 30)
    assert read_header(jpeg_of_scans((40, 30), 0) + b"\xff\xda" * 99)
    with pytest.raises(RecordError, match="at most 12 scans"):
        read_header(jpeg_of_scans((40, 30), 30))


def test_an_error_shows_nothing_of_what_a_path_may_lead_to():
    """Nobody wants to read in a table what `/proc/self/environ` holds, or a file of passwords."""
    with pytest.raises(RecordError) as caught:
        read_header(b"TOKEN=secret")
    assert "TOKEN" not in str(caught.value)
    assert str(caught.value).endswith("got 12 bytes that are none, or are damaged at the start")
