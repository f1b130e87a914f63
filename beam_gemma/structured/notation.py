"""How texts write the values of a schema: as JSON, or in another notation with the same values."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from beam_gemma.structured.grammar import (
    MAX_CODE_POINT,
    Concat,
    Language,
    Literal,
    OneOf,
    Repeat,
    chars,
)
from beam_gemma.structured.json_values import json_text
from beam_gemma.structured.regex import json_string


@dataclass(frozen=True, slots=True, eq=False)
class Notation:
    """A way to write values: numbers, `true`, `false`, `null` and brackets as in JSON."""

    quote: str
    """Character at either end of a string."""
    character: Language
    """Any one character of a string."""
    contents: Callable[[Language], Language]
    """Returns texts as they are written within a string."""
    string: Callable[[str], str]
    """Returns a string as it is written, with its quotes."""
    name: Callable[[str], str]
    """Returns the name of a property as it is written before the colon."""
    is_sorted: bool = False
    """True if properties come in the order of their names, in lower case; otherwise they come in
    the order of the schema."""

    def strings(self, contents: Language) -> Language:
        """Return strings with these contents, which are written as within a string."""
        quote = Literal(self.quote)
        return Concat((quote, contents, quote))

    def any_string(self, least: int = 0, most: int | None = None) -> Language:
        """Return all strings of `least` to `most` characters; None means no limit."""
        return self.strings(Repeat(self.character, least, most))

    def constant(self, value: Any) -> Language:
        """Return the text of a scalar."""
        return Literal(self.string(value) if isinstance(value, str) else json_text(value))

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Return names of properties in the order in which a text has them."""
        return sorted(names, key=str.lower) if self.is_sorted else list(names)


PLAIN = chars((ord(" "), ord("!")), (ord("#"), ord("[")), (ord("]"), MAX_CODE_POINT))
ESCAPED = Concat((Literal("\\"), chars(*((ord(char), ord(char)) for char in '"\\/bfnrt'))))
CHARACTER = OneOf((PLAIN, ESCAPED))
"""Character within a JSON string; control characters only if they have a short escape."""
JSON = Notation(
    quote='"', character=CHARACTER, contents=json_string, string=json_text, name=json_text
)
