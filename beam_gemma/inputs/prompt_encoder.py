"""Conversion of rows to token ids: columns of a prompt, its markup, and its length limit.

A row is a mapping of columns, or a string that is the prompt itself.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beam_gemma.errors import OptionsError, PromptTooLongError, RecordError
from beam_gemma.inputs.chat_template import GEMMA_CHAT_TEMPLATE, ChatTemplate
from beam_gemma.inputs.decoder_prompt import Decoder, check_decoder, decoder_prompts
from beam_gemma.inputs.infill import Infill
from beam_gemma.inputs.languages import (
    PROBES,
    language_codes,
    takes_languages,
)
from beam_gemma.inputs.media_prompt import MediaPrompts, RowMedia
from beam_gemma.inputs.prompt_settings import PromptSettings, Side
from beam_gemma.inputs.row import (
    MediaFile,
    MediaPart,
    Prompt,
    Row,
    as_text,
    rows_own_errors,
    shots_own_errors,
)
from beam_gemma.inputs.template import Template, column_text, format_value
from beam_gemma.inputs.tools import check_calls
from beam_gemma.model.call_pieces import response_ids
from beam_gemma.model.markup import Part, Text
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.model.vision_config import VisionConfig

Turn = tuple[tuple[Part, ...], tuple[Part, ...]]
"""Question and answer of a shot."""
MAX_CUTS = 4
"""Most attempts to cut a prompt; retokenization may leave a few excess tokens each time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shots:
    """Example rows with answers that precede every prompt, always in this order."""

    examples: tuple[tuple[Row, tuple[Part, ...]], ...] = ()
    number: int | None = None
    """Number of shots per prompt: the first ones other than the prompt's row; None for all."""
    delimiter: str = ""
    """Text after each answer, unless the prompt is a chat."""


