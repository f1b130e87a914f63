"""Pictures to pixels, as transformers' processors make them of a file.

Gemma 3 has `Gemma3ImageProcessorPil`, PaliGemma `SiglipImageProcessorPil` (transformers 5.23). Both
convert a picture to RGB, on white where it is transparent, and resize it with Pillow; a file's
orientation is applied before, as in `image_utils.load_image`. In one point this module does
otherwise: of a grey value with 16 bits it takes the upper 8, where they cut at 255, so that such a
picture would be white. Normalization is in the graph.
"""

import ctypes
import io
import math
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

# A plugin reads one kind of file, and Pillow knows it once it is imported.
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
    _imaging,
)

from beam_gemma.errors import RecordError, one_line
from beam_gemma.model.vision_config import (
    MAX_NUM_CROPS,
    MIN_CROP_SIZE,
    MIN_RATIO,
    VisionConfig,
)

_PLUGINS: tuple[Any, ...] = (
    PngImagePlugin.PngImageFile, JpegImagePlugin.JpegImageFile, WebPImagePlugin.WebPImageFile,
    GifImagePlugin.GifImageFile, BmpImagePlugin.BmpImageFile, TiffImagePlugin.TiffImageFile,
    PpmImagePlugin.PpmImageFile, AvifImagePlugin.AvifImageFile,
)  # fmt: skip
KINDS = [plugin.format for plugin in _PLUGINS]
"""Kinds of files that are opened, by Pillow's names; no other plugin sees the bytes of a row."""
with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    KINDS.append("HEIF")

with suppress(AttributeError, OSError):
    # The library of TIFF files would write a line of its own about each that is damaged.
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
    ctypes.CDLL(_imaging.__file__).TIFFSetWarningHandler(None)

MAX_PIXELS = 100_000_000
"""Most pixels of a picture; it takes up to 16 bytes of memory for each while it is decoded."""
MAX_SLOW_PIXELS = 2_000_000
"""Most pixels of a picture of a kind that Pillow decodes in Python, such as a BMP with run lengths,
which takes up to 2 microseconds for each, and holds Python's lock meanwhile."""
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
"""Most pixels of a JPEG times its scans: each goes over all pixels, and may be a few bytes."""
MAX_PARTS = 10_000
"""Most reads of a header; of notes in a GIF, Pillow copies all before for each further block."""
MAX_TILE_PIXELS = 16_000_000
"""Most pixels of a tile in a TIFF, which may be larger than the picture."""
_TILE_SIDES = (322, 323)
"""TIFF tags of the width and height of tiles."""
MAX_REMARKS = 1_000
"""Most comments of a PPM written as text; for each, Pillow copies what is behind it."""
ORIENTATION = 274
"""EXIF tag of how a picture is turned."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")
"""Modes of Pillow's pictures that a PNG file keeps."""
_FILE_MODES = {"HSV": "RGB", "La": "LA", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA",
               "YCbCr": "RGB"}  # fmt: skip
