"""Pictures of a row: the values that a column may have, as the bytes of files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from beam_gemma.errors import RecordError, one_line
from beam_gemma.inputs.image_processor import file_of_pillow
from beam_gemma.inputs.row import ImageFile, Row
from beam_gemma.inputs.template import column_value

Fetch = Callable[[str, str], bytes]
"""Function of a column and of a path or URI in it, which returns the bytes of the file there; what
it raises is the error of a row. `read_image` of `inference/image_files.py` is one, with limits."""
Picture = bytes | str
"""The bytes of a picture's file, or its path or URI."""
KEYS = ("bytes", "path", "uri")
"""Fields of a struct that may hold a picture; the first that is not null does."""


@runtime_checkable
class ImageSettings(Protocol):
    """The settings that say which columns hold pictures, such as `PromptSettings`."""

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Columns with pictures."""

    @property
    def allow_missing_images(self) -> bool:
        """Whether a null stands for no picture."""


def row_images(
    row: Row, settings: ImageSettings, fetch: Fetch | None = None
) -> tuple[ImageFile, ...]:
    """Return all pictures of a row, in the order of its image columns.

    Args:
        row: A mapping of columns, or a prompt, which has no pictures.
        settings: The columns.
        fetch: Gets the bytes of a path or URI; None if rows hold the pictures themselves.

    Raises:
        RecordError: a value is no picture, or none where one is expected.

    Example:
        >>> settings = PromptSettings(prompt="Describe it.", image_columns=("photo",))
        >>> [image] = row_images({"photo": Path("cat.png").read_bytes()}, settings)
        >>> read_header(image.data)
        ImageHeader(kind='PNG', width=640, height=480)
    """
    columns = settings.image_columns
    return tuple(
        image for column in columns for _, image in column_images(row, column, settings, fetch)
    )


def column_images(
    row: Row, column: str, settings: ImageSettings, fetch: Fetch | None = None
) -> Iterator[tuple[str, ImageFile]]:
    """Yield what errors call each picture of one column, and the picture; see `row_images`."""
    value = None if isinstance(row, str) else column_value(row, column)
    pictures = list(_values(value, column))
    for name, picture in pictures or [(f"column {column!r}", None)]:
        if picture is not None:
            yield name, image_file(picture, column, name, fetch)
        elif not settings.allow_missing_images:
            raise RecordError(
                f"{name}: expected a picture, got null; filter such rows out, or allow missing "
                "images"
            )


def image_values(value: Any, column: str) -> tuple[Picture | None, ...]:
    """Return the pictures that a value of a column stands for; None for a null among them.

    A value may be the bytes of a file, a path or URI, a struct {bytes, path} as `datasets` has it,
    a fetched struct {bytes, error}, BigQuery's ObjectRef {uri, version, ...}, a picture of Pillow,
    or a list of any of these. A null is no picture.

    Raises:
        RecordError: it is something else, or holds the error of a fetch.
    """
    return tuple(picture for _, picture in _values(value, column))


def image_value(value: Any, name: str) -> Picture | None:
    """Return the picture that one value stands for; None for a struct of nulls.

    Raises:
        RecordError: it is no picture, or the error of a fetch.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Image.Image):
        return file_of_pillow(value, name)
    if isinstance(value, Mapping) and value.keys() & {*KEYS, "error"}:
        return _of_struct(value, name)
    got = type(value).__name__
    if isinstance(value, Mapping):
        got = f"a struct of {', '.join(map(str, value)) or 'nothing'}"
    raise RecordError(
        f"{name}: expected bytes, a path or URI, a struct {{bytes, path}}, an ObjectRef, or a list "
        f"of these, got {got}"
    )


def image_file(picture: Picture, column: str, name: str, fetch: Fetch | None) -> ImageFile:
    """Return the file of a picture, fetched if it is a path or URI.

    Raises:
        RecordError: there is nothing to fetch it with, or that fails.
    """
    if isinstance(picture, bytes):
        return ImageFile.of(picture)
    if fetch is None:
        raise RecordError(
            f"{name}: expected the bytes of a picture, got a path or URI, {picture[:200]!r}; give "
            "its bytes, or a function that fetches them"
        )
    try:
        return ImageFile.of(fetch(column, picture))
    except RecordError:
        raise
    except Exception as error:  # a storage that cannot be reached may raise anything
        raise RecordError(
            f"{name}: expected a picture at {picture[:200]!r}, got {one_line(error)[:300]}"
        ) from error


def picture_name(columns: Sequence[str], image: int) -> str:
    """Return what errors call a picture of a prompt that is known by its index alone."""
    names = " or ".join(f"column {column!r}" for column in columns) or "messages"
    return f"{names}, picture {image + 1}"


def _values(value: Any, column: str) -> Iterator[tuple[str, Picture | None]]:
    """Yield what errors call each picture of a value, and the picture."""
    name = f"column {column!r}"
    if value is None:
        return
    if not isinstance(value, list | tuple):
        yield name, image_value(value, name)
        return
    for number, item in enumerate(value, 1):
        item_name = f"{name}, picture {number}" if len(value) > 1 else name
        yield item_name, None if item is None else image_value(item, item_name)


def _of_struct(value: Mapping[str, Any], name: str) -> Picture | None:
    if error := value.get("error"):
        # Who fetched a picture has named its column.
        raise RecordError(str(error) if str(error).startswith("column ") else f"{name}: {error}")
    found = next((value[key] for key in KEYS if value.get(key) is not None), None)
    if isinstance(found, bytearray | memoryview):
        return bytes(found)
    if found is None or isinstance(found, bytes | str):
        return found
    raise RecordError(
        f"{name}: expected a struct with bytes, or with a path or URI as text, got "
        f"{type(found).__name__}"
    )
