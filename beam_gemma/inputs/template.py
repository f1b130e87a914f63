"""Prompt templates, which render rows as parts: text (data) and control pieces (markup).

By default, only the template's own markup yields control pieces. `<end_of_turn>` in a row is plain
text, which the tokenizer never turns into a control token.
"""

import json
import string
from collections.abc import Iterable, Mapping
from typing import Any

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.model.markup import ControlPieces, Part, Text


class Template:
    """Prompt template with columns in braces: `Title: {title}`; `{{` and `}}` are literal braces.

    Args:
        template: Markup with plain column names in braces.
        control_pieces: The tokenizer's control pieces, recognized in the template's own text.
        allow_special_tokens: Whether to recognize control pieces in the values of rows as well.

    Raises:
        OptionsError: the template is malformed, or its braces contain more than a column name.
    """

    def __init__(
        self,
        template: str,
        control_pieces: Iterable[str],
        *,
        allow_special_tokens: bool = False,
    ) -> None:
        self._pieces = ControlPieces(control_pieces)
        self._allow_special_tokens = allow_special_tokens
        self._segments = _segments(template)
        self.fields = tuple(dict.fromkeys(field for _, field in self._segments if field))
        """Columns that the template uses, in order."""

    def render(self, row: Mapping[str, Any]) -> tuple[Part, ...]:
        """Return the prompt of one row.

        Raises:
            RecordError: a column is missing or null, or cannot be written as text.
        """
        if self._allow_special_tokens:
            filled = (
                lit + (column_text(row, field) if field else "") for lit, field in self._segments
            )
            return self._pieces.split("".join(filled))
        parts: list[Part] = []
        for literal, field in self._segments:
            parts += self._pieces.split(literal)
            if field:
                parts.append(Text(column_text(row, field)))
        return tuple(parts)


def format_value(column: str, value: Any) -> str:
    """Return a value as text for a prompt; lists and mappings become JSON.

    Raises:
        RecordError: the value is null or bytes.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise RecordError(
            f"column {column!r}: expected a value for the prompt, got null; "
            "filter such rows out or fill them"
        )
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=lambda v: format_value(column, v))
    if isinstance(value, bytes):
        raise RecordError(f"column {column!r}: expected text, got bytes; decode it first")
    return str(value)


def column_text(row: Mapping[str, Any], column: str) -> str:
    """Return the value of a row's column as text for a prompt.

    Raises:
        RecordError: the column is missing, or its value is null or bytes.
    """
    return format_value(column, column_value(row, column))


def column_value(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a row's column.

    Raises:
        RecordError: the row has no such column.
    """
    if column not in row:
        raise RecordError(f"column {column!r}: expected in every row, got {', '.join(row)}")
    return row[column]


def _segments(template: str) -> tuple[tuple[str, str | None], ...]:
    """Return the template as pairs of literal text and the column that follows it."""
    segments = []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(template):
            if spec or conversion or (field is not None and not _is_plain(field)):
                raise OptionsError(
                    f"template: expected a plain column name in braces, got {{{field}}}; "
                    "write {{ and }} for literal braces"
                )
            segments.append((literal, field))
    except ValueError as error:
        raise OptionsError(
            f"template: expected each brace closed, got an error: {error}; "
            "write {{ and }} for literal braces"
        ) from error
    return tuple(segments)


def _is_plain(field: str) -> bool:
    return bool(field) and field == field.strip() and not set(field) & set(".[]\"'\n")