"""Modes that no file keeps, and those that take their place."""
_PNG_ORIENTATION = re.compile(rb"eXIf|Raw profile type|XML:com\.adobe\.xmp")
"""Names of PNG's chunks that may hold an orientation; they may stand behind the pixels."""
_JPEG_MARKER = re.compile(rb"\xff+([\x02-\xcf\xd8-\xfe])")
"""A marker of a JPEG that has a length, or ends the picture; those within a scan have none."""
HEIC = rb".{4}ftyp(hei|hev|mif1|msf1)"
_FOREIGN = {
    rb"%PDF": "a PDF, which is a document",
    rb"%!PS|\xc5\xd0\xd3\xc6": "PostScript, which is a program",
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg": "an SVG drawing",
    rb"\s*<(!doctype )?html": "a page of HTML",
    HEIC: "a HEIC picture, which needs pip install pillow-heif",
    rb"\0\0\0\x0cjP|\xff\x4f\xff\x51": "JPEG 2000",
    rb"8BPS": "a Photoshop document",
    rb"version https://git-lfs": "a pointer of Git LFS, without the file",
}
"""What a file may be that is not opened, by how it begins."""
if "HEIF" in KINDS:
    del _FOREIGN[HEIC]


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Kind and size of a picture, from the header of its file."""

    kind: str
    """One of `KINDS`, or `MPO`, a JPEG with more pictures behind the first."""
    width: int
    """Pixels from left to right, after the turn that the file asks for."""
    height: int
    """Pixels from top to bottom."""


class ImageProcessor:
    """Makes what a model's tower takes of the files of pictures; for any number of threads.

    Args:
        vision: Size and filter of the model's pictures.
        pan_and_scan: Whether to add crops of pictures that are much wider than high, or higher
            than wide.
        image_tokens: Most tokens of a picture, for models that take several sizes; None for the
            model's default.
        max_pixels: Most pixels of a picture, which are checked before it is decoded.

    Example:
        >>> processor = ImageProcessor(artifact.vision, pan_and_scan=True)
        >>> header = read_header(data)
        >>> header
        ImageHeader(kind='JPEG', width=1920, height=600)
        >>> processor.num_crops(header)
        3
        >>> [pixels.shape for pixels in processor.pixels(data)]
        [(3, 896, 896), (3, 896, 896), (3, 896, 896), (3, 896, 896)]
    """

    def __init__(
        self,
        vision: VisionConfig,
        pan_and_scan: bool = False,
        *,
        image_tokens: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._vision = vision
        self._max_tokens = image_tokens or vision.num_image_tokens
        self._filter = Image.Resampling[vision.resample.upper()]
        self._pan_and_scan = pan_and_scan
        self._max_pixels = max_pixels

    def num_tokens(self, header: ImageHeader) -> int:
        """Return how many tokens a picture takes, and each of its crops.

        Raises:
            RecordError: no size of the model suits its sides.
        """
        return self._vision.tokens_of(*self._sides(header.height, header.width))

    def num_crops(self, header: ImageHeader) -> int:
        """Return how many crops a picture has beside the whole."""
        return len(self._crops(header.width, header.height))

    def pixels(self, data: bytes, name: str = "picture") -> list[np.ndarray]:
        """Return the values [3, I, I] of a picture in uint8, then those of each crop.

        Args:
            data: The bytes of its file.
            name: What errors call the picture.

        Raises:
            RecordError: the file is no picture, is damaged, or is too large.
        """
        with _faults(name, "a picture that can be decoded"):
            picture = _rgb(_opened(data, self._max_pixels, name), name)
            crops = [picture.crop(box) for box in self._crops(*picture.size)]
            return [self._resized(part) for part in (picture, *crops)]

    def _crops(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        return crop_boxes(width, height) if self._pan_and_scan else []

    def _resized(self, picture: Image.Image) -> np.ndarray:
        height, width = self._sides(picture.height, picture.width)
        values = np.asarray(picture.resize((width, height), self._filter))
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that a picture is given."""
        if not self._vision.image_step:
            return self._vision.image_size, self._vision.image_size
        return kept_ratio(height, width, self._vision.image_step, self._max_tokens)


def read_header(data: bytes, max_pixels: int = MAX_PIXELS, *, name: str = "picture") -> ImageHeader:
    """Return the header of a picture's file without decoding the picture.

    Args:
        data: The bytes of the file.
        max_pixels: Most pixels that are taken.
        name: What errors call the picture.

    Raises:
        RecordError: the file is no picture of `KINDS`, or is too large.
    """
    with _faults(name, "a picture"):
        picture = _opened(data, max_pixels, name)
        width, height = picture.size
        if _orientation_before_decoding(picture, data) >= 5:
            width, height = height, width
        return ImageHeader(picture.format or "", width, height)


