"""Compile the declarations of functions to the regular language of their calls.

A call is `call:NAME{key:value,key:value}` between control pieces, as Gemma 4 and FunctionGemma
write it. A string stands between two control pieces as it is, without escapes, and properties come
in the order of their names, in which the models' templates declare them.

A control piece has no text. In a language, a character of Unicode's plane 16 stands for it, which
is left to private use; no text in a call contains one. See `Constraint` for the other half.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from beam_gemma.errors import OptionsError
from beam_gemma.model.call_pieces import CallPieces
from beam_gemma.structured.grammar import (
    Chars,
    Concat,
    Language,
    Literal,
    OneOf,
    Repeat,
    chars,
    one_of,
    rebuilt,
    without,
)
from beam_gemma.structured.json_schema import compile_schema
from beam_gemma.structured.notation import Notation
from beam_gemma.structured.schema_node import checked

PLANE_16 = (0x100000, 0x10FFFF)
START, END, QUOTE = map(chr, range(PLANE_16[0], PLANE_16[0] + 3))
"""Characters for the control pieces before and behind a call, and at either end of a string."""
BARE_NAME = re.compile(r"[^\W\d][\w.-]*")
"""Name of a property that is written without quotes, as all those of identifiers."""
NO_ARGUMENTS = Literal("{}")
_OF_PROPERTIES = ("properties", "additionalProperties", "$ref", "allOf", "anyOf", "oneOf")


def calls_language(functions: Sequence[Mapping[str, Any]]) -> Language:
    """Return the language of one or more calls of declared functions with valid arguments.

    Args:
        functions: The functions, each with a `name` and maybe `parameters`, a JSON Schema.

    Raises:
        OptionsError: the arguments of a function cannot be enforced; the message names the place.
    """
    # The cache key keeps the order of functions and of what is in them.
    return _calls_language(json.dumps([dict(function) for function in functions]))


def check_parameters(functions: Iterable[Mapping[str, Any]]) -> None:
    """Check that the parameters of functions are valid JSON Schemas, whatever they ask for.

    Raises:
        OptionsError: they are not; the message names the place.
    """
    for function in functions:
        checked(function.get("parameters") or {}, subject=_subject(function))


def marks_of(pieces: CallPieces) -> dict[str, str]:
    """Return the control piece that each character of the language of calls stands for."""
    return {START: pieces.start, END: pieces.end, QUOTE: pieces.quote}


@functools.lru_cache(maxsize=16)
def _calls_language(functions: str) -> Language:
    bodies = [
        Concat((Literal(function["name"]), _arguments(function)))
        for function in json.loads(functions)
    ]
    return Repeat(Concat((Literal(f"{START}call:"), one_of(bodies), Literal(END))), 1, None)


def _arguments(function: Mapping[str, Any]) -> Language:
    parameters = function.get("parameters") or {}
    if not any(parameters.get(keyword) for keyword in _OF_PROPERTIES):
        return NO_ARGUMENTS
    compiled = compile_schema(parameters, notation=_CALL, subject=_subject(function))
    if not _is_braced(compiled.language):
        raise OptionsError(
            f"{_subject(function)}: expected a schema of objects alone, got one of "
            f"{compiled.type}; make it an object"
        )
    return compiled.language


def _subject(function: Mapping[str, Any]) -> str:
    return f"tools: parameters of {function['name']}"


def _is_braced(language: Language) -> bool:
    """Return whether a language is one of objects alone, without null."""
    if isinstance(language, OneOf):
        return all(map(_is_braced, language.options))
    return isinstance(language, Concat) and language.parts[0] == Literal("{")


def _string(text: str) -> str:
    if any(PLANE_16[0] <= ord(char) for char in text):
        raise OptionsError(
            f"tools: expected names and constants without characters for private use, got {text!r}"
        )
    return f"{QUOTE}{text}{QUOTE}"


def _name(name: str) -> str:
    return name if BARE_NAME.fullmatch(name) else _string(name)


def _contents(language: Language) -> Language:
    """Return texts as they are between quotes, but for those with a character of plane 16."""
    return rebuilt(language, _leaf_of_call)


def _leaf_of_call(leaf: Literal | Chars) -> Language:
    if isinstance(leaf, Literal):
        return Literal(_string(leaf.text)[1:-1])
    left = without(leaf.ranges, [PLANE_16])
    if not left:
        raise OptionsError(
            "tools: expected a pattern of other characters than those for private use, got one of "
            "them alone"
        )
    return chars(*left)


_CALL = Notation(
    quote=QUOTE,
    character=chars((ord("\t"), ord("\n")), (ord("\r"), ord("\r")), (ord(" "), PLANE_16[0] - 1)),
    contents=_contents,
    string=_string,
    name=_name,
    is_sorted=True,
)