class PromptEncoder:
    """Turns rows into prompts according to settings; needs a tokenizer but no weights."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: PromptSettings,
        *,
        chat_template: str | None,
        max_tokens: int,
        shots: Shots = Shots(),
        vision: VisionConfig | None = None,
        sound: SoundConfig | None = None,
        vocab_size: int | None = None,
        decoder: Decoder | None = None,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Prepare the templates.

        Args:
            tokenizer: Tokenizer of the model.
            settings: Settings of the prompts.
            chat_template: Chat template of the model; None if it has none.
            max_tokens: Most tokens of a prompt that the model accepts.
            shots: Examples that precede every prompt.
            vision: What the model says of pictures; None if it takes none.
            sound: What the model says of sounds; None if it takes none.
            vocab_size: Number of token ids that the model knows; None for the tokenizer's.
            decoder: The decoder of a model whose encoder reads the prompts; None for others.
            enable_thinking: Whether chats ask for a thought; None for what their template does.
            tools: Functions that the model may call, from `checked_tools`.

        Raises:
            OptionsError: the model does not support the settings, or a shot yields no prompt.
        """
        self.tokenizer = tokenizer
        self.settings = settings
        check_decoder(
            decoder, decoder_prompt=settings.decoder_prompt, prefix_column=settings.prefix_column
        )
        self._media = MediaPrompts(tokenizer, vision, sound, settings, vocab_size=vocab_size)
        source = _template_source(settings, chat_template, vision)
        if tools:
            check_calls(tokenizer.control_pieces, source, decoder)
        pieces, allow = tokenizer.control_pieces, settings.allow_special_tokens
        self._chat = source and ChatTemplate(
            source,
            pieces,
            allow_special_tokens=allow,
            media_pieces=self._media.pieces,
            languages=_languages(settings, source),
            enable_thinking=enable_thinking,
            tools=tools,
        )
        self._template = _template(settings, pieces)
        self._decoder = decoder_prompts(
            tokenizer, settings.decoder_prompt, decoder, allow_special_tokens=allow
        )
        self._max_tokens, self._shots = max_tokens, shots
        self._turns = self._turns_of(shots)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer, in addition to the model's own end tokens."""
        of_gap = self._template.stop_token_ids if isinstance(self._template, Infill) else ()
        return (*response_ids(self.tokenizer.control_pieces), *of_gap)

    def _turns_of(self, shots: Shots) -> list[Turn]:
        with shots_own_errors():
            return [
                (self._content(row, self._media.of_row(row, decode=True)), answer)
                for row, answer in shots.examples
            ]

    @property
    def shot_files(self) -> tuple[MediaFile, ...]:
        """Files of the shots, which prompts show beside those of their rows."""
        parts = itertools.chain.from_iterable(content for content, _ in self._turns)
        return tuple(part.file for part in parts if isinstance(part, MediaPart))

    def __call__(self, row: Row, *, num_answer_tokens: int = 0) -> Prompt:
        """Return the prompt of one row.

        Args:
            row: A mapping of columns, or the prompt itself.
            num_answer_tokens: Number of the model's tokens to reserve for the answer.

        Raises:
            RecordError: the row yields no prompt, or one that is too long.
        """
        limit = self._max_tokens - (0 if self._decoder else num_answer_tokens)
        with rows_own_errors():
            prompt = self._prompt(row, min(limit, self.settings.max_prompt_tokens or limit))
            if self._decoder is None:
                return prompt
            return self._decoder.started(prompt, row, num_answer_tokens=num_answer_tokens)

    def _prompt(self, row: Row, max_tokens: int) -> Prompt:
        """Return the prompt of one row, its texts cut if necessary and allowed."""
        media = self._media.of_row(row)
        turns = self._turns_before(row, media)
        languages = self.settings.languages_of(row)
        prompt = self._encode(row, media, turns, languages)
        for _ in range(MAX_CUTS if self.settings.truncate else 0):
            excess = len(prompt.token_ids) - max_tokens
            if excess <= 0:
                return prompt
            row = self._cut(row, excess)
            prompt = self._encode(row, media, turns, languages, truncated=True)
        if len(prompt.token_ids) > max_tokens:
            raise PromptTooLongError(
                f"prompt: expected at most {max_tokens:,} tokens, got "
                f"{len(prompt.token_ids):,}; shorten it or allow it to be cut by truncate"
            )
        return prompt

    def _turns_before(self, row: Row, media: RowMedia) -> Sequence[Turn]:
        """Return the shots for a row, without the row itself."""
        if not self._turns:
            return ()
        content = self._content(row, media)
        return [turn for turn in self._turns if turn[0] != content][: self._shots.number]

    def _encode(
        self,
        row: Row,
        media: RowMedia,
        turns: Sequence[Turn],
        languages: tuple[str, str] | None,
        *,
        truncated: bool = False,
    ) -> Prompt:
        """Return the prompt of one row as it is."""
        system, column = self.settings.system, self.settings.messages_column
        if self._chat and column and not isinstance(row, str):
            messages = _messages(row, column)
            parts = self._chat.render(messages, system)
            if self._decoder is not None:
                self._decoder.check_conversation(messages[-1]["role"])
            of_row = itertools.chain.from_iterable(media.values())
            shown = self._media.of_messages(messages, of_row, column)
            return self._media.prompt(parts, shown, truncated=truncated)
        content = self._content(row, media)
        delimiter = Text(self._shots.delimiter)
        before = (part for asked, answer in turns for part in (*asked, *answer, delimiter))
        parts = (*before, *content)
        shown = [part for part in parts if isinstance(part, MediaPart)]
        if self._chat:
            said = [*itertools.chain.from_iterable(turns), self._asked(content, languages)]
            roles = itertools.cycle(("user", "assistant"))
            messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
            parts = self._chat.render(messages, system)
        return self._media.prompt(parts, shown, truncated=truncated)

    def _asked(self, content: tuple[Part, ...], languages: tuple[str, str] | None) -> Any:
        """Return the content of the last message: a prompt, or what is to be translated."""
        if languages is None:
            return content
        codes = language_codes(*languages)
        if not self.settings.image_columns:
            return [{"type": "text", "text": as_text(content), **codes}]
        if not content:
            raise RecordError("prompt: expected a picture to translate the text of, got none")
        return [{"type": "image", **codes} for _ in content]

    def _content(self, row: Row, media: RowMedia) -> tuple[Part, ...]:
        """Return a row's prompt before it is wrapped in a chat turn; shown come first."""
        template = self._template
        if isinstance(row, str):
            return (*itertools.chain.from_iterable(media.values()), *self._split(row))
        if isinstance(template, Infill):
            return template.render(row)
        named = template.fields if template else ()
        unnamed = (media[column] for column in media if column not in named)
        shown = tuple(itertools.chain.from_iterable(unnamed))
        if template:
            return (*shown, *template.render(row, media))
        if self.settings.has_languages and self.settings.image_columns:
            return shown
        return (*shown, *self._split(self._column_text(row)))

    def _split(self, text: str) -> tuple[Part, ...]:
        """Return a text's parts: with control tokens only where rows may write them."""
        return self.tokenizer.split(text) if self.settings.allow_special_tokens else (Text(text),)

    def _column_text(self, row: Mapping[str, Any]) -> str:
        column = self.settings.prompt_column
        if column is None:
            raise OptionsError(
                "settings: expected a prompt, prompt_column or messages_column for rows with "
                "columns, got none"
            )
        return column_text(row, column)

    def _cut(self, row: Row, num_tokens: int) -> Row:
        """Return a row's texts, the longest cut by `num_tokens`; markup stays intact."""
        if isinstance(row, str):
            return self._cut_text(row, num_tokens)
        if self.settings.messages_column:
            column = self.settings.messages_column
            messages = [_copied(message) for message in _messages(row, column)]
            if not (texts_of := list(_texts(messages))):
                return row
            holder, key = max(texts_of, key=lambda place: len(place[0][place[1]]))
            holder[key] = self._cut_text(holder[key], num_tokens)
            return {column: messages}
        uses = self.settings.text_columns.items()
        texts = {c: format_value(c, row[c]) for c, use in uses if use not in ("images", "audio")}
        if not texts:
            return row
        column = max(texts, key=lambda c: len(texts[c]))
        # The texts around a gap are cut at the ends away from it.
        far_ends: dict[str | None, Side] = {
            self.settings.prefix_column: "left",
            self.settings.suffix_column: "right",
        }
        return {**texts, column: self._cut_text(texts[column], num_tokens, far_ends.get(column))}

    def _cut_text(self, text: str, num_tokens: int, side: Side | None = None) -> str:
        ids = self.tokenizer.encode(self._split(text), add_bos=False)
        # If the cut splits a character of several byte tokens, the rest of it is removed too.
        if (side or self.settings.truncate) == "left":
            return self.tokenizer.decode(itertools.dropwhile(self._goes_on, ids[num_tokens:]))
        return self.tokenizer.decode(ids[:-num_tokens], final=False)

    def _goes_on(self, token_id: int) -> bool:
        """Return whether a token is a byte within a character."""
        return b"\x80" <= self.tokenizer.token_bytes(token_id)[:1] < b"\xc0"


