"""Prompt templates, which render rows as parts: text (data) and control pieces (markup).

By default, only the template's own markup yields control pieces. `<end_of_turn>` in a row is plain
text, which the tokenizer never turns into a control token.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.model.markup import ControlPieces, Part, Text

_BRACES = re.compile(r'\{\{|\}\}|\{(?:(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<name>[^{}]*))\}|[{}]')


class Template:
    """Prompt template with columns in braces: `Title: {title}`; `{{` and `}}` are literal braces.

    A name with signs such as `.` is written as a JSON string: `{"user.name"}`.

    Args:
        template: Markup with column names in braces.
        control_pieces: The tokenizer's control pieces, recognized in the template's own text.
        allow_special_tokens: Whether to recognize control pieces in the values of rows as well.
        name: What messages call the template.

    Raises:
        OptionsError: the template is malformed, or its braces contain anything but a column name.
    """

    def __init__(
        self,
        template: str,
        control_pieces: Iterable[str],
        *,
        allow_special_tokens: bool = False,
        name: str = "template",
    ) -> None:
        self._pieces = ControlPieces(control_pieces)
        self._allow_special_tokens = allow_special_tokens
        self._segments = _segments(template, name)
        self.fields = tuple(dict.fromkeys(field for _, field in self._segments if field))
        """Columns that the template uses, in order."""

    def render(
        self, row: Mapping[str, Any], pictures: Mapping[str, Sequence[Part]] = MappingProxyType({})
    ) -> tuple[Part, ...]:
        """Return the prompt of one row.

        Args:
            row: A mapping of columns.
            pictures: Parts for columns that hold pictures, in place of their values.

        Raises:
            RecordError: a column is missing or null, or cannot be written as text.
        """
        parts: list[Part] = []
        markup = ""
        for literal, field in self._segments:
            markup += literal
            if field is None:
                continue
            if field not in pictures and self._allow_special_tokens:
                markup += column_text(row, field)
                continue
            parts += self._pieces.split(markup)
            markup = ""
            parts += pictures[field] if field in pictures else [Text(column_text(row, field))]
        return (*parts, *self._pieces.split(markup))


def format_value(column: str, value: Any) -> str:
    """Return a value as text for a prompt; lists and mappings become JSON.

    Raises:
        RecordError: the value is null or bytes, or its lists and mappings are nested too deeply.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise RecordError(
            f"column {column!r}: expected a value for the prompt, got null; "
            "filter such rows out or fill them"
        )
    if isinstance(value, Mapping | list | tuple):
        try:
            return json.dumps(value, ensure_ascii=False, default=lambda v: format_value(column, v))
        except RecursionError as error:
            raise RecordError(
                f"column {column!r}: expected lists and mappings within each other in a few "
                "levels, got too many; flatten them"
            ) from error
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


def _segments(template: str, name: str) -> tuple[tuple[str, str | None], ...]:
    """Return the template as pairs of literal text and the column that follows it."""
    segments: list[tuple[str, str | None]] = []
    literal, end = "", 0
    for found in _BRACES.finditer(template):
        literal += template[end : found.start()]
        end = found.end()
        if found[0] in ("{{", "}}"):
            literal += found[0][0]
        else:
            segments.append((literal, _column(found, name)))
            literal = ""
    return (*segments, (literal + template[end:], None))


def _column(found: re.Match[str], template_name: str) -> str:
    """Return the column that a pair of braces names."""
    name, quoted = found["name"], found["quoted"]
    if quoted is not None:
        try:
            name = json.loads(quoted)
        except ValueError:
            name = ""
    elif name is None:
        raise OptionsError(
            f"{template_name}: expected each brace closed, got {found[0]!r} alone; "
            "write {{ and }} for literal braces"
        )
    elif name != name.strip() or set(name) & set(".:![]\"'\n"):
        name = ""
    if not name:
        raise OptionsError(
            f"{template_name}: expected a column name in braces, got {found[0]}; "
            "write {{ and }} for literal braces, and quote a name with other signs than letters, "
            'digits and spaces, as in {"user.name"}'
        )
    return str(name)
