"""Rows to prompts, as parts: text, which is data, and control pieces, which are markup.

Only markup that a template's author wrote yields control pieces. A row that contains
`<end_of_turn>` is text about a marker, and the tokenizer never makes a control token of text.
"""

import json
import re
import string
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from beam_gemma.errors import OptionsError, RecordError


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is encoded as it stands and never yields a control token."""

    text: str


@dataclass(frozen=True, slots=True)
class Control:
    """One control piece, such as `<end_of_turn>`."""

    piece: str


Part = Text | Control


class ControlPieces:
    """The control pieces of a vocabulary, found in markup; the longest wins, from the left."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = frozenset(pieces)
        # A vocabulary has thousands of pieces of few lengths, and most begin alike: looking up
        # each length at a first character is far quicker than one alternation of all pieces.
        self._lengths = sorted({len(piece) for piece in self._pieces}, reverse=True)
        firsts = sorted({piece[0] for piece in self._pieces})
        self._first = re.compile(f"[{re.escape(''.join(firsts))}]" if firsts else r"(?!)")

    def split(self, markup: str) -> tuple[Part, ...]:
        """Return the parts of trusted markup."""
        return tuple(self._parts(markup))

    def guard(self, data: str, sentinel: str) -> str:
        """Return data with a sentinel wherever a control piece could begin in it or run into it.

        The sentinel stands before the first character that is not a space, so that templates can
        still trim, and after each character that a control piece begins with.
        """
        guarded = self._first.sub(lambda match: match[0] + sentinel, data)
        stripped = guarded.lstrip()
        return guarded[: len(guarded) - len(stripped)] + sentinel + stripped if stripped else data

    def _parts(self, markup: str) -> Iterator[Part]:
        start = position = 0
        while match := self._first.search(markup, position):
            piece = self._piece_at(markup, match.start())
            if piece is None:
                position = match.end()
                continue
            if start < match.start():
                yield Text(markup[start : match.start()])
            yield Control(piece)
            start = position = match.start() + len(piece)
        if start < len(markup):
            yield Text(markup[start:])

    def _piece_at(self, markup: str, start: int) -> str | None:
        candidates = (markup[start : start + length] for length in self._lengths)
        return next((piece for piece in candidates if piece in self._pieces), None)


class Template:
    """A prompt with columns in braces: `Title: {title}`; `{{` and `}}` stand for braces.

    Args:
        template: Markup with plain column names in braces.
        control_pieces: Those of the tokenizer; found in the template's own text.
        allow_special_tokens: Find them in the values of rows as well.

    Raises:
        OptionsError: the template is malformed, or asks for more than a column's value.
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
        """The columns that the template names, in order."""

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
    """Return a column's value as it stands in a prompt.

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
    """Return a column's value of one row as it stands in a prompt.

    Raises:
        RecordError: the column is missing, or its value is null or bytes.
    """
    if column not in row:
        raise RecordError(f"column {column!r}: expected in every row, got {', '.join(row)}")
    return format_value(column, row[column])


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


