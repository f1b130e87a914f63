"""Encode texts and pictures to embed: select the columns, add the prompt and limit the length.

A prompt comes first, then the pictures of the row, then its text, all of them without space between
them. That is what the chat template of EmbeddingGemma 2 writes for a system message with the prompt
and a user's message with an image before a text; `<bos>` and `<eos>` come around it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, Literal

import pyarrow as pa

from beam_gemma.errors import OptionsError, PromptTooLongError, RecordError, nearest
from beam_gemma.inputs.media_prompt import MediaPrompts
from beam_gemma.inputs.row import ColumnUse, MediaPart, Prompt, Row, rows_own_errors
from beam_gemma.inputs.template import column_text, column_value
from beam_gemma.model.embedding_config import EmbeddingConfig
from beam_gemma.model.markup import Control, Part, Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.model.vision_config import VisionConfig
from beam_gemma.tasks.interface import Settings

EmbeddingDtype = Literal["float32", "float16"]
ARROW_TYPES = {"float32": pa.float32(), "float16": pa.float16()}
DOCUMENT = "document"
NO_TITLE = "none"
"""Title used in the prompt of a document that has none."""
LEAST_DIM = 128
"""Smallest width, in values, to which an embedding can be cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedSettings(Settings):
    """Settings of the embed task: what each row has to embed, and the width and type of its result.

    Example:
        >>> settings = EmbedSettings(text_column="body", prompt_name="document", truncate_dim=256)
        >>> list(settings.columns)
        ['body']
    """

    SOURCES: ClassVar[tuple[str, ...]] = ("text_column", "image_columns")

    text_column: str | None = None
    """Column that holds the text. A null stands for no text in a row that has a picture."""
    image_columns: tuple[str, ...] = ()
    """Columns with pictures, which come before the text in this order."""
    image_tokens: int | None = None
    """Most tokens of a picture; None for the model's default."""
    allow_missing_images: bool = False
    """True if a null stands for no picture; otherwise such a row is an error."""
    title_column: str | None = None
    """Column that holds a document's title, which becomes part of its prompt."""
    prompt_name: str | None = None
    """Name of one of the model's prompts, such as `query`; case does not matter."""
    prompt: str | None = None
    """Prefix for each text, instead of one of the model's prompts."""
    truncate: bool = False
    """True to cut off the end of a text that is too long; False makes its row an error."""
    truncate_dim: int | None = None
    """Number of leading values to keep of each embedding, rescaled to length 1; None for all."""
    embedding_dtype: EmbeddingDtype = "float32"
    size: int | None = None
    """Width of the model's embeddings; set by the model handler."""

    def __post_init__(self) -> None:
        names = ("prompt", "prompt_name", "title_column")
        given = [name for name in names if getattr(self, name) is not None]
        is_document = (self.prompt_name or "").lower() == DOCUMENT
        if len(given) > 1 and (given != ["prompt_name", "title_column"] or not is_document):
            raise OptionsError(f"prompt: expected one source, got {' and '.join(given)}")
        self._check_images()

    def _check_images(self) -> None:
        for column in self.image_columns:
            if (*self.image_columns, self.text_column, self.title_column).count(column) > 1:
                raise OptionsError(
                    f"column {column!r}: expected once, for pictures alone, got it for another use "
                    "too"
                )
        if not self.image_columns and (self.allow_missing_images or self.image_tokens is not None):
            name = "allow_missing_images" if self.allow_missing_images else "image_tokens"
            raise OptionsError(f"{name}: expected image_columns beside it, got none")

    @property
    def has_source(self) -> bool:
        """True if rows have columns; otherwise each row is a string, used as the text."""
        return self.text_column is not None or bool(self.image_columns)

    @property
    def columns(self) -> Mapping[str, ColumnUse]:
        """Columns that the task reads."""
        texts = (self.text_column, self.title_column)
        return {
            **{column: "text" for column in texts if column},
            **dict.fromkeys(self.image_columns, "images"),
        }

    @property
    def result_schema(self) -> pa.Schema:
        """Columns that the task adds to each row."""
        size = self.truncate_dim or self.size
        if size is None:
            raise OptionsError("settings: expected the size of the model's embeddings, got none")
        columns = {
            "embedding": pa.list_(ARROW_TYPES[self.embedding_dtype], size),
            "num_tokens": pa.int64(),
            "truncated": pa.bool_(),
            "error": pa.string(),
        }
        return pa.schema(columns)

    def of_size(self, size: int) -> "EmbedSettings":
        """Return a copy of these settings for embeddings of the given width.

        Raises:
            OptionsError: embeddings of that width cannot be cut to `truncate_dim`.
        """
        smaller = [1 << i for i in reversed(range(size.bit_length())) if LEAST_DIM <= 1 << i < size]
        if self.truncate_dim not in (None, size, *smaller):
            raise OptionsError(
                f"truncate_dim: expected {', '.join(map(str, [size, *smaller]))}, "
                f"got {self.truncate_dim}"
            )
        return replace(self, size=size)


