"""What is no picture is the error of its row: one sentence with column and cause, nothing else."""

import io
import itertools
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from beam_gemma.errors import RecordError
from beam_gemma.inputs.image_processor import (
    KINDS,
    MAX_PIXELS,
    ImageProcessor,
    file_of_pillow,
    read_header,
)
from beam_gemma.inputs.images import row_images
from beam_gemma.inputs.media_values import place_name
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.prompt_settings import PromptSettings
from beam_gemma.inputs.row import MediaFile
from tests.doubles.nested import nested
from tests.doubles.published_processors import GEMMA3_VISION, our_tokenizer

TOKENIZER = our_tokenizer("gemma3")
PROCESSOR = ImageProcessor(GEMMA3_VISION)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def file_of(kind, picture=NOISE, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *chunks, pixels=b""):
    """Return a PNG file whose header says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(pixels))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunks)
        + idat
        + chunk(b"IEND", b"")
    )


def gif(num_frames, *, width=4):
    """Return a GIF file in which every frame but the first is damaged."""
    start = file_of("GIF", Image.new("P", (width, width)))
    end = start.rindex(b";")
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, width, 0) + b"\x02\x03\xff\xff\xff\x00"
    return start[:end] + frame * (num_frames - 1) + b";"


def late(kind, share):
    """Return a file that ends early."""
    data = file_of(kind)
    return data[: int(len(data) * share)]


def damaged_strip(compression):
    """Return a TIFF file with other bytes in place of its pixels, which come first."""
    data = file_of("TIFF", compression=compression)
    return data[:8] + b"\xff" * 600 + data[608:]


def prompt_of(value):
    encoder = PromptEncoder(
        TOKENIZER,
        PromptSettings(prompt="say", image_columns=("photo",)),
        chat_template=None,
        max_tokens=100,
        vision=GEMMA3_VISION,
    )
    return encoder({"photo": value})


REFUSED = {
    "zero bytes": (b"", "got zero bytes"),
    "one byte": (b"x", "1 bytes that are none"),
    "text": (b"hello, this is no picture", "bytes that are none"),
    "zeros": (bytes(1000), "bytes that are none"),
    "a signature alone": (b"\x89PNG\r\n\x1a\n", "got"),
    "the start of a JPEG": (file_of("JPEG")[:20], "got"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="x"></svg>', "an SVG drawing"),
    "PDF": (b"%PDF-1.7\n", "a PDF"),
    "PostScript": (file_of("EPS"), "PostScript"),
    "HTML": (b"<!DOCTYPE html><html>", "a page of HTML"),
    "Photoshop": (b"8BPS" + bytes(30), "Photoshop"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "JPEG 2000": (file_of("JPEG2000"), "JPEG 2000"),
    "ICO": (file_of("ICO"), "bytes that are none"),
    "TGA": (file_of("TGA"), "bytes that are none"),
    "a bomb of a header": (png(20_000, 20_000), r"at most 100,000,000 pixels, got far more"),
    "more pixels": (png(10_001, 10_000), r"100,000,000 pixels, got 10,001 x 10,000; make"),
    "a bomb of text": (
        png(2, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 22)))),
        "damaged file",
    ),
    "no width": (png(0, 5), "got"),
    "a GIF of no width": (gif(1).replace(b"\x04\x00\x04\x00", bytes(4)), "got"),
    "a broken TIFF": (b"II*\0" + b"\xff" * 40, "got"),
    "a broken AVIF": (file_of("AVIF")[:200], "got"),
    "a broken WebP": (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(30), "got"),
    "an integer": (7, "expected bytes, a path or URI.*got int"),
    "a float": (0.5, "got float"),
    "a truth": (True, "got bool"),
    "a struct of others": ({"height": 1, "width": 2}, "got a struct of height, width"),
    "an empty struct": ({}, "got a struct of nothing"),
    "a struct of wrong types": ({"bytes": 7, "path": None}, "a struct with bytes.*got int"),
    "a list within a list": ([[file_of("PNG")]], "got list"),
    "many lists": (nested(100_000), "got list"),
    "a failed fetch": ({"bytes": None, "error": "no permission"}, "no permission"),
    "a path": ("photos/1.png", "got a path or URI, 'photos/1.png'; give its bytes"),
    "an ObjectRef": (
        {"uri": "gs://b/1.png", "version": "1", "authorizer": "a", "details": None},
        "got a path or URI, 'gs://b/1.png'",
    ),
    "a null in a list": ([file_of("PNG"), None], "picture 2: expected a picture, got null"),
    "a bad one in a list": ([file_of("PNG"), b"x"], "picture 2: expected a picture in one of"),
}  # fmt: skip
"""Values that a prompt is not made of, and what their error says."""
DAMAGED = {
    "truncated PNG": late("PNG", 0.7),
    "truncated JPEG": late("JPEG", 0.7),
    "truncated WebP": late("WEBP", 0.7),
    "truncated GIF": late("GIF", 0.7),
    "truncated BMP": late("BMP", 0.7),
    "truncated PPM": late("PPM", 0.7),
    "truncated TIFF": late("TIFF", 0.7),
    "no pixels": png(40, 40),
    "too few pixels": png(40, 40, pixels=bytes(100)),
    "a wrong sum": file_of("PNG").replace(b"IDAT", b"IDAT\xff", 1),
    "a GIF of nothing but a header": gif(1)[:-8],
    "a TIFF of fractions": file_of("TIFF", Image.new("F", (4, 4))),
    "a TIFF of 32 bits": file_of("TIFF", Image.new("I", (4, 4))),
}
"""Files whose headers may be read; the error comes when they are decoded."""


@pytest.fixture(autouse=True)
def _nothing_else(capfd):
    """Fail on anything but the error: warnings, and output of the libraries."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not caught
    assert capfd.readouterr() == ("", "")


