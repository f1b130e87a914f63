"""A row and what becomes of it: the columns that are read, the prompt that is made, its errors."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from beam_gemma.errors import BeamGemmaError, RecordError
from beam_gemma.model.markup import Control, Part

Row = Mapping[str, Any] | str


ColumnUse = Literal["text", "messages", "value", "key"]
"""What a task makes of a column: a text, a conversation, a value that is written into a template,
or a name for its row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What the model sees of one row."""

    parts: tuple[Part, ...]
    token_ids: tuple[int, ...]
    truncated: bool = False

    @property
    def text(self) -> str:
        """The prompt as a person reads it."""
        return as_text(self.parts)

    @property
    def identity(self) -> list[Any]:
        """What tells it from other prompts, as JSON holds it."""
        return [self.token_ids, self.truncated]


def as_text(parts: Sequence[Part]) -> str:
    """Return parts as a person reads them."""
    return "".join(part.piece if isinstance(part, Control) else part.text for part in parts)


@contextmanager
def rows_own_errors() -> Iterator[None]:
    """Make what trips over a row an error of that row, which may hold anything.

    Raises:
        RecordError: something went wrong inside.
    """
    try:
        yield
    except BeamGemmaError:
        raise
    except Exception as error:  # whatever a row's values do when they are written as text
        raise RecordError(
            f"row: expected one that makes a prompt, got {type(error).__name__}: {error}"
        ) from error
