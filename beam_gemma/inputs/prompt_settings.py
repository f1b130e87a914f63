"""Settings that say how a row becomes a prompt, checked against each other."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from beam_gemma.errors import OptionsError
from beam_gemma.inputs.languages import LanguageSettings
from beam_gemma.inputs.row import ColumnUse
from beam_gemma.inputs.template import Template

PromptFormat = Literal["auto", "raw", "chat"]
Side = Literal["left", "right"]


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
    audio_columns: tuple[str, ...] = ()
    """Columns with sounds, which a prompt takes as it takes those with pictures."""
    split_audio: bool = False
    """True to split a sound that is too long into clips; otherwise such a row is an error."""
    allow_missing_audio: bool = False
    """True if a null stands for no sound; otherwise such a row is an error."""
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
        self._check_media()
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

    @property
    def _file_columns(self) -> tuple[str, ...]:
        return (*self.image_columns, *self.audio_columns)

    def _check_media(self) -> None:
        columns = self._file_columns
        if self.prefix_column and columns:
            raise OptionsError(
                "prefix_column: expected no columns of pictures or sounds beside a gap to fill, "
                f"got {', '.join(columns)}"
            )
        for column in columns:
            if columns.count(column) > 1 or column in (self.prompt_column, self.messages_column):
                raise OptionsError(
                    f"column {column!r}: expected once, for pictures or sounds alone, got it for "
                    "another use too"
                )

    def _check_decoder_prompt(self) -> None:
        for column in set(self._decoder_fields) & set(self._file_columns):
            raise OptionsError(
                f"decoder_prompt: expected texts, got {column!r}, a column of pictures or sounds"
            )

    def _check_translation(self) -> None:
        self.check_languages()
        if not self.has_languages:
            return
        others = ("prompt", "messages_column", "prefix_column", "system")
        given = [name for name in others if getattr(self, name) is not None]
        if len(self._file_columns) + (self.prompt_column is not None) > 1 or self.audio_columns:
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
        """Columns of a prompt's texts, pictures and sounds, with their use."""
        files: dict[str, ColumnUse] = dict.fromkeys(self.image_columns, "images")
        files |= dict.fromkeys(self.audio_columns, "audio")
        if self.prompt is not None:
            values: dict[str, ColumnUse] = dict.fromkeys(Template(self.prompt, ()).fields, "value")
            return values | files
        uses: dict[str | None, ColumnUse] = {
            self.prompt_column: "text",
            self.messages_column: "messages",
            self.prefix_column: "text",
            self.suffix_column: "text",
        }
        return {column: use for column, use in uses.items() if column is not None} | files
