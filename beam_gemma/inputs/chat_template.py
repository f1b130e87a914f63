"""Chat templates, which render a conversation as parts in the model's trained format."""

import functools
import itertools
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jinja2

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inputs.call_messages import call_keys
from beam_gemma.inputs.languages import language_codes, takes_languages
from beam_gemma.inputs.row import MediaKind
from beam_gemma.inputs.template_sandbox import TemplateSandbox
from beam_gemma.inputs.tools import containers_in, texts_in, traced
from beam_gemma.inputs.traced_text import (
    LAST,
    ROW,
    TEMPLATE,
    UNKNOWN,
    TracedText,
    concatenated,
    origins,
    plain,
    runs,
)
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


ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
}
"""Roles of messages, and what chat templates call them."""
SPECIAL_TOKENS = {
    f"{name}_token": TracedText(f"<{name}>", TEMPLATE) for name in ("bos", "eos", "unk", "pad")
}
"""Variables of a chat template with the special tokens of every Gemma."""


_FILE_KEYS = ("bytes", "url", "path", "uri")
MEDIA_KEYS: Mapping[MediaKind, tuple[str, ...]] = {
    "image": ("image", *_FILE_KEYS),
    "audio": ("audio", *_FILE_KEYS),
}
"""Keys of a part that may hold its picture or sound, which no template sees, by its type."""


_HIDDEN_KEYS = frozenset(itertools.chain.from_iterable(MEDIA_KEYS.values()))


class _Short(reprlib.Repr):
    """Writes what rows hold in short; of a file with a picture or a sound, only its size."""

    def repr_bytes(self, value: bytes, _: int) -> str:
        """Return what stands for bytes."""
        return f"{len(value):,} bytes"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 100
_short = _SHORT.repr
_PROBE = "probe"
_QUESTION = "question"
_RESULT = "outcome"
_CALL = {"id": "0", "type": "function", "function": {"name": _PROBE, "arguments": {}}}


# Exceptions that the expressions of a template can raise.
_FAULTS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError,
    TypeError, ValueError,
)  # fmt: skip


