"""Checks of a table's columns against a task's settings, before a job starts."""

import pyarrow as pa

from beam_gemma.errors import OptionsError, nearest
from beam_gemma.inputs.row import ColumnUse
from beam_gemma.tasks.interface import Settings


def check_columns(settings: Settings, schema: pa.Schema) -> None:
    """Check that a table's columns fit the settings of a task.

    Raises:
        OptionsError: a column is missing, repeated, of a wrong type, or named like a result column.
    """
    for column, use in settings.columns.items():
        if column not in schema.names:
            raise OptionsError(
                f"column {column!r}: expected in the table, got {', '.join(schema.names)}"
                f"{nearest(column, schema.names)}"
            )
        if schema.names.count(column) > 1:
            raise OptionsError(f"column {column!r}: expected once in the table, got it twice")
        _check_type(column, use, schema.field(column).type)
    for name in settings.result_schema.names:
        if name in schema.names:
            raise OptionsError(
                f"column {name!r}: expected a table without it, because a result has that name; "
                "rename it in the input"
            )


def _check_type(column: str, use: ColumnUse, kind: pa.DataType) -> None:
    fits, wanted = {
        "messages": (is_messages(kind), "list<struct<role: string, content: string>>"),
        "text": (is_text(kind), "string"),
        "value": (not _is_bytes(kind), "a type that can be written as text"),
        "key": (True, "any type"),
    }[use]
    if not fits:
        raise OptionsError(f"column {column!r}: expected {wanted}, got {kind}")


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column type holds strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def is_messages(kind: pa.DataType) -> bool:
    """Return whether a column type holds conversations: lists of `role` and `content`."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    message = kind.value_type
    return pa.types.is_struct(message) and all(
        message.get_field_index(name) >= 0 and is_text(message.field(name).type)
        for name in ("role", "content")
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_binary(kind) or kind in (
        pa.binary(), pa.large_binary(), pa.binary_view()
    )  # fmt: skip