def kept_ratio(height: int, width: int, step: int, max_tokens: int) -> tuple[int, int]:
    """Return the largest height and width of a picture's ratio with at most `max_tokens` squares.

    Both are multiples of `step`, the side of a square, so that the ratio is kept up to that. Of a
    side that would be 0, one square is left.

    Source: `get_aspect_ratio_preserving_size` of transformers' `Gemma4ImageProcessorPil`.
    """
    factor = math.sqrt(max_tokens * step**2 / (height * width))
    rows, columns = (math.floor(factor * side / step) for side in (height, width))
    if not rows:
        rows, columns = 1, min(width // height, max_tokens)
    elif not columns:
        rows, columns = min(height // width, max_tokens), 1
    return rows * step, columns * step


def crop_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Return the crops of pan and scan as (left, top, right, bottom), in the model's order.

    Source: `pan_and_scan` of transformers' `Gemma3ImageProcessor`.
    """
    longer, shorter = max(width, height), min(width, height)
    if longer / shorter < MIN_RATIO:
        return []
    number = min(longer // MIN_CROP_SIZE, int(longer / shorter + 0.5))
    number = min(max(2, number), MAX_NUM_CROPS)
    step = -(-longer // number)
    if min(step, shorter) < MIN_CROP_SIZE:
        return []
    spans = [(start, min(start + step, longer)) for start in range(0, number * step, step)]
    if width >= height:
        return [(start, 0, end, height) for start, end in spans]
    return [(0, start, width, end) for start, end in spans]


def file_of_pillow(picture: Image.Image, name: str = "picture") -> bytes:
    """Return a picture of Pillow as the bytes of a file without loss, in its own mode.

    Raises:
        RecordError: its file is damaged.
    """
    with _faults(name, "a picture that can be decoded"):
        picture = _upright(picture)
        picture = picture.convert(_FILE_MODES.get(picture.mode, picture.mode))
        kind = "PNG" if picture.mode in _PNG_MODES else "TIFF"
        file = io.BytesIO()
        picture.save(file, kind, **({"compress_level": 1} if kind == "PNG" else {}))
        return file.getvalue()


def _opened(data: bytes, max_pixels: int, name: str) -> Image.Image:
    """Return a picture that is not decoded yet; a file of several has its first."""
    if not data:
        raise RecordError(f"{name}: expected the file of a picture, got zero bytes")
    try:
        picture = Image.open(file := _File(data, name), formats=KINDS)
        file.num_left = sys.maxsize
    except UnidentifiedImageError as error:
        raise RecordError(
            f"{name}: expected a picture in one of {', '.join(KINDS)}, got {_described(data)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, max_pixels, "far more") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise _too_large(name, max_pixels, f"{width:,} x {height:,}")
    if not width * height:
        raise RecordError(f"{name}: expected a picture, got one of {width} x {height} pixels")
    _check_time(picture, data, name)
    return picture


class _File(io.BytesIO):
    """A file whose header is read in a limited number of parts."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.num_left = MAX_PARTS
        self._name = name

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes.

        Raises:
            RecordError: the header has too many parts.
        """
        self.num_left -= 1
        if self.num_left < 0:
            raise RecordError(
                f"{self._name}: expected a picture whose header has at most {MAX_PARTS:,} parts, "
                "got more; save it without notes"
            )
        return super().read(size)


def _check_time(picture: Image.Image, data: bytes, name: str) -> None:
    """Refuse a file that would be decoded for minutes, though it is small."""
    num_pixels = picture.width * picture.height
    codecs = {tile[0] for tile in getattr(picture, "tile", ())}
    if num_pixels > MAX_SLOW_PIXELS and codecs & Image.DECODERS.keys():
        raise RecordError(
            f"{name}: expected at most {MAX_SLOW_PIXELS:,} pixels of a {picture.format} in this "
            f"form, got {picture.width:,} x {picture.height:,}; save it as PNG"
        )
    if "ppm_plain" in codecs and data.count(b"#") > MAX_REMARKS:
        raise RecordError(f"{name}: expected at most {MAX_REMARKS:,} comments, got more")
    sides = [getattr(picture, "tag_v2", {}).get(tag, 0) for tag in _TILE_SIDES]
    if all(isinstance(side, int) for side in sides) and math.prod(sides) > MAX_TILE_PIXELS:
        raise RecordError(
            f"{name}: expected tiles of at most {MAX_TILE_PIXELS:,} pixels, got {sides[0]:,} x "
            f"{sides[1]:,}; save it as PNG"
        )
    most = MAX_SCANNED_PIXELS // num_pixels
    # The first count is fast, and also of what only looks like a scan.
    if "jpeg" in codecs and data.count(b"\xff\xda") > most and _has_more_scans(data, most):
        raise RecordError(
            f"{name}: expected a JPEG of {picture.width:,} x {picture.height:,} pixels in at most "
            f"{most} scans, got more; save it anew"
        )


def _has_more_scans(data: bytes, most: int) -> bool:
    """Return whether the first picture of a JPEG has more than some number of scans."""
    at, number = 2, 0
    while number <= most and (marker := _JPEG_MARKER.search(data, at)) and marker[1] != b"\xd9":
        number += marker[1] == b"\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return number > most


def _too_large(name: str, max_pixels: int, got: str) -> RecordError:
    return RecordError(
        f"{name}: expected a picture of at most {max_pixels:,} pixels, got {got}; make it smaller"
    )


def _described(data: bytes) -> str:
    """Return what bytes are that are no picture which this module opens."""
    for beginning, what in _FOREIGN.items():
        if re.match(beginning, data[:1000], re.DOTALL | re.IGNORECASE):
            return what
    # Of what else a path may lead to, as a file with a password, an error shows nothing.
    return f"{len(data):,} bytes that are none, or are damaged at the start"


def _rgb(picture: Image.Image, name: str) -> Image.Image:
    """Return a picture in RGB: upright, and on white where it is transparent."""
    picture = _of_eight_bits(_upright(picture), name)
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()
    turn = _TURNS.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    """Return how a picture's file says that it is turned; 1 if that cannot be read."""
    try:
        found = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged note beside the picture may raise anything, and harms no pixel
        return 1
    return found if found in _TURNS else 1


def _orientation_before_decoding(picture: Image.Image, data: bytes) -> int:
    if picture.format == "TIFF":  # its size is that of the turned picture
        return 1
    # Pillow decodes a PNG to look for notes behind the pixels, which few files have.
    if picture.format == "PNG" and not _PNG_ORIENTATION.search(data):
        return 1
    return _orientation(picture)


def _of_eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """Return a picture whose values have 8 bits, the upper ones of 16."""
    # Of PPM files, Pillow gives numbers from 0 to 65,535 as I.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        values = np.asarray(picture)
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        clear = picture.info.get("transparency")
        if not isinstance(clear, int):
            return grey
        return Image.merge("LA", (grey, Image.fromarray(np.uint8(255) * (values != clear))))
    if picture.mode in ("I", "F"):
        raise RecordError(
            f"{name}: expected values of 8 or 16 bits, got "
            f"{'fractions' if picture.mode == 'F' else 'whole numbers'} of 32 bits, whose black "
            "and white are unknown; save it with 8 or 16 bits"
        )
    return picture


@contextmanager
def _faults(name: str, expected: str) -> Iterator[None]:
    """Context manager that makes whatever Pillow raises of a damaged file an error of its row."""
    try:
        with _QUIET:
            yield
    except RecordError:
        raise
    except Exception as error:  # decoders of damaged files raise anything, as SyntaxError
        raise RecordError(
            f"{name}: expected {expected}, got a damaged file: {one_line(error)[:300]}"
        ) from error


class _Quiet:
    """Context manager in which Pillow's own warnings are ignored, for threads at the same time.

    `warnings.catch_warnings` is not for threads: one that ends restores filters of another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._filter: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._within += 1
            if self._within == 1:
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._filter = warnings.filters[0]

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                with suppress(ValueError):  # whoever replaced the filters has removed it
                    list.remove(warnings.filters, self._filter)  # type: ignore[arg-type]


_QUIET = _Quiet()