def check_sentence(error, name="column 'photo'"):
    message = str(error)
    assert message.startswith(name)
    assert "expected" in message
    assert "got" in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_picture_is_the_error_of_its_row(kind):
    value, match = REFUSED[kind]
    with pytest.raises(RecordError, match=match) as caught:
        prompt_of(value)
    if kind != "a failed fetch":
        check_sentence(caught.value)
    assert str(caught.value).startswith("column 'photo'")
    if isinstance(value, bytes):
        with pytest.raises(RecordError) as caught:
            PROCESSOR.pixels(value, "column 'photo'")
        check_sentence(caught.value)


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_cannot_be_decoded_is_the_error_of_its_row(kind):
    with pytest.raises(RecordError) as caught:
        PROCESSOR.pixels(DAMAGED[kind], "column 'photo'")
    check_sentence(caught.value)


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "tiff_adobe_deflate"])
def test_a_damaged_strip_of_a_tiff_is_the_error_of_its_row(compression, capfd):
    with pytest.raises(RecordError) as caught:
        PROCESSOR.pixels(damaged_strip(compression), "column 'photo'")
    check_sentence(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_any_damage_gives_pixels_or_an_error(kind):
    """Bytes flipped and files cut at random: decoders raise all kinds of exceptions."""
    random = np.random.default_rng(1)
    data = np.frombuffer(file_of(kind, NOISE.resize((12, 9))), np.uint8)
    for _ in range(300):
        damaged = data.copy()
        places = random.integers(0, min(len(data), 400), 6)
        damaged[places] = random.integers(0, 256, 6)
        cut = damaged[: random.integers(1, len(data) + 1)].tobytes()
        for use in (read_header, PROCESSOR.pixels):
            try:
                use(cut)
            except RecordError as error:
                check_sentence(error, "picture: ")


def test_only_kinds_that_are_listed_are_opened():
    """Others may run programs, as that of PostScript, or are seldom tried with hostile files."""
    assert set(KINDS) - {"HEIF"} == {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"}
    for kind in ("EPS", "ICO", "PCX", "SGI", "DDS", "JPEG2000", "IM", "TGA", "PDF"):
        with pytest.raises(RecordError, match="expected a picture in one of PNG"):
            read_header(file_of(kind))


def test_a_limit_of_pixels_holds_before_decoding():
    start = time.process_time()
    for use in (read_header, PROCESSOR.pixels):
        for size in ((30_000, 30_000), (10_001, 10_000), (1_000_000, 101)):
            with pytest.raises(RecordError, match="at most 100,000,000 pixels"):
                use(png(*size))
    assert time.process_time() - start < 1
    assert MAX_PIXELS == 100_000_000
    data = file_of("PNG")
    assert read_header(data, 4800).width == 80
    with pytest.raises(RecordError, match="at most 4,799 pixels, got 80 x 60"):
        read_header(data, 4799)
    with pytest.raises(RecordError, match="at most 4,799 pixels, got 80 x 60"):
        ImageProcessor(GEMMA3_VISION, max_pixels=4799).pixels(data)
    # Pillow would warn of this one, which is within our limit.
    assert read_header(png(10_000, 9_500)).height == 9_500


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_a_line_is_a_picture(size):
    start = time.process_time()
    [pixels] = PROCESSOR.pixels(file_of("PNG", Image.new("RGB", size, "red")))
    assert (pixels[0] == 255).all()
    assert time.process_time() - start < 1


def test_of_a_long_gif_only_the_first_frame_is_read():
    data = gif(10_000)
    start = time.process_time()
    assert prompt_of(data).files == (MediaFile(data),)
    assert PROCESSOR.pixels(data)[0].shape == (3, 28, 28)
    assert time.process_time() - start < 0.5


def test_notes_that_are_damaged_harm_no_pixel():
    expected = PROCESSOR.pixels(file_of("JPEG"))
    exif = Image.Exif()
    exif[274] = 6
    whole = exif.tobytes()
    broken = [
        b"Exif\0\0" + b"\xff" * 30, whole[:9], whole[:-9], whole[:-1] + b"\xff" * 9,
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\xff\xff" * 20, b"Exif\0\0",
    ]  # fmt: skip
    for note in broken:
        data = file_of("JPEG", exif=note)
        assert read_header(data).kind == "JPEG"
        found = PROCESSOR.pixels(data)
        assert np.array_equal(found, expected) or note in (whole[:-9], whole[:-1] + b"\xff" * 9)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        plain = PROCESSOR.pixels(file_of(kind))
        for profile in (b"\xff" * 99, b"no profile"):
            np.testing.assert_array_equal(
                PROCESSOR.pixels(file_of(kind, icc_profile=profile)), plain
            )


def test_texts_of_a_png_are_read_within_limits():
    texts = PngImagePlugin.PngInfo()
    for number in range(50):
        texts.add_text(f"k{number}", "x" * 1000, zip=True)
    data = file_of("PNG", pnginfo=texts)
    np.testing.assert_array_equal(PROCESSOR.pixels(data), PROCESSOR.pixels(file_of("PNG")))
    many = [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) for _ in range(80)]
    with pytest.raises(RecordError, match="damaged file: ValueError"):
        read_header(png(2, 2, *many))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_values_of_every_kind_are_the_same_picture(kind):
    data = file_of(kind)
    values = [
        data, bytearray(data), memoryview(data), {"bytes": data, "path": "ignored.png"},
        {"bytes": data, "error": None}, {"bytes": data, "uri": None},
    ]  # fmt: skip
    settings = PromptSettings(prompt="say", image_columns=("photo",))
    for value in [*values, values, tuple(values)]:
        found = row_images({"photo": value}, settings)
        number = len(values) if isinstance(value, list | tuple) else 1
        assert found == (MediaFile(data),) * number
        assert all(type(image.data) is bytes for image in found)


def test_pictures_of_pillow_are_taken_and_damaged_ones_are_errors():
    [image] = row_images({"photo": NOISE}, PromptSettings(prompt="say", image_columns=("photo",)))
    np.testing.assert_array_equal(PROCESSOR.pixels(image.data), PROCESSOR.pixels(file_of("PNG")))
    for data in (late("PNG", 0.7), late("JPEG", 0.5)):
        with pytest.raises(RecordError) as caught:
            prompt_of(Image.open(io.BytesIO(data)))
        check_sentence(caught.value)
    closed = Image.open(io.BytesIO(file_of("PNG")))
    closed.close()
    with pytest.raises(RecordError, match="closed"):
        file_of_pillow(closed)


def test_pictures_keep_the_order_of_columns():
    settings = PromptSettings(prompt="{b}{a}", image_columns=("a", "b"), allow_missing_images=True)
    one, two, three = (file_of("PNG", NOISE.resize((n, n))) for n in (1, 2, 3))
    found = row_images({"b": [three], "a": [one, None, two]}, settings)
    assert [image.data for image in found] == [one, two, three]
    assert row_images({"a": None, "b": []}, settings) == ()
    assert place_name(("a", "b"), "picture", 1) == "column 'a' or column 'b', picture 2"
    assert place_name(("a",), "picture", None) == "column 'a'"
    assert place_name((), "sound", 0) == "messages, sound 1"


def test_no_file_of_this_machine_is_read(tmp_path: Path):
    """A path is a text and nothing else, whatever stands there."""
    place = tmp_path / "x.png"
    place.write_bytes(file_of("PNG"))
    for value in (str(place), f"file://{place}", {"bytes": None, "path": str(place)}):
        with pytest.raises(RecordError, match="expected the bytes of a picture"):
            prompt_of(value)


def test_threads_decode_at_the_same_time_and_leave_filters_as_they_were():
    before = list(warnings.filters)
    files = [file_of("JPEG"), late("PNG", 0.7), gif(50), png(10_001, 10_000), file_of("TIFF")]
    expected = list(map(outcome, files))
    found: list[object] = []

    def work(number):
        indices = itertools.islice(itertools.cycle(range(len(files))), number, number + 40)
        found.extend([outcome(files[index]) == expected[index] for index in indices])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 320
    assert list(warnings.filters) == before


def outcome(data):
    try:
        return [pixels.tobytes() for pixels in PROCESSOR.pixels(data)]
    except RecordError as error:
        return str(error)
