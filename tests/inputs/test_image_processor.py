"""Pixels of pictures are those of transformers' processors: every mode, kind, turn and size."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from beam_gemma.inputs.image_processor import (
    ImageHeader,
    ImageProcessor,
    crop_boxes,
    file_of_pillow,
    read_header,
)
from tests.doubles.published_processors import GEMMA3_VISION, VISIONS, image_processor

RANDOM = np.random.default_rng(0)
SIZES = [(28, 28), (1, 1), (1, 90), (90, 1), (31, 17), (200, 333)]
"""Widths and heights."""
MODES = {
    "1": "PNG",
    "L": "PNG",
    "LA": "PNG",
    "P": "PNG",
    "RGB": "PNG",
    "RGBA": "PNG",
    "CMYK": "JPEG",
    "LAB": "TIFF",
}
"""Modes of pictures, and a kind of file for each."""
CHANGED = {"HSV": "RGB", "RGBa": "RGBA", "La": "LA", "PA": "RGBA", "RGBX": "RGB", "YCbCr": "RGB"}
"""Modes that no file keeps."""


def noise(mode, size):
    """Return a picture of random values."""
    width, height = size
    colours = Image.fromarray(RANDOM.integers(0, 256, (height, width, 4), dtype=np.uint8))
    if mode in ("RGBA", "LA"):
        return colours.convert(mode)
    if mode == "LAB":
        return Image.merge("LAB", colours.split()[:3])
    return colours.convert("RGB").convert(mode)


def file_of(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def published(data, vision, **options):
    """Return what the published processor makes of a file, which `load_image` turns upright."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    processor = image_processor(vision, **options)
    raw = processor(picture, do_rescale=False, do_normalize=False)["pixel_values"]
    return raw, processor(picture)["pixel_values"]


def check(data, vision, *, pan_and_scan=False):
    """Compare the pixels of a file with the published ones, and return their number."""
    processor = ImageProcessor(vision, pan_and_scan)
    found = processor.pixels(data)
    raw, normalized = published(data, vision, pan_and_scan=pan_and_scan)
    assert len(found) == len(raw) == 1 + processor.num_crops(read_header(data))
    for ours, theirs, values in zip(found, raw, normalized, strict=True):
        assert ours.dtype == theirs.dtype == np.uint8
        assert ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose((ours / 255 - 0.5) / 0.5, values, rtol=0, atol=1e-6)
    return len(found)


