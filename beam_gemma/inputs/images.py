"""Pictures of a row: the values that a column may have, as the bytes of files.

Rows may name files by path or URI. `inference/media_files.py` reads those files and puts their
bytes into the row before this module gets it.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from beam_gemma.errors import RecordError
from beam_gemma.inputs.image_processor import file_of_pillow
from beam_gemma.inputs.media_values import MediaSource, column_values, file_value
from beam_gemma.inputs.row import MediaFile, Row


@runtime_checkable
class ImageSettings(Protocol):
    """The settings of pictures in rows, such as `PromptSettings`."""

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Columns with pictures."""

    @property
    def allow_missing_images(self) -> bool:
        """True if a null means that the row has no picture; otherwise the row is an error."""

    @property
    def image_tokens(self) -> int | None:
        """Most tokens of a picture, for models that take several sizes; None for the default."""

    @property
    def pan_and_scan(self) -> bool:
        """True to add crops of pictures that are much wider than high, or higher than wide."""


def row_images(row: Row, settings: ImageSettings) -> tuple[MediaFile, ...]:
    """Return all pictures of a row, in the order of its image columns.

    Args:
        row: A mapping of columns, or a prompt, which has no pictures.
        settings: The columns.

    Raises:
        RecordError: a value is no picture, names a file that was not read, or is null where a
            picture is expected.

    Example:
        >>> settings = PromptSettings(prompt="Describe it.", image_columns=("photo",))
        >>> [image] = row_images({"photo": Path("cat.png").read_bytes()}, settings)
        >>> read_header(image.data)
        ImageHeader(kind='PNG', width=640, height=480)
    """
    columns = settings.image_columns
    return tuple(image for column in columns for _, image in column_images(row, column, settings))


def column_images(
    row: Row, column: str, settings: ImageSettings
) -> Iterator[tuple[str, MediaFile]]:
    """Yield what errors call each picture of one column, and the picture; see `row_images`."""
    for name, picture in column_values(row, column, "picture", image_value):
        if picture is not None:
            yield name, image_file(picture, name)
        elif not settings.allow_missing_images:
            raise RecordError(
                f"{name}: expected a picture, got null; filter such rows out, or allow missing "
                "images"
            )


def image_value(value: Any, name: str) -> MediaSource | None:
    """Return the picture that one value stands for; None for a struct of nulls.

    Args:
        value: The bytes of a file, a path or URI, a struct {bytes, path} as `datasets` has it, a
            struct {bytes, error} of a file that was read, BigQuery's ObjectRef {uri, version, ...},
            or a picture of Pillow.
        name: What errors call the picture.

    Raises:
        RecordError: the value is something else, or holds the error that reading a file met.
    """
    if isinstance(value, Image.Image):
        return file_of_pillow(value, name)
    return file_value(value, name)


def image_file(source: MediaSource, name: str) -> MediaFile:
    """Return the file of a picture whose bytes the row has.

    Raises:
        RecordError: the row has a path or URI, whose file was not read.
    """
    if isinstance(source, bytes):
        return MediaFile(source)
    raise RecordError(
        f"{name}: expected the bytes of a picture, got a path or URI, {source[:200]!r}; give its "
        "bytes"
    )
