"""Encode texts to embed: select the column, add the prompt and limit the length."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from beam_gemma.errors import OptionsError, PromptTooLongError, RecordError, nearest
from beam_gemma.inputs.row import ColumnUse, Prompt, Row, rows_own_errors
from beam_gemma.inputs.template import column_text, column_value
from beam_gemma.model.embedding_config import EmbeddingConfig
from beam_gemma.model.markup import Control, Part, Text
from beam_gemma.model.tokenizer import Tokenizer
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
    """Settings of the embed task: the text of each row, and the width and type of its embedding.

    Example:
        >>> settings = EmbedSettings(text_column="body", prompt_name="document", truncate_dim=256)
        >>> list(settings.columns)
        ['body']
    """

    SOURCES: ClassVar[tuple[str, ...]] = ("text_column",)

    text_column: str | None = None
    """Column that holds the text."""
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

    @property
    def columns(self) -> Mapping[str, ColumnUse]:
        """Columns that the task reads."""
        return {column: "text" for column in (self.text_column, self.title_column) if column}

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
        return dataclasses.replace(self, size=size)


class TextEncoder:
    """Turns rows into token ids as the model's own library does; needs no model weights."""

    def __init__(
        self, tokenizer: Tokenizer, settings: EmbedSettings, config: EmbeddingConfig
    ) -> None:
        """Initialize the encoder and look up the prompt.

        Args:
            tokenizer: The model's tokenizer.
            settings: The settings of the task.
            config: The model's embedding configuration.

        Raises:
            OptionsError: the model has no prompt named `prompt_name`.
        """
        self.tokenizer = tokenizer
        self._settings = settings
        self._config = config
        self._prompt = "" if settings.title_column else _prompt(settings, config)

    def __call__(self, row: Row) -> Prompt:
        """Return a row's text, preceded by its prompt, as token ids.

        Raises:
            RecordError: the row has no text, or its text is too long.
        """
        with rows_own_errors():
            return self._encode(Text(self._prompt_of(row) + self._text(row)))

    def _encode(self, text: Text) -> Prompt:
        before: list[Part] = [Control("<bos>")] if self._config.add_bos else []
        after: list[Part] = [Control("<eos>")] if self._config.add_eos else []
        ids = self.tokenizer.encode([text], add_bos=False)
        room = self._config.max_tokens - len(before) - len(after)
        if len(ids) > room and not self._settings.truncate:
            raise PromptTooLongError(
                f"text: expected at most {self._config.max_tokens:,} tokens, got "
                f"{len(ids) + len(before) + len(after):,}; shorten it or allow it to be cut by "
                "truncate"
            )
        token_ids = [
            *([self.tokenizer.bos_token_id] if before else []),
            *ids[:room],
            *([self.tokenizer.eos_token_id] if after else []),
        ]
        if not token_ids:
            raise RecordError("text: expected at least one token, got an empty text")
        return Prompt(
            parts=(*before, text, *after), token_ids=tuple(token_ids), truncated=len(ids) > room
        )

    def _text(self, row: Row) -> str:
        if isinstance(row, str):
            return row
        column = self._settings.text_column
        if column is None:
            raise OptionsError("settings: expected a text_column for rows with columns, got none")
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