class ChatTemplate:
    """Jinja chat template with Hugging Face's conventions, run in a sandbox.

    The template sees the contents of messages as they are. Control pieces are recognized only in
    the text of the template itself, whatever it does with that of a row.

    Args:
        source: Text of the template; its variables are `messages`, `add_generation_prompt`,
            `tools`, `documents`, which is None, those of `SPECIAL_TOKENS`, `enable_thinking` if
            that is given, and the functions `raise_exception` and `strftime_now`.
        control_pieces: The tokenizer's control pieces.
        allow_special_tokens: Whether to recognize control pieces in message contents as well.
        media_pieces: Control pieces that stand for pictures and sounds, by the types of parts; a
            model takes none of a type that has none.
        languages: Codes of the languages to translate from and to, for a template that takes only
            a text or a picture with such codes, as TranslateGemma's does; None for other templates.
        enable_thinking: Whether the model is to think before it answers, for a template that knows
            it, as Gemma 4's does; None for what the template does by itself.
        tools: Functions that the model may call, from `checked_tools`. Their text is data, as that
            of rows: it never yields control pieces.

    Raises:
        OptionsError: the template is malformed, rejects a single user message, knows no languages,
            thinking or tools though they are given, or writes control pieces by an operation that
            loses track of whose text it is.
    """

    def __init__(
        self,
        source: str,
        control_pieces: Iterable[str],
        *,
        allow_special_tokens: bool = False,
        media_pieces: Mapping[MediaKind, str] = MappingProxyType({}),
        languages: tuple[str, str] | None = None,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._pieces = ControlPieces(control_pieces)
        # The tokenizer of a Gemma 3n need not have those of pictures and sounds.
        markup = ControlPieces((*control_pieces, *media_pieces.values()))
        # What a template writes between the texts of rows and tools is often the same.
        self._split = functools.lru_cache(maxsize=1024)(markup.split)
        self._allow_special_tokens = allow_special_tokens
        self._media = {kind: TracedText(p, TEMPLATE) for kind, p in media_pieces.items()}
        if languages and not takes_languages(source):
            raise OptionsError(
                "source_lang: expected a model whose chat template takes languages, such as "
                "TranslateGemma, got one that ignores them"
            )
        self._options: dict[str, Any] = {"tools": traced(tools) or None}
        self._tool_texts = tuple(texts_in(tools))
        if enable_thinking is not None:
            self._options["enable_thinking"] = enable_thinking
        text = {"type": "text", "text": _QUESTION}
        codes = {} if languages is None else language_codes(*languages)
        question: Any = [text | codes] if languages else _QUESTION
        try:
            self._sandbox = TemplateSandbox()
            self._sandbox.remember(containers_in(self._options["tools"]))
            self._template = self._sandbox.compiled(source)
            rendered = self._run([_of_user(question)])
            self._check_origins(rendered, [_QUESTION])
        except _FAULTS as error:
            needs_codes = languages is None and takes_languages(source)
            hint = "; give source_lang and target_lang" if needs_codes else ""
            taken = "one user message, and these tools" if tools else "one user message"
            raise OptionsError(
                f"chat template: expected a template that takes {taken}, got: {error}{hint}"
            ) from error
        if tools and not self._heeds(rendered, tools=None):
            raise OptionsError(
                "tools: expected a model whose chat template declares functions, such as Gemma 4 "
                "or FunctionGemma, got one that ignores them"
            )
        if enable_thinking and not self._heeds(rendered, enable_thinking=False):
            raise OptionsError(
                "thinking: expected a chat template that knows enable_thinking, as Gemma 4's does, "
                "got one that ignores it"
            )
        self._takes_parts = languages is not None or self._shows(rendered, [text])
        self._shown = {k for k in self._media if languages is not None or self._shows_medium(k)}
        """Types of parts that a list may have for the template to show them."""
        self._takes_system = self._shows_system()
        self._takes_calls = self._shows_calls()

    def render(self, messages: Any, system: str | None = None) -> tuple[Part, ...]:
        """Return the parts of a conversation, up to the start of the model's turn.

        If the last message is the assistant's, the prompt ends with its text, for the model to
        continue. If the template has no system role, the system prompt is put before the first
        user message.

        Args:
            messages: List of messages, each with a `role` of `ROLES` and a `content`: a string or
                a list of `{"type": "text", "text": ...}`, `{"type": "image"}` and
                `{"type": "audio"}`, treated as data, or a tuple of parts, whose control pieces are
                kept. Other keys of a part are passed on if they hold text. A template that knows no
                lists gets their texts joined by line feeds, with its piece in place of each
                picture and sound. Keys on calls of functions are those of `call_messages`.
            system: System prompt for a conversation without one of its own.

        Raises:
            RecordError: the messages are malformed, or the template rejects them.
        """
        conversation = _checked(messages, tuple(self._media))
        if system is not None and ROLES[conversation[0]["role"]] != "system":
            conversation.insert(0, {"role": "system", "content": system})
        if not self._takes_calls and any(m["role"] == "tool" or len(m) > 2 for m in conversation):
            raise RecordError(
                "messages: expected no calls of functions, which the chat template does not write, "
                "got some; take a model such as Gemma 4"
            )
        continues = ROLES[conversation[-1]["role"]] == "assistant"
        traced = [self._traced(message) for message in conversation[:-1]]
        traced.append(self._traced(conversation[-1], LAST if continues else 0))
        try:
            if not self._takes_system:
                traced = self._fold_system(traced)
            rendered = self._run(traced, add_generation_prompt=not continues)
            contents = [self._joined(message["content"]) for message in traced]
            self._check_origins(rendered, [*contents, *texts_in(conversation)])
        except _FAULTS as error:
            raise RecordError(
                f"messages: expected a conversation that the chat template takes, got: {error}"
            ) from error
        if continues:
            rendered = _up_to_answer(rendered, traced[-1]["content"])
        return tuple(_merged(self._parts(rendered)))

    def _run(self, messages: Sequence[Mapping[str, Any]], **changes: Any) -> TracedText:
        """Return the prompt of messages.

        Args:
            messages: The messages as the template sees them.
            changes: Variables of the template with other values than the usual ones.
        """
        variables = {
            "add_generation_prompt": True,
            "documents": None,
            **SPECIAL_TOKENS,
            **self._options,
            **changes,
        }
        return self._sandbox.rendered(self._template, messages=messages, **variables)

    def _shows_system(self) -> bool:
        """Return whether a system message appears in the prompt; Gemma 1 and 2 reject it."""
        try:
            return _PROBE in self._run([{"role": "system", "content": _PROBE}, _of_user(_QUESTION)])
        except _FAULTS:
            return False

    def _shows_calls(self) -> bool:
        """Return whether a call and its result appear in the prompt."""
        call = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        result = {"role": "tool", "content": _RESULT, "tool_call_id": "0", "name": _PROBE}
        try:
            rendered = self._run([_of_user(_QUESTION), call, result])
        except _FAULTS:
            return False
        return _PROBE in rendered and _RESULT in rendered

    def _heeds(self, rendered: str, **changes: Any) -> bool:
        """Return whether the prompt of a question is another one with such changes."""
        try:
            return self._run([_of_user(_QUESTION)], **changes) != rendered
        except _FAULTS:
            return True

    def _shows(self, expected: str, content: list[dict[str, str]]) -> bool:
        """Return whether the prompt of a content is the expected one."""
        try:
            return self._run([_of_user(content)]) == expected
        except _FAULTS:
            return False

    def _shows_medium(self, kind: MediaKind) -> bool:
        """Return whether a part of this type in a list appears in the prompt as its piece."""
        try:
            return self._media[kind] in self._run([_of_user([{"type": kind}])])
        except _FAULTS:
            return False

    def _traced(self, message: Mapping[str, Any], flag: int = 0) -> dict[str, Any]:
        """Return a message as the template sees it."""
        content = message["content"]
        if isinstance(content, list):
            kinds = {part["type"] for part in content}
            takes_list = self._takes_parts and kinds <= {"text", *self._shown}
            content = [self._traced_part(part, flag) for part in content]
            content = content if takes_list else self._joined(content)
        else:
            content = self._traced_text(content, flag)
        role = TracedText(ROLES[message["role"]], TEMPLATE)
        of_calls = {k: traced(v) for k, v in message.items() if k not in ("role", "content")}
        return {"role": role, "content": content, **of_calls}

    def _traced_part(self, part: Mapping[str, Any], flag: int) -> dict[str, str]:
        traced = {
            key: TracedText(value, ROW)
            for key, value in part.items()
            if isinstance(value, str) and key not in (*_HIDDEN_KEYS, "type", "text")
        }
        if part["type"] != "text":
            return {"type": part["type"], **traced}
        return {"type": "text", "text": self._traced_text(part["text"], flag), **traced}

    def _joined(self, content: Any) -> TracedText:
        """Return a content as one text, with line feeds between texts and none around media."""
        if isinstance(content, str):
            return concatenated([content])
        joined: list[str] = []
        for before, part in itertools.pairwise([{}, *content]):
            if "text" in before and "text" in part:
                joined.append(TracedText("\n", ROW))
            joined.append(part["text"] if "text" in part else self._media[part["type"]])
        return concatenated(joined)

    def _fold_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if messages[0]["role"] != "system":
            return messages
        system, first, *rest = messages
        text = self._joined(system["content"]) + "\n\n" + self._joined(first["content"]).strip()
        return [{**first, "content": text}, *rest]

    def _traced_text(self, content: str | tuple[Part, ...], flag: int) -> TracedText:
        if isinstance(content, str):
            allow = self._allow_special_tokens
            content = self._pieces.split(content) if allow else (Text(content),)
        return concatenated(
            TracedText(part.piece, TEMPLATE | flag)
            if isinstance(part, Control)
            else TracedText(part.text, ROW | flag)
            for part in content
        )

    def _parts(self, rendered: TracedText) -> Iterator[Part]:
        for text, is_templates in runs(rendered):
            if is_templates:
                yield from self._split(text)
            else:
                yield Text(text)

    def _check_origins(self, rendered: TracedText, contents: Sequence[str]) -> None:
        """Refuse a control piece of unknown origin, unless a row or a tool has it in its text."""
        written = origins(rendered)
        if UNKNOWN not in written:
            return
        end = 0
        contents = (*contents, *self._tool_texts)
        for part in self._pieces.split(plain(rendered)):
            start, end = end, end + len(part.piece if isinstance(part, Control) else part.text)
            if not isinstance(part, Control) or UNKNOWN not in written[start:end]:
                continue
            if not any(part.piece in content for content in contents):
                raise jinja2.TemplateRuntimeError(
                    f"{part.piece} from an operation that does not tell the template's text from "
                    "that of rows; write it by + or ~"
                )


def media_key(part: Mapping[str, Any]) -> str | None:
    """Return the key under which a part of a message brings its picture or sound, if any."""
    keys = MEDIA_KEYS.get(part["type"], ())
    return next((key for key in keys if part.get(key) is not None), None)


def _of_user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _checked(messages: Any, takes: Collection[MediaKind]) -> list[dict[str, Any]]:
    """Return a row's messages, after validation, with what templates see of them."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RecordError(f"messages: expected a list of messages, got {_short(messages)}")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise RecordError(
                f"messages: expected each with a role of {', '.join(ROLES)}, got {_short(message)}"
            )
        media = takes if message["role"] == "user" else ()
        content = message.get("content")
        if not isinstance(content, str | tuple) and not _is_parts(content, media):
            more = f", or {' or '.join(takes)} in a user's message" if takes else ""
            raise RecordError(
                f"messages: expected each with a text, or a list of parts of type text{more}, as "
                f"content, got {_short(message)}"
            )
    if any(ROLES[message["role"]] == "system" for message in messages[1:]):
        raise RecordError("messages: expected a system message only at the head, got a later one")
    if ROLES[messages[-1]["role"]] == "system":
        raise RecordError("messages: expected the last one to be the user's, got 'system'")
    checked = [{"role": m["role"], "content": m["content"], **call_keys(m)} for m in messages]
    if "tool_calls" in checked[-1]:
        raise RecordError("messages: expected results after the last calls, got calls at the end")
    return checked


def _is_parts(content: Any, media: Collection[str]) -> bool:
    """Return whether a content is a list of parts with texts, or media of these types."""
    if not isinstance(content, list) or not content:
        return False
    return all(
        isinstance(part, Mapping)
        and (
            (part.get("type") == "text" and isinstance(part.get("text"), str))
            or part.get("type") in media
        )
        for part in content
    )


def _up_to_answer(rendered: TracedText, content: Any) -> TracedText:
    """Return a prompt that ends where the text of its last message does."""
    answer = content if isinstance(content, str) else content[-1]["text"]
    written = origins(rendered)
    end = max(written.rfind(origin | LAST) for origin in (TEMPLATE, ROW)) + 1
    if not end or answer.strip() not in rendered[:end]:
        raise RecordError(
            "messages: expected a last message of the assistant that the chat template writes as "
            "it is, for the model to continue, got one that is empty or that it changes"
        )
    return rendered[:end]


def _merged(parts: Iterable[Part]) -> Iterator[Part]:
    """Yield parts with adjacent texts as one."""
    for kind, group in itertools.groupby(parts, type):
        if kind is Text:
            yield Text("".join(part.text for part in group if isinstance(part, Text)))
        else:
            yield from group