GEMMA_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == "user") != loop.index0 is even %}
        {{- raise_exception("roles must alternate, user first") }}
    {%- endif %}
    {{- "<start_of_turn>" + ("model" if message.role == "assistant" else message.role) + "\\n" }}
    {{- message.content | trim }}
    {{- "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<start_of_turn>model\\n" }}
{%- endif %}
"""
"""Turns of the instruction-tuned Gemma 1, 2 and 3, for models that come without a template."""

ROLES = ("system", "user", "assistant")
_PROBE = "probe"
# What the expressions of a template can raise.
_FAULTS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError)


class ChatTemplate:
    """A Jinja chat template under Hugging Face's conventions, run in a sandbox.

    Args:
        source: The template; it sees `messages`, `add_generation_prompt`, `bos_token`, `eos_token`
            and `raise_exception`.
        control_pieces: Those of the tokenizer; found in what the template writes itself.
        allow_special_tokens: Find them in the contents of messages as well.

    Raises:
        OptionsError: the template is malformed or refuses a plain question.
    """

    def __init__(
        self,
        source: str,
        control_pieces: Iterable[str],
        *,
        bos_token: str = "<bos>",
        eos_token: str = "<eos>",
        allow_special_tokens: bool = False,
    ) -> None:
        self._source = source
        self._pieces = ControlPieces(control_pieces)
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}
        self._allow_special_tokens = allow_special_tokens
        question = {"role": "user", "content": "question"}
        try:
            self._template = _sandbox().from_string(source)
            self._run([question])
        except _FAULTS as error:
            raise OptionsError(
                f"chat template: expected a template that takes one user message, got: {error}"
            ) from error
        self._takes_system = self._shows_system(question)

    def render(self, messages: Any, system: str | None = None) -> tuple[Part, ...]:
        """Return a conversation that ends where the model is to speak.

        A template without a system role gets the system prompt at the head of the first user turn.

        Args:
            messages: A list; each with a `role` of `ROLES` and a `content`: a string, which is
                data, or a tuple of parts, whose control pieces are kept.
            system: System prompt for a conversation that brings none of its own.

        Raises:
            RecordError: the messages are malformed, or the template refuses them.
        """
        conversation = _checked(messages)
        if system is not None and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": system})
        contents = [self._content_parts(message["content"]) for message in conversation]
        sentinel = _unused_character([self._source, *(p.text for p in _texts(contents))])
        guarded = [
            {"role": message["role"], "content": self._guarded(parts, sentinel)}
            for message, parts in zip(conversation, contents, strict=True)
        ]
        try:
            rendered = self._run(guarded if self._takes_system else _fold_system(guarded))
        except _FAULTS as error:
            raise RecordError(
                f"messages: expected a conversation that the chat template takes, got: {error}"
            ) from error
        return tuple(_without(sentinel, self._pieces.split(rendered)))

    def _run(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._template.render(
            messages=messages, add_generation_prompt=True, **self._variables
        )

    def _shows_system(self, question: Mapping[str, str]) -> bool:
        """Return whether a system message reaches the prompt; Gemma 1 and 2 refuse it."""
        try:
            return _PROBE in self._run([{"role": "system", "content": _PROBE}, question])
        except _FAULTS:
            return False

    def _content_parts(self, content: str | tuple[Part, ...]) -> tuple[Part, ...]:
        if isinstance(content, tuple):
            return content
        return self._pieces.split(content) if self._allow_special_tokens else (Text(content),)

    def _guarded(self, parts: Sequence[Part], sentinel: str) -> str:
        return "".join(
            part.piece if isinstance(part, Control) else self._pieces.guard(part.text, sentinel)
            for part in parts
        )


def _sandbox() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _checked(messages: Any) -> list[Mapping[str, Any]]:
    """Return the messages of a row, which may hold anything."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RecordError(f"messages: expected a list of messages, got {messages!r}")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise RecordError(
                f"messages: expected each with a role of {', '.join(ROLES)}, got {message!r}"
            )
        if not isinstance(message.get("content"), str | tuple):
            raise RecordError(f"messages: expected each with a text as content, got {message!r}")
    if any(message["role"] == "system" for message in messages[1:]):
        raise RecordError("messages: expected a system message only at the head, got a later one")
    if messages[-1]["role"] != "user":
        raise RecordError(
            f"messages: expected the last one to be the user's, got {messages[-1]['role']!r}"
        )
    return list(messages)


def _texts(contents: Iterable[Sequence[Part]]) -> Iterator[Text]:
    return (part for parts in contents for part in parts if isinstance(part, Text))


def _unused_character(texts: Collection[str]) -> str:
    """Return a character that occurs in no text: a noncharacter, unless a row uses them all."""
    candidates = (chr(code) for code in range(0xFDD0, 0x110000))
    return next(char for char in candidates if not any(char in text for text in texts))


def _fold_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    if messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content'].strip()}"}, *rest]


def _without(sentinel: str, parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        if isinstance(part, Control):
            yield part
        elif text := part.text.replace(sentinel, ""):
            yield Text(text)
