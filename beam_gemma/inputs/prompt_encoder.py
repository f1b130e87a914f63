"""Rows to token ids: which columns make a prompt, in which markup, and how long it may be.

A row is a mapping of columns, or a string that is the prompt itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from beam_gemma.errors import OptionsError, PromptTooLongError, RecordError
from beam_gemma.inputs.chat_template import GEMMA_CHAT_TEMPLATE, ChatTemplate
from beam_gemma.inputs.infill import Infill
from beam_gemma.inputs.row import ColumnUse, Prompt, Row, rows_own_errors
from beam_gemma.inputs.template import Template, format_value
from beam_gemma.model.markup import Part, Text
from beam_gemma.model.tokenizer import Tokenizer

Turn = tuple[tuple[Part, ...], tuple[Part, ...]]
"""What a shot asks and what it answers."""
PromptFormat = Literal["auto", "raw", "chat"]
Side = Literal["left", "right"]
MAX_CUTS = 4
"""Attempts at cutting a prompt; each may leave a few tokens too many where pieces merge anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSettings:
    """How a row becomes a prompt. At most one of its sources is given."""

    SOURCES: ClassVar[tuple[str, ...]] = (
        "prompt",
        "prompt_column",
        "messages_column",
        "prefix_column",
    )

    prompt: str | None = None
    """Template with column names in braces."""
    prompt_column: str | None = None
    """Column that holds the prompt."""
    messages_column: str | None = None
    """Column that holds a conversation: a list of `role` and `content`."""
    prefix_column: str | None = None
    """Column that holds the text before a gap that the model is to fill; see `Infill`."""
    suffix_column: str | None = None
    """Column that holds the text after the gap."""
    system: str | None = None
    """System prompt of every row."""
    prompt_format: PromptFormat = "auto"
    """`chat` makes the prompt a user's turn, `raw` takes it as it stands; `auto` is `chat` where
    there is a chat template."""
    chat_template: str | None = None
    """None for the model's own, `gemma` for the built-in one, or the text of a Jinja template."""
    allow_special_tokens: bool = False
    """Whether control pieces in the values of rows are control tokens."""
    max_prompt_tokens: int | None = None
    """Longest prompt; None for what the model takes beside its answer."""
    truncate: Side | None = None
    """Side where the longest text of a row is cut if its prompt is too long; None is an error."""

    def __post_init__(self) -> None:
        given = [name for name in self.SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionsError(f"prompt: expected one source, got {' and '.join(given)}")
        self._check_infill()
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
    def prompt_columns(self) -> dict[str, ColumnUse]:
        """Columns that a prompt is made of, and how."""
        if self.prompt is not None:
            return dict.fromkeys(Template(self.prompt, ()).fields, "value")
        uses: dict[str | None, ColumnUse] = {
            self.prompt_column: "text",
            self.messages_column: "messages",
            self.prefix_column: "text",
            self.suffix_column: "text",
        }
        return {column: use for column, use in uses.items() if column is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shots:
    """Rows with their answers that come before every prompt, always in this order."""

    examples: tuple[tuple[Row, tuple[Part, ...]], ...] = ()
    number: int | None = None
    """Of these before each prompt, the first that are not its own row; None for all."""
    delimiter: str = ""
    """Follows each answer, where the prompt is no chat."""


class PromptEncoder:
    """Makes prompts of rows, as the settings say; needs a tokenizer but no weights."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: PromptSettings,
        *,
        chat_template: str | None,
        max_tokens: int,
        shots: Shots = Shots(),
    ) -> None:
        """Prepare the templates.

        Args:
            tokenizer: The model's.
            settings: What to ask.
            chat_template: The model's own, where it has one.
            max_tokens: Longest prompt that the model takes.
            shots: What comes before every prompt.

        Raises:
            OptionsError: the model cannot be asked so, or a shot makes no prompt.
        """
        self.tokenizer = tokenizer
        self.settings = settings
        source = _template_source(settings, chat_template)
        pieces, allow = tokenizer.control_pieces, settings.allow_special_tokens
        self._chat = source and ChatTemplate(source, pieces, allow_special_tokens=allow)
        self._template: Template | Infill | None = None
        self.stop_token_ids: tuple[int, ...] = ()
        """What ends an answer to such prompts, beside the model's own end tokens."""
        if settings.prompt is not None:
            self._template = Template(settings.prompt, pieces, allow_special_tokens=allow)
        elif settings.prefix_column is not None and settings.suffix_column is not None:
            columns = settings.prefix_column, settings.suffix_column
            self._template = Infill(*columns, pieces, allow_special_tokens=allow)
            self.stop_token_ids = self._template.stop_token_ids
        self._max_tokens = max_tokens
        self._shots = shots
        try:
            self._turns = [(self._content(row), answer) for row, answer in shots.examples]
        except RecordError as error:
            raise OptionsError(f"shots: expected rows with a prompt, got: {error}") from error

    def __call__(self, row: Row, *, num_answer_tokens: int = 0) -> Prompt:
        """Return the prompt of one row.

        Args:
            row: A mapping of columns, or the prompt itself.
            num_answer_tokens: To leave free, of what the model takes.

        Raises:
            RecordError: the row makes no prompt, or one that is too long.
        """
        limit = self._max_tokens - num_answer_tokens
        with rows_own_errors():
            return self._prompt(row, min(limit, self.settings.max_prompt_tokens or limit))

    def _prompt(self, row: Row, max_tokens: int) -> Prompt:
        """Return the prompt of one row, cut where that is allowed."""
        turns = self._turns_before(row)
        prompt = self._encode(row, turns)
        for _ in range(MAX_CUTS if self.settings.truncate else 0):
            excess = len(prompt.token_ids) - max_tokens
            if excess <= 0:
                return prompt
            row = self._cut(row, excess)
            prompt = self._encode(row, turns, truncated=True)
        if len(prompt.token_ids) > max_tokens:
            raise PromptTooLongError(
                f"prompt: expected at most {max_tokens:,} tokens, got "
                f"{len(prompt.token_ids):,}; shorten it or allow it to be cut by truncate"
            )
        return prompt

    def _turns_before(self, row: Row) -> Sequence[Turn]:
        """Return the shots of a row, which is never among them itself."""
        if not self._turns:
            return ()
        content = self._content(row)
        return [turn for turn in self._turns if turn[0] != content][: self._shots.number]

    def _encode(self, row: Row, turns: Sequence[Turn], *, truncated: bool = False) -> Prompt:
        parts = self._parts(row, turns)
        ids = tuple(self.tokenizer.encode(parts))
        return Prompt(parts=parts, token_ids=ids, truncated=truncated)

    def _parts(self, row: Row, turns: Sequence[Turn]) -> tuple[Part, ...]:
        system = self.settings.system
        if self._chat and self.settings.messages_column and not isinstance(row, str):
            return self._chat.render(_messages(row, self.settings.messages_column), system)
        content = self._content(row)
        if not self._chat:
            delimiter = Text(self._shots.delimiter)
            before = (part for asked, answer in turns for part in (*asked, *answer, delimiter))
            return (*before, *content)
        messages = [
            {"role": role, "content": said}
            for turn in turns
            for role, said in zip(("user", "assistant"), turn, strict=True)
        ]
        return self._chat.render([*messages, {"role": "user", "content": content}], system)

    def _content(self, row: Row) -> tuple[Part, ...]:
        """Return the prompt before it becomes a turn of a chat."""
        if self._template and not isinstance(row, str):
            return self._template.render(row)
        text = row if isinstance(row, str) else self._column_text(row)
        return self.tokenizer.split(text) if self.settings.allow_special_tokens else (Text(text),)

    def _column_text(self, row: Mapping[str, Any]) -> str:
        column = self.settings.prompt_column
        if column is None:
            raise OptionsError(
                "settings: expected a prompt, prompt_column or messages_column for rows with "
                "columns, got none"
            )
        if column not in row:
            raise RecordError(f"column {column!r}: expected in every row, got {', '.join(row)}")
        return format_value(column, row[column])

    def _cut(self, row: Row, num_tokens: int) -> Row:
        """Return a row whose longest text is shorter by so many tokens; markup stays whole."""
        if isinstance(row, str):
            return self._cut_text(row, num_tokens)
        if self.settings.messages_column:
            column = self.settings.messages_column
            messages = [dict(message) for message in _messages(row, column)]
            longest = max(messages, key=lambda message: len(message["content"]))
            longest["content"] = self._cut_text(longest["content"], num_tokens)
            return {column: messages}
        texts = {c: format_value(c, row[c]) for c in self.settings.prompt_columns}
        if not texts:
            return row
        column = max(texts, key=lambda c: len(texts[c]))
        # The text around a gap is cut at its far ends.
        far_ends: dict[str | None, Side] = {
            self.settings.prefix_column: "left",
            self.settings.suffix_column: "right",
        }
        return {**texts, column: self._cut_text(texts[column], num_tokens, far_ends.get(column))}

    def _cut_text(self, text: str, num_tokens: int, side: Side | None = None) -> str:
        parts = self.tokenizer.split(text) if self.settings.allow_special_tokens else (Text(text),)
        ids = self.tokenizer.encode(parts, add_bos=False)
        # A character of several byte tokens may be cut through; what is left of it goes too.
        if (side or self.settings.truncate) == "left":
            return self.tokenizer.decode(ids[num_tokens:]).lstrip("\ufffd")
        return self.tokenizer.decode(ids[:-num_tokens]).rstrip("\ufffd")


def _template_source(settings: PromptSettings, of_model: str | None) -> str | None:
    """Return the chat template to use, or None for prompts that are no chat."""
    if settings.prompt_format == "raw" or settings.prefix_column is not None:
        return None
    own = GEMMA_CHAT_TEMPLATE if settings.chat_template == "gemma" else settings.chat_template
    source = own or of_model
    needs_chat = {
        "a system prompt": settings.system is not None,
        "messages": settings.messages_column,
        "prompt_format chat": settings.prompt_format == "chat",
    }
    for need, is_asked in needs_chat.items():
        if is_asked and source is None:
            raise OptionsError(
                f"chat template: expected one for {need}, got a model without; "
                "pass --chat_template gemma"
            )
    return source


def _messages(row: Mapping[str, Any], column: str) -> Sequence[Mapping[str, Any]]:
    messages = row.get(column)
    if messages is None:
        raise RecordError(f"column {column!r}: expected a list of messages, got null")
    return messages