class TextEncoder:
    """Turns rows into token ids as the model's own library does; needs no model weights."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: EmbedSettings,
        config: EmbeddingConfig,
        *,
        vision: VisionConfig | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Initialize the encoder and look up the prompt.

        Args:
            tokenizer: The model's tokenizer.
            settings: The settings of the task.
            config: The model's embedding configuration.
            vision: What the model says of pictures; None if it embeds none.
            vocab_size: Number of token ids that the model knows; None for the tokenizer's.

        Raises:
            OptionsError: the model has no prompt named `prompt_name`, or does not support the
                settings of pictures.
        """
        self.tokenizer = tokenizer
        self._settings = settings
        self._config = config
        self._prompt = "" if settings.title_column else _prompt(settings, config)
        self._images = None
        if settings.image_columns:
            if not config.add_bos:
                raise OptionsError(
                    "image_columns: expected a model whose texts start with <bos>, got one without"
                )
            self._images = MediaPrompts(tokenizer, vision, None, settings, vocab_size=vocab_size)
        before: tuple[Part, ...] = (Control("<bos>"),) if config.add_bos else ()
        ids = tokenizer.encode(before, add_bos=False)
        self._start = Prompt(parts=before, token_ids=tuple(ids))
        self._end: tuple[Part, ...] = (Control("<eos>"),) if config.add_eos else ()

    def __call__(self, row: Row) -> Prompt:
        """Return what a row has to embed, preceded by its prompt, as token ids.

        Raises:
            RecordError: the row has nothing to embed or is too long, or a value is no picture.
        """
        with rows_own_errors():
            before = self._prompt_of(row)
            pictures = self._pictures(row)
            if self._images is None or not pictures:
                return self._finished(self._start, before + self._text(row))
            texts = (Text(before),) if before else ()
            parts = (*self._start.parts, *texts, *pictures)
            return self._finished(self._images.prompt(parts, pictures), self._text_beside(row))

    def _pictures(self, row: Row) -> tuple[MediaPart, ...]:
        """Return the pictures of a row, in the order of the image columns."""
        if self._images is None:
            return ()
        return tuple(chain.from_iterable(self._images.of_row(row).values()))

    def _finished(self, start: Prompt, text: str) -> Prompt:
        """Return a prompt with a text, which is cut if it must and may be, and `<eos>`."""
        ids = self.tokenizer.encode([Text(text)], add_bos=False)
        num_others = len(start.token_ids) + len(self._end)
        room = self._config.max_tokens - num_others
        if room < 0 or (len(ids) > room and not self._settings.truncate):
            remedy = (
                "take fewer pictures, or fewer tokens for each by image_tokens"
                if room < 0
                else "shorten it or allow it to be cut by truncate"
            )
            raise PromptTooLongError(
                f"text: expected at most {self._config.max_tokens:,} tokens, got "
                f"{len(ids) + num_others:,}; {remedy}"
            )
        token_ids = (
            *start.token_ids,
            *ids[:room],
            *self.tokenizer.encode(self._end, add_bos=False),
        )
        if not token_ids:
            raise RecordError("text: expected at least one token, got an empty text")
        parts = (*start.parts, Text(text), *self._end)
        return replace(start, parts=parts, token_ids=token_ids, truncated=len(ids) > room)

    def _text(self, row: Row) -> str:
        if isinstance(row, str):
            return row
        column = self._settings.text_column
        if column is not None:
            return column_text(row, column)
        if self._images is not None:
            names = ", ".join(map(repr, self._settings.image_columns))
            raise RecordError(f"row: expected a picture in column {names}, got null")
        raise OptionsError("settings: expected a text_column for rows with columns, got none")

    def _text_beside(self, row: Row) -> str:
        """Return the text of a row with pictures, which may have none."""
        column = self._settings.text_column
        if isinstance(row, str) or column is None or column_value(row, column) is None:
            return ""
        return column_text(row, column)

    def _prompt_of(self, row: Row) -> str:
        column = self._settings.title_column
        if column is None:
            return self._prompt
        title = None if isinstance(row, str) else column_value(row, column)
        return f"title: {title or NO_TITLE} | text: "


def _prompt(settings: EmbedSettings, config: EmbeddingConfig) -> str:
    """Return the prefix for each text."""
    if settings.prompt is not None:
        return settings.prompt
    name = settings.prompt_name or config.default_prompt_name
    if name is None:
        return ""
    prompts = {known.lower(): prompt for known, prompt in config.prompts.items()}
    if name.lower() not in prompts:
        known = ", ".join(config.prompts) or "none, as the model has no prompts"
        raise OptionsError(
            f"prompt_name: expected one of {known}, got {name!r}{nearest(name, config.prompts)}"
        )
    return prompts[name.lower()]
