"""Values of columns with pictures or sounds: bytes, paths, URIs, structs, and lists of these."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from beam_gemma.errors import RecordError
from beam_gemma.inputs.row import Row
from beam_gemma.inputs.template import column_value

MediaSource = bytes | str
"""The bytes of a file, or its path or URI."""
STRUCT_KEYS = ("bytes", "path", "uri")
"""Fields of a struct that may hold a file; the first that is not null does."""


def column_values(
    row: Row, column: str, what: str, value_of: Callable[[Any, str], MediaSource | None]
) -> Iterator[tuple[str, MediaSource | None]]:
    """Yield what errors call each picture or sound of a column, and what it stands for.

    Args:
        row: A mapping of columns, or a prompt, which has none.
        column: The column.
        what: What errors call one of them, such as `picture`.
        value_of: Returns what one value stands for.

    Raises:
        RecordError: the row has no such column, or a value is none of them.
    """
    name = f"column {column!r}"
    value = None if isinstance(row, str) else column_value(row, column)
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        yield name, None
    for number, item in enumerate(values, 1):
        item_name = f"{name}, {what} {number}" if len(values) > 1 else name
        yield item_name, None if item is None else value_of(item, item_name)


def file_value(value: Any, name: str, *others: str) -> MediaSource | None:
    """Return the file that one value stands for; None for a struct of nulls.

    Args:
        value: The bytes of a file, a path or URI, a struct {bytes, path} as `datasets` has it, a
            struct {bytes, error} of a file that was read, or BigQuery's ObjectRef {uri, version,
            ...}.
        name: What errors call it.
        others: Other forms that the caller takes, for errors.

    Raises:
        RecordError: the value is something else, or holds the error that reading a file met.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and value.keys() & {*STRUCT_KEYS, "error"}:
        return _of_struct(value, name)
    got = type(value).__name__
    if isinstance(value, Mapping):
        got = f"a struct of {', '.join(map(str, value)) or 'nothing'}"
    forms = ("bytes", "a path or URI", "a struct {bytes, path}", *others, "an ObjectRef")
    raise RecordError(f"{name}: expected {', '.join(forms)}, or a list of these, got {got}")


def place_name(columns: Sequence[str], what: str, index: int | None) -> str:
    """Return what errors call a picture or sound that is known by its place in a prompt alone.

    Args:
        columns: The columns that it may be from; none if it is from a conversation.
        what: What it is, such as `picture`.
        index: Its index among those of the prompt; None if it is the only one.
    """
    names = " or ".join(f"column {column!r}" for column in columns) or "messages"
    return names if index is None else f"{names}, {what} {index + 1}"


def _of_struct(value: Mapping[str, Any], name: str) -> MediaSource | None:
    if error := value.get("error"):
        raise RecordError(f"{name}: {error}")
    found = next((value[key] for key in STRUCT_KEYS if value.get(key) is not None), None)
    if isinstance(found, bytearray | memoryview):
        return bytes(found)
    if found is None or isinstance(found, bytes | str):
        return found
    raise RecordError(
        f"{name}: expected a struct with bytes, or with a path or URI as text, got "
        f"{type(found).__name__}"
    )
