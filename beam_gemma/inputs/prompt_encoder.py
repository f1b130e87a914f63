"""Conversion of rows to token ids: columns of a prompt, its markup, and its length limit.

A row is a mapping of columns, or a string that is the prompt itself.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from beam_gemma.errors import OptionsError, PromptTooLongError, RecordError
from beam_gemma.inputs.chat_template import GEMMA_CHAT_TEMPLATE, ChatTemplate
from beam_gemma.inputs.decoder_prompt import Decoder, check_decoder, decoder_prompts
from beam_gemma.inputs.image_prompt import ImagePrompts, PicturePart
from beam_gemma.inputs.infill import Infill
from beam_gemma.inputs.languages import (
    PROBES,
    LanguageSettings,
    language_codes,
    takes_languages,
)
from beam_gemma.inputs.row import (
    ColumnUse,
    ImageFile,
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
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.model.vision_config import VisionConfig

Turn = tuple[tuple[Part, ...], tuple[Part, ...]]
"""Question and answer of a shot."""
PromptFormat = Literal["auto", "raw", "chat"]
Side = Literal["left", "right"]
RowPictures = Mapping[str, tuple[PicturePart, ...]]
"""The pictures of a row, by column."""
MAX_CUTS = 4
"""Most attempts to cut a prompt; retokenization may leave a few excess tokens each time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSettings(LanguageSettings):
    """Settings to turn a row into a prompt; at most one of `SOURCES` may be set."""

    SOURCES: ClassVar[tuple[str, ...]] = (
        "prompt",
        "prompt_column",
        "messages_column",
        "prefix_column",
    )

    prompt: str | None = None
    """Template with column names in braces."""
    prompt_column: str | None = None
    """Column with the prompt."""
    messages_column: str | None = None
    """Column with a conversation: a list of messages with `role` and `content`."""
    prefix_column: str | None = None
    """Column with the text before a gap that the model fills; see `Infill`."""
    suffix_column: str | None = None
    """Column with the text after the gap."""
    image_columns: tuple[str, ...] = ()
    """Columns with pictures. A prompt template puts them where it names them; those that it does
    not name come before its text, in this order."""
    pan_and_scan: bool = False
    """True to add crops of a picture that is much wider than high, or higher than wide."""
    image_tokens: int | None = None
    """Most tokens of a picture, for models that take several sizes, such as Gemma 4. None for the
    model's default."""
    allow_missing_images: bool = False
    """True if a null stands for no picture; otherwise such a row is an error."""
    decoder_prompt: str | None = None
    """Template of the text that the decoder of an encoder-decoder, such as T5Gemma, starts with.
    The completion excludes it."""
    system: str | None = None
    """System prompt for all rows."""
    prompt_format: PromptFormat = "auto"
    """`chat` wraps the prompt in a user turn, `raw` uses it unchanged; `auto` is `chat` if there is
    a chat template."""
    chat_template: str | None = None
    """Text of a Jinja template, `gemma` for the built-in one, or None for the model's own."""
    allow_special_tokens: bool = False
    """True if control pieces in the values of rows become control tokens."""
    max_prompt_tokens: int | None = None
    """Most tokens of a prompt; None for the model's limit minus the tokens of the answer."""
    truncate: Side | None = None
    """Side on which a row's longest text is cut if the prompt is too long; None raises an error."""

    def __post_init__(self) -> None:
        given = [name for name in self.SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionsError(f"prompt: expected one source, got {' and '.join(given)}")
        self._check_infill()
        self._check_images()
        self._check_decoder_prompt()
        self._check_translation()
        if self.prompt_format == "raw" and (self.system is not None or self.messages_column):
            raise OptionsError(
                "prompt_format: expected chat for a system prompt or messages, got raw; "
                "leave it at auto"
            )
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise OptionsError(
                f"max_prompt_tokens: expected at least 1, got {self.max_prompt_tokens}"
            )

    def _check_infill(self) -> None:
        if (self.prefix_column is None) != (self.suffix_column is None):
            raise OptionsError(
                "prefix_column: expected prefix_column and suffix_column, got one of them"
            )
        if self.prefix_column and (self.system is not None or self.prompt_format == "chat"):
            raise OptionsError(
                "prefix_column: expected no chat around a gap to fill, got a system prompt or "
                "prompt_format chat"
            )

    def _check_images(self) -> None:
        if self.prefix_column and self.image_columns:
            raise OptionsError(
                "prefix_column: expected no image columns beside a gap to fill, got "
                f"{', '.join(self.image_columns)}"
            )
        for column in self.image_columns:
            if self.image_columns.count(column) > 1 or column in (
                self.prompt_column,
                self.messages_column,
            ):
                raise OptionsError(
                    f"column {column!r}: expected once, for pictures alone, got it for another use "
                    "too"
                )

    def _check_decoder_prompt(self) -> None:
        for column in set(self._decoder_fields) & set(self.image_columns):
            raise OptionsError(
                f"decoder_prompt: expected texts, got {column!r}, a column of pictures"
            )

    def _check_translation(self) -> None:
        self.check_languages()
        if not self.has_languages:
            return
        others = ("prompt", "messages_column", "prefix_column", "system")
        given = [name for name in others if getattr(self, name) is not None]
        if len(self.image_columns) + (self.prompt_column is not None) > 1:
            given.append(f"columns {', '.join(self.text_columns)}")
        if given or self.prompt_format == "raw":
            raise OptionsError(
                "source_lang: expected only a prompt_column or one image column to translate, got "
                f"{given[0] if given else 'prompt_format raw'}"
            )

    @property
    def prompt_columns(self) -> dict[str, ColumnUse]:
        """Columns that a prompt is made of, with their use; those of the decoder prompt last."""
        columns = self.text_columns | self.language_columns
        more = [field for field in self._decoder_fields if field not in columns]
        return columns | dict.fromkeys(more, "value")

    @property
    def _decoder_fields(self) -> tuple[str, ...]:
        if self.decoder_prompt is None:
            return ()
        return Template(self.decoder_prompt, (), name="decoder_prompt").fields

    @property
    def text_columns(self) -> dict[str, ColumnUse]:
        """Columns of a prompt's texts and pictures, with their use."""
        images: dict[str, ColumnUse] = dict.fromkeys(self.image_columns, "images")
        if self.prompt is not None:
            values: dict[str, ColumnUse] = dict.fromkeys(Template(self.prompt, ()).fields, "value")
            return values | images
        uses: dict[str | None, ColumnUse] = {
            self.prompt_column: "text",
            self.messages_column: "messages",
            self.prefix_column: "text",
            self.suffix_column: "text",
        }
        return {column: use for column, use in uses.items() if column is not None} | images


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
        self._images = ImagePrompts(tokenizer, vision, settings, vocab_size=vocab_size)
        source = _template_source(settings, chat_template, vision)
        if tools:
            check_calls(tokenizer.control_pieces, source, decoder)
        pieces, allow = tokenizer.control_pieces, settings.allow_special_tokens
        self._chat = source and ChatTemplate(
            source,
            pieces,
            allow_special_tokens=allow,
            image_piece=self._images.piece,
            languages=_languages(settings, source),
            enable_thinking=enable_thinking,
            tools=tools,
        )
        self._template = _template(settings, pieces)
        self.stop_token_ids = response_ids(pieces)
        """Token ids that end an answer, in addition to the model's own end tokens."""
        if isinstance(self._template, Infill):
            self.stop_token_ids += self._template.stop_token_ids
        self._decoder = decoder_prompts(
            tokenizer, settings.decoder_prompt, decoder, allow_special_tokens=allow
        )
        self._max_tokens, self._shots = max_tokens, shots
        self._turns = self._turns_of(shots)

    def _turns_of(self, shots: Shots) -> list[Turn]:
        with shots_own_errors():
            return [
                (self._content(row, self._images.of_row(row, decode=True)), answer)
                for row, answer in shots.examples
            ]

    @property
    def shot_images(self) -> tuple[ImageFile, ...]:
        """Pictures of the shots, which prompts show beside those of their rows."""
        parts = itertools.chain.from_iterable(content for content, _ in self._turns)
        return tuple(part.image for part in parts if isinstance(part, PicturePart))

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
        images = self._images.of_row(row)
        turns = self._turns_before(row, images)
        languages = self.settings.languages_of(row)
        prompt = self._encode(row, images, turns, languages)
        for _ in range(MAX_CUTS if self.settings.truncate else 0):
            excess = len(prompt.token_ids) - max_tokens
            if excess <= 0:
                return prompt
            row = self._cut(row, excess)
            prompt = self._encode(row, images, turns, languages, truncated=True)
        if len(prompt.token_ids) > max_tokens:
            raise PromptTooLongError(
                f"prompt: expected at most {max_tokens:,} tokens, got "
                f"{len(prompt.token_ids):,}; shorten it or allow it to be cut by truncate"
            )
        return prompt

    def _turns_before(self, row: Row, images: RowPictures) -> Sequence[Turn]:
        """Return the shots for a row, without the row itself."""
        if not self._turns:
            return ()
        content = self._content(row, images)
        return [turn for turn in self._turns if turn[0] != content][: self._shots.number]

    def _encode(
        self,
        row: Row,
        images: RowPictures,
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
            of_row = itertools.chain.from_iterable(images.values())
            pictures = self._images.of_messages(messages, of_row, column)
            return self._images.prompt(parts, pictures, truncated=truncated)
        content = self._content(row, images)
        delimiter = Text(self._shots.delimiter)
        before = (part for asked, answer in turns for part in (*asked, *answer, delimiter))
        parts = (*before, *content)
        pictures = [part for part in parts if isinstance(part, PicturePart)]
        if self._chat:
            said = [*itertools.chain.from_iterable(turns), self._asked(content, languages)]
            roles = itertools.cycle(("user", "assistant"))
            messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
            parts = self._chat.render(messages, system)
        return self._images.prompt(parts, pictures, truncated=truncated)

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

    def _content(self, row: Row, images: RowPictures) -> tuple[Part, ...]:
        """Return a row's prompt before it is wrapped in a chat turn; pictures come first."""
        template = self._template
        if isinstance(row, str):
            return (*itertools.chain.from_iterable(images.values()), *self._split(row))
        if isinstance(template, Infill):
            return template.render(row)
        named = template.fields if template else ()
        unnamed = (images[column] for column in images if column not in named)
        pictures = tuple(itertools.chain.from_iterable(unnamed))
        if template:
            return (*pictures, *template.render(row, images))
        if self.settings.has_languages and self.settings.image_columns:
            return pictures
        return (*pictures, *self._split(self._column_text(row)))

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
        texts = {c: format_value(c, row[c]) for c, use in uses if use != "images"}
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
