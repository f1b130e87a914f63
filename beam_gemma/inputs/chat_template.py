"""Chat templates, which render a conversation as parts in the model's trained format."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.model.markup import Control, ControlPieces, Part, Text

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
"""Turn format of instruction-tuned Gemma 1, 2 and 3, for models that lack a template."""


ROLES = ("system", "user", "assistant")


_PROBE = "probe"


# Exceptions that the expressions of a template can raise.
_FAULTS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError)


class ChatTemplate:
    """Jinja chat template with Hugging Face's conventions, run in a sandbox.

    Args:
        source: Text of the template; its variables are `messages`, `add_generation_prompt`,
            `bos_token`, `eos_token` and `raise_exception`.
        control_pieces: The tokenizer's control pieces, recognized in the template's own output.
        bos_token: Value of the template's `bos_token`.
        eos_token: Value of the template's `eos_token`.
        allow_special_tokens: Whether to recognize control pieces in message contents as well.

    Raises:
        OptionsError: the template is malformed or rejects a single user message.
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
        """Return the parts of a conversation, up to the start of the model's turn.

        If the template has no system role, the system prompt is put before the first user message.

        Args:
            messages: List of messages, each with a `role` of `ROLES` and a `content`: a string,
                treated as data, or a tuple of parts, whose control pieces are kept.
            system: System prompt for a conversation without one of its own.

        Raises:
            RecordError: the messages are malformed, or the template rejects them.
        """
        conversation = _checked(messages)
        if system is not None and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": system})
        contents = [self._content_parts(message["content"]) for message in conversation]
        texts = (p.text for parts in contents for p in parts if isinstance(p, Text))
        sentinel = _unused_character([self._source, *texts])
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
        """Return whether a system message appears in the prompt; Gemma 1 and 2 reject it."""
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
    """Return a row's messages as a list, after validation."""
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


def _unused_character(texts: Collection[str]) -> str:
    """Return a character absent from all texts: a noncharacter, unless a row uses them all."""
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