@pytest.mark.parametrize("vision", VISIONS.values(), ids=VISIONS)
class TestPixels:
    @pytest.mark.parametrize("mode", MODES)
    def test_of_every_mode_and_size(self, vision, mode):
        for size in SIZES:
            check(file_of(noise(mode, size), MODES[mode]), vision)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
    def test_of_every_kind(self, vision, kind):
        data = file_of(noise("RGB", (31, 17)), kind)
        assert read_header(data) == ImageHeader(kind, 31, 17)
        check(data, vision)

    def test_of_transparent_colours(self, vision):
        """On white, be it an alpha channel, a colour of the palette, or one that is named."""
        palette = noise("P", (31, 17))
        check(file_of(palette, "PNG", transparency=3), vision)
        check(file_of(palette, "PNG", transparency=bytes(range(256))), vision)
        check(file_of(palette, "GIF", transparency=3), vision)
        check(file_of(noise("RGB", (31, 17)), "PNG", transparency=(255, 0, 0)), vision)
        check(file_of(noise("L", (31, 17)), "PNG", transparency=7), vision)
        check(file_of(noise("RGBA", (31, 17)), "WEBP"), vision)
        check(file_of(noise("RGBA", (31, 17)), "TIFF"), vision)
        clear = Image.new("RGBA", (9, 9), (10, 20, 30, 0))
        [pixels] = ImageProcessor(vision).pixels(file_of(clear, "PNG"))
        assert (pixels == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("turn", range(9))
def test_pictures_stand_upright(kind, turn):
    exif = Image.Exif()
    exif[274] = turn
    data = file_of(noise("RGB", (31, 17)), kind, exif=exif)
    check(data, GEMMA3_VISION)
    width, height = (17, 31) if turn >= 5 else (31, 17)
    assert read_header(data) == ImageHeader(kind, width, height)


def test_a_turn_may_stand_behind_the_pixels_of_a_png():
    exif = Image.Exif()
    exif[274] = 6
    data = file_of(noise("RGB", (31, 17)), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[start : start + 4])
    end = data.index(b"IEND") - 4
    late = data[:start] + data[start + length : end] + data[start : start + length] + data[end:]
    assert read_header(late) == ImageHeader("PNG", 17, 31)
    check(late, GEMMA3_VISION)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_of_16_bits_the_upper_8_are_taken(kind):
    """The published processors cut values at 255, which leaves a white picture."""
    values = RANDOM.integers(0, 1 << 16, (40, 50), dtype=np.uint16)
    upper = (values >> 8).astype(np.uint8)
    data = file_of(Image.fromarray(values), kind)
    expected = ImageProcessor(GEMMA3_VISION).pixels(file_of(Image.fromarray(upper), "PNG"))
    np.testing.assert_array_equal(ImageProcessor(GEMMA3_VISION).pixels(data), expected)
    cut, _ = published(data, GEMMA3_VISION)
    assert np.mean(cut) > 250 > np.mean(expected)


def test_a_transparent_grey_of_16_bits_is_white():
    values = np.full((9, 9), 0x1234, np.uint16)
    values[:5] = 0x1235
    data = file_of(Image.fromarray(values), "PNG", transparency=0x1235)
    [pixels] = ImageProcessor(GEMMA3_VISION).pixels(data)
    assert (pixels[:, 0] == 255).all()
    assert (pixels[:, -1] == 0x12).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_the_first_of_several_pictures_is_taken(kind):
    first, second = noise("RGB", (31, 17)), noise("RGB", (31, 17))
    data = file_of(first, kind, save_all=True, append_images=[second])
    assert read_header(data) == ImageHeader(kind, 31, 17)
    check(data, GEMMA3_VISION)


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_crops_are_the_published_ones(width, height):
    check_crops(width, height)


@pytest.mark.parametrize(
    ("size", "num_crops"),
    [
        ((512, 512), 0), ((600, 512), 0), ((616, 512), 2), ((614, 512), 0), ((511, 256), 2),
        ((510, 256), 0), ((512, 255), 0), ((1024, 256), 4), ((900, 300), 3), ((750, 300), 2),
        ((5000, 300), 4), ((300, 5000), 4), ((767, 256), 2), ((768, 256), 3), ((1919, 601), 3),
        ((800, 320), 3), ((1120, 320), 4),
    ],
)  # fmt: skip
def test_number_of_crops_at_the_bounds(size, num_crops):
    assert check_crops(*size) == num_crops
    assert check_crops(*size[::-1]) == num_crops


def check_crops(width, height):
    """Compare crops with the published ones, by their columns and rows, and return their number."""
    rows, columns = np.indices((height, width), sparse=True)
    picture = np.broadcast_to(rows * width + columns, (1, height, width))
    theirs = image_processor(GEMMA3_VISION).pan_and_scan(picture, 256, 4, 1.2)
    ours = crop_boxes(width, height)
    assert len(ours) == len(theirs)
    for (left, top, right, bottom), part in zip(ours, theirs, strict=True):
        assert part.shape == (1, bottom - top, right - left)
        assert part[0, 0, 0] == top * width + left
    return len(ours)


@pytest.mark.parametrize(("size", "number"), [((700, 300), 3), ((300, 901), 4), ((400, 400), 1)])
def test_pixels_of_crops(size, number):
    assert check(file_of(noise("RGB", size), "PNG"), GEMMA3_VISION, pan_and_scan=True) == number
    exif = Image.Exif()
    exif[274] = 8
    turned = file_of(noise("RGB", size), "JPEG", exif=exif)
    assert check(turned, GEMMA3_VISION, pan_and_scan=True) == number


@pytest.mark.parametrize("mode", [*MODES, *CHANGED, "I;16", "I;16B", "F", "I"])
def test_a_picture_of_pillow_keeps_its_values_and_its_mode(mode):
    if mode in ("I", "F", "I;16", "I;16B"):
        values = RANDOM.integers(0, 1 << 15, (17, 31), dtype=np.int32)
        picture = Image.fromarray(values).convert(mode)
    elif mode in CHANGED:
        before = {"La": "LA", "PA": "P", "RGBa": "RGBA"}.get(mode, "RGB")
        picture = noise(before, (31, 17)).convert(mode)
    else:
        picture = noise(mode, (31, 17))
    written = Image.open(io.BytesIO(file_of_pillow(picture)))
    assert written.mode == {**CHANGED, "I;16B": "I;16"}.get(mode, mode)
    values = picture.convert(written.mode) if mode in CHANGED else picture
    np.testing.assert_array_equal(np.asarray(written), np.asarray(values))


def test_a_picture_of_pillow_stands_upright():
    exif = Image.Exif()
    exif[274] = 6
    data = file_of(noise("RGB", (31, 17)), "JPEG", exif=exif)
    picture = Image.open(io.BytesIO(data))
    processor = ImageProcessor(GEMMA3_VISION)
    np.testing.assert_array_equal(processor.pixels(file_of_pillow(picture)), processor.pixels(data))


def test_heic_is_read_where_its_package_is_installed():
    pytest.importorskip("pillow_heif")
    data = file_of(noise("RGB", (31, 17)), "HEIF")
    assert read_header(data) == ImageHeader("HEIF", 31, 17)
    check(data, GEMMA3_VISION)
