"""Function calls that a model writes into a completion: their names, and arguments as JSON.

A call is `call:NAME{key:value,key:value}` between two control pieces. Strings stand between two
further ones, without escapes, so that they may hold quotes, braces and line feeds; all else is
written as in JSON. As models do not keep to that, white space between values, strings in JSON's
quotes, and `None` for null are read too. Pieces are told by their token ids: text that looks like
them is text.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa

from beam_gemma.model.call_pieces import call_pieces, response_ids
from beam_gemma.model.markup import Control, Part, Text
from beam_gemma.model.tokenizer import VISIBLE_CONTROL, Tokenizer
from beam_gemma.structured.constraint import Constraint
from beam_gemma.structured.json_values import json_text
from beam_gemma.structured.tool_grammar import calls_language, marks_of

CALL_TYPE = pa.list_(pa.struct([("name", pa.string()), ("arguments", pa.string())]))
"""Type of a row's calls in a table; the arguments are the JSON text of an object."""
MAX_LEVELS = 64
"""Most lists and objects within each other in the arguments of a call that is read."""
_QUOTE, _OTHER = "\ud800", "\ud801"
"""What stands for control pieces in the text of a call; decoded text never has half a character."""
_SPACE = re.compile(r"[ \t\r\n]*")
_HEAD = re.compile(r"\s*call:\s*([\w.-]+)\s*(?={)")
_STRING = re.compile(f"{_QUOTE}([^{_QUOTE}{_OTHER}]*){_QUOTE}")
_JSON_STRING = re.compile(
    rf'"(?:[^"\\\x00-\x1f{_QUOTE}{_OTHER}]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{{4}}))*"'
)
_BARE_KEY = re.compile(rf'[^:,{{}}\[\]"{_QUOTE}{_OTHER}]+(?=:)')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(r"\w+")
_WORDS = {"true": "true", "false": "false", "null": "null", "None": "null"}


@dataclass(frozen=True, slots=True)
class Calls:
    """Functions that a completion calls, with its other text."""

    text: str
    """Text outside of calls, and the markup of calls that cannot be read."""
    calls: list[dict[str, str]]
    """Values of `CALL_TYPE`."""
    num_unreadable: int
    """Calls that the model began, but that are none: cut off, or with other arguments than those of
    the format."""

    def columns(self, finish_reason: str) -> dict[str, Any]:
        """Return the result columns of calls.

        Args:
            finish_reason: How the completion ended; `stop` becomes `tool_calls` if there are any.
        """
        columns = {"tool_calls": self.calls, "num_unreadable_calls": self.num_unreadable}
        is_calling = finish_reason == "stop" and self.calls
        return {**columns, "finish_reason": "tool_calls"} if is_calling else columns


def calls_constraint(
    functions: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, end_token_ids: Iterable[int]
) -> Constraint:
    """Return the constraint of completions that are calls of declared functions.

    Args:
        functions: The functions, as `calls_language` takes them.
        tokenizer: The tokenizer of a model that calls functions; see `call_pieces`.
        end_token_ids: The model's token ids that end a completion.

    Raises:
        OptionsError: the arguments of a function cannot be enforced.
    """
    pieces = call_pieces(tokenizer.control_pieces)
    assert pieces is not None, "a model without calls"
    ends = (*end_token_ids, *response_ids(tokenizer.control_pieces))
    return Constraint(calls_language(functions), tokenizer, ends, marks=marks_of(pieces))


