"""Write a language as llguidance's grammar, in its dialect of Lark.

A part that stands in several places is written once, under a name, and so are parts at regular
depths: llguidance's parsers refuse expressions that are nested too deep. All names together are one
terminal, which is matched as one regular expression.
"""

from collections import Counter

from beam_gemma.structured.grammar import (
    Concat,
    Language,
    OneOf,
    Repeat,
    each_once,
    parts_of,
    quantifier,
    regex_of,
)

MAX_NESTING = 16
"""Levels of parts that are written within each other; the next one gets a name."""
MAX_COPIED = 32
"""Maximum characters of an expression that is repeated rather than named."""


def to_lark(language: Language) -> str:
    """Return a grammar whose texts are those of a language."""
    every = each_once(language)
    uses = Counter(id(inner) for part in every for inner in parts_of(part))
    writer = _Writer()
    for part in every:
        writer.write(part, is_shared=uses[id(part)] > 1)
    # Only within a terminal, whose name is in capitals, are all parts one regular expression.
    return "\n".join(["start: WHOLE", f"WHOLE: {writer.expression(language)}", *writer.lines])


class _Writer:
    """Writes parts, each after its own parts."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        """Definitions of names."""
        self._regexes: dict[int, str] = {}
        """Regular expressions of the parts that contain no name."""
        self._expressions: dict[int, str] = {}
        """Names, or expressions that contain names, of all other parts."""
        self._levels: dict[int, int] = {}
        """Levels of parts within each part, down to names."""

    def expression(self, language: Language) -> str:
        """Return the expression of a part that is written."""
        if id(language) in self._expressions:
            return self._expressions[id(language)]
        regex = self._regexes[id(language)].replace("/", r"\/")
        # Lark has no empty regular expression.
        return f"/{regex}/" if regex else '""'

    def write(self, part: Language, *, is_shared: bool) -> None:
        """Write a part whose own parts are written."""
        inner = parts_of(part)
        if any(id(each) in self._expressions for each in inner):
            self._expressions[id(part)] = self._joined(part)
        else:
            self._regexes[id(part)] = regex_of(part, [self._regexes[id(each)] for each in inner])
        levels = self._levels[id(part)] = 1 + max((self._levels[id(e)] for e in inner), default=0)
        if levels > MAX_NESTING or (is_shared and len(self.expression(part)) > MAX_COPIED):
            self._name(part)

    def _name(self, part: Language) -> None:
        name = f"P{len(self.lines)}"
        self.lines.append(f"{name}: {self.expression(part)}")
        self._expressions[id(part)] = name
        self._levels[id(part)] = 0

    def _joined(self, part: Language) -> str:
        """Return the expression of a part that contains a name."""
        inner = [self.expression(each) for each in parts_of(part)]
        match part:
            case Concat():
                return f"({' '.join(inner)})"
            case OneOf():
                return f"({' | '.join(inner)})"
            case Repeat(_, _, most):
                # Lark has no repetition of at most 0 times.
                return '""' if most == 0 else f"({inner[0]}){quantifier(part)}"
        raise AssertionError(part)
