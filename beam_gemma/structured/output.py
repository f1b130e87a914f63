"""Structured output: the required form of completions, and the columns made from them."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from beam_gemma.errors import OptionsError
from beam_gemma.structured.grammar import Language, Literal, OneOf
from beam_gemma.structured.json_schema import JsonSchema, compile_schema
from beam_gemma.structured.regex import parse_regex

EXTRACTED = "extracted"
"""Name of the column of typed values."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a UTF-16 surrogate pair; valid text contains none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutput:
    """The required form of completions: JSON of a schema, one of some texts, or a regex match.

    Example:
        >>> schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
        >>> StructuredOutput(json_schema=schema).columns[0].name
        'extracted'
    """

    json_schema: Mapping[str, Any] | None = None
    """JSON Schema as parsed JSON; the values become the typed column `extracted`."""
    choices: tuple[str, ...] = ()
    """Allowed completions."""
    regex: str | None = None
    """Pattern, in Python's syntax, that each completion matches as a whole."""
    flatten: bool = False
    """If true, each property of the schema becomes a column, instead of `extracted`."""
    completion: bool = False
    """If true, the text stays too, as the column `completion`, beside the values of a schema."""

    def __post_init__(self) -> None:
        given = [name for name in ("json_schema", "choices", "regex") if self._has(name)]
        if len(given) != 1:
            raise OptionsError(
                "structured: expected one of json_schema, choices and regex, got "
                f"{' and '.join(given) or 'none'}"
            )
        for name in ("flatten", "completion"):
            if getattr(self, name) and self.json_schema is None:
                raise OptionsError(f"{name}: expected a json_schema beside it, got {given[0]}")
        self._check_choices()
        if self.json_schema is not None:
            compile_schema(self.json_schema)
        if self.regex is not None:
            parse_regex(self.regex)
        if self.flatten and not pa.types.is_struct(self._schema.type):
            raise OptionsError(
                "flatten: expected a schema of objects, whose properties become columns, got one "
                f"of {self._schema.type}"
            )

    def _has(self, name: str) -> bool:
        return getattr(self, name) not in (None, ())

    def _check_choices(self) -> None:
        seen: set[str] = set()
        for choice in self.choices:
            if not choice:
                raise OptionsError("choices: expected texts that are not empty, got an empty one")
            if choice in seen:
                raise OptionsError(f"choices: expected each text once, got {choice!r} twice")
            if SURROGATE.search(choice):
                raise OptionsError(f"choices: expected Unicode, got half a character in {choice!r}")
            seen.add(choice)

    @property
    def language(self) -> Language:
        """Language of all valid completions."""
        if self.choices:
            return OneOf(tuple(map(Literal, self.choices)))
        if self.regex is not None:
            return parse_regex(self.regex)
        return self._schema.language

    @property
    def columns(self) -> list[pa.Field]:
        """Columns made from a completion's text."""
        text = pa.field("completion", pa.string())
        if self.json_schema is None:
            return [text]
        kind = self._schema.type
        values = list(kind) if self.flatten else [pa.field(EXTRACTED, kind)]
        return [*values, text] if self.completion else values

    def values_of(self, text: str) -> dict[str, Any]:
        """Return the values of `columns` for a completion's text."""
        if self.json_schema is None:
            return {"completion": text}
        value = self._schema.parse(text)
        values = value if self.flatten else {EXTRACTED: value}
        return {**values, "completion": text} if self.completion else values

    @property
    def _schema(self) -> JsonSchema:
        # The cache key keeps the order of properties, which is their order in texts.
        return _compiled(json.dumps(self.json_schema))


@functools.lru_cache(maxsize=64)
def _compiled(schema: str) -> JsonSchema:
    return compile_schema(json.loads(schema))