class CallReader:
    """Reads the calls of completions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find the control pieces.

        Args:
            tokenizer: The tokenizer of a model that calls functions; see `call_pieces`.
        """
        pieces = call_pieces(tokenizer.control_pieces)
        assert pieces is not None, "a model without calls"
        self._pieces = pieces
        self._tokenizer = tokenizer
        self._names = {
            token_id: name
            for name, token_id in tokenizer.control_pieces.items()
            if not VISIBLE_CONTROL.fullmatch(name)
        }

    def read(self, token_ids: Sequence[int]) -> Calls:
        """Return the calls and the other text of a completion.

        Args:
            token_ids: The tokens of the completion, without its thoughts.
        """
        text: list[str] = []
        calls: list[dict[str, str]] = []
        num_unreadable = at = 0
        parts = self._parts(token_ids)
        while at < len(parts):
            part = parts[at]
            if part != Control(self._pieces.start):
                text += [part.text] if isinstance(part, Text) else []
                at += 1
                continue
            end = self._end(parts, at + 1)
            call = self._call(parts[at + 1 : end])
            if parts[end : end + 1] == [Control(self._pieces.end)]:
                end += 1
            if call is None:
                num_unreadable += 1
                text += [p.text if isinstance(p, Text) else p.piece for p in parts[at:end]]
            else:
                calls.append(call)
            at = end
        return Calls("".join(text), calls, num_unreadable)

    def _parts(self, token_ids: Sequence[int]) -> list[Part]:
        """Return a completion as control pieces and the texts between them."""
        groups = itertools.groupby(token_ids, lambda token_id: token_id in self._names)
        runs = [(is_control, list(ids)) for is_control, ids in groups]
        parts: list[Part] = []
        for number, (is_control, ids) in enumerate(runs, start=1):
            if is_control:
                parts += [Control(self._names[token_id]) for token_id in ids]
            else:
                # The last token of a completion may be only part of a character.
                parts.append(Text(self._tokenizer.decode(ids, final=number < len(runs))))
        return parts

    def _end(self, parts: Sequence[Part], start: int) -> int:
        """Return the index of the piece that ends a call, or of the one that starts the next."""
        ends = (Control(self._pieces.end), Control(self._pieces.start))
        return next((i for i in range(start, len(parts)) if parts[i] in ends), len(parts))

    def _call(self, parts: Iterable[Part]) -> dict[str, str] | None:
        """Return the call between two pieces; None if it cannot be read."""
        quote = Control(self._pieces.quote)
        text = "".join(
            part.text if isinstance(part, Text) else _QUOTE if part == quote else _OTHER
            for part in parts
        )
        head = _HEAD.match(text)
        if head is None:
            return None
        try:
            arguments = _Arguments(text, head.end()).read()
        except ValueError:
            return None
        return {"name": head[1], "arguments": arguments}


class _Arguments:
    """Reads the arguments of a call, from a brace to the end of its text, as JSON text.

    Every method raises a `ValueError` where the text is none of the format.
    """

    def __init__(self, text: str, at: int) -> None:
        self._text = text
        self._at = at

    def read(self) -> str:
        """Return the JSON text of the arguments."""
        found = self._value(0)
        if self._at < len(self._text):
            self._fail()
        return found

    def _value(self, level: int) -> str:
        """Return the JSON text of the value that comes next, and pass the space around it."""
        if level > MAX_LEVELS:
            self._fail()
        self._match(_SPACE)
        if self._takes("{"):
            found = self._members(level)
        elif self._takes("["):
            found = self._items(level)
        else:
            found = self._scalar()
        self._match(_SPACE)
        return found

    def _members(self, level: int) -> str:
        members: dict[str, str] = {}
        while not self._ends("}", is_first=not members):
            key = self._key()
            if key in members or not self._takes(":"):
                self._fail()
            members[key] = self._value(level + 1)
        return f"{{{','.join(f'{json_text(key)}:{value}' for key, value in members.items())}}}"

    def _items(self, level: int) -> str:
        items: list[str] = []
        while not self._ends("]", is_first=not items):
            items.append(self._value(level + 1))
        return f"[{','.join(items)}]"

    def _ends(self, bracket: str, *, is_first: bool) -> bool:
        """Return whether a list or object ends here; if not, pass the comma before what is next."""
        self._match(_SPACE)
        if self._takes(bracket):
            return True
        if not is_first and not self._takes(","):
            self._fail()
        return False

    def _key(self) -> str:
        self._match(_SPACE)
        bare = self._match(_BARE_KEY)
        if bare is not None:
            return bare.strip() or self._fail()
        key = self._string()
        self._match(_SPACE)
        return key

    def _scalar(self) -> str:
        if (number := self._match(_NUMBER)) is not None:
            return number
        if (word := self._match(_WORD)) is not None:
            return _WORDS.get(word) or self._fail()
        return json_text(self._string())

    def _string(self) -> str:
        """Return a string in quotes of either kind."""
        if (found := self._match(_STRING)) is not None:
            return found[1:-1]
        found = self._match(_JSON_STRING)
        if found is None:
            self._fail()
        text: str = json.loads(found)
        text.encode()  # half a surrogate pair, which \u can write, is a `ValueError`
        return text

    def _takes(self, char: str) -> bool:
        is_next = self._text.startswith(char, self._at)
        self._at += is_next
        return is_next

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found[0]

    def _fail(self) -> NoReturn:
        raise ValueError(f"no call at character {self._at}")