def _template(settings: PromptSettings, pieces: Mapping[str, int]) -> Template | Infill | None:
    """Return what renders the prompt of a row; None for a column that is the prompt."""
    allow = settings.allow_special_tokens
    if settings.prompt is not None:
        return Template(settings.prompt, pieces, allow_special_tokens=allow)
    if settings.prefix_column is not None and settings.suffix_column is not None:
        columns = settings.prefix_column, settings.suffix_column
        return Infill(*columns, pieces, allow_special_tokens=allow)
    return None


def _languages(settings: PromptSettings, template: str | None) -> tuple[str, str] | None:
    """Return the codes that a template is tried with; messages and rows bring their own."""
    brings_own = settings.messages_column and template and takes_languages(template)
    return PROBES if brings_own else settings.languages


def _template_source(
    settings: PromptSettings, of_model: str | None, vision: VisionConfig | None
) -> str | None:
    """Return the chat template to use, or None for prompts without a chat."""
    if settings.prompt_format == "raw" or settings.prefix_column is not None:
        return None
    own = GEMMA_CHAT_TEMPLATE if settings.chat_template == "gemma" else settings.chat_template
    source = own or of_model
    needs_chat = {
        "languages": settings.has_languages,
        "a system prompt": settings.system is not None,
        "messages": settings.messages_column,
        "prompt_format chat": settings.prompt_format == "chat",
    }
    if vision is not None and vision.bidirectional == "prefix":
        if settings.chat_template or any(needs_chat.values()):
            asked = next((need for need, is_asked in needs_chat.items() if is_asked), "a template")
            raise OptionsError(f"prompt_format: expected no chat for PaliGemma, got {asked}")
        return None
    for need, is_asked in needs_chat.items():
        if is_asked and source is None:
            raise OptionsError(
                f"chat template: expected one for {need}, got a model without; "
                "pass --chat_template gemma"
            )
    return source


def _copied(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose texts can be changed."""
    content = message["content"]
    texts = content if isinstance(content, str) else [dict(part) for part in content]
    return {**message, "content": texts}


def _texts(messages: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where the texts of messages are: a mapping and a key each."""
    for message in messages:
        if isinstance(message["content"], str):
            yield message, "content"
        else:
            yield from ((p, "text") for p in message["content"] if p["type"] == "text")


def _messages(row: Mapping[str, Any], column: str) -> Sequence[Mapping[str, Any]]:
    messages = row.get(column)
    if messages is None:
        raise RecordError(f"column {column!r}: expected a list of messages, got null")
    return messages
