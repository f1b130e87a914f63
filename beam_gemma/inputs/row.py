"""Rows and their prompts: types for both, uses of columns, and errors of rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from beam_gemma.errors import BeamGemmaError, OptionsError, RecordError
from beam_gemma.model.markup import Control, Part

Row = Mapping[str, Any] | str


ColumnUse = Literal["text", "messages", "value", "key"]
"""Use of a column in a task: a text, a conversation, a value for a template, or a key that names
its row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Prompt of one row, as parts and as token ids."""

    parts: tuple[Part, ...]
    token_ids: tuple[int, ...]
    truncated: bool = False

    @property
    def text(self) -> str:
        """Readable text of the prompt."""
        return as_text(self.parts)

    @property
    def identity(self) -> list[Any]:
        """JSON-serializable value that is equal only for equal prompts."""
        return [self.token_ids, self.truncated]

    @classmethod
    def of_identity(cls, identity: list[Any]) -> "Prompt":
        """Return the prompt of an identity, without its parts."""
        token_ids, truncated = identity
        return cls(parts=(), token_ids=tuple(token_ids), truncated=truncated)


def as_text(parts: Sequence[Part]) -> str:
    """Return parts as readable text, including control pieces."""
    return "".join(part.piece if isinstance(part, Control) else part.text for part in parts)


@contextmanager
def rows_own_errors() -> Iterator[None]:
    """Context manager that turns unexpected exceptions into an error of the current row.

    Raises:
        RecordError: the block raised an exception that is no `BeamGemmaError`.
    """
    try:
        yield
    except BeamGemmaError:
        raise
    except Exception as error:  # converting a row's values to text may raise anything
        raise RecordError(
            f"row: expected one that makes a prompt, got {type(error).__name__}: {error}"
        ) from error


@contextmanager
def shots_own_errors() -> Iterator[None]:
    """Context manager that turns exceptions into an error of the few-shot examples.

    It quotes no row: a `RecordError` about a value names only its column, and of other exceptions,
    whose messages may hold anything, it gives the type.

    Raises:
        OptionsError: the block raised an exception.
    """
    expected = "shots: expected rows that make a prompt and a label, got"
    try:
        yield
    except RecordError as error:
        raise OptionsError(f"{expected}: {error}") from error
    except BeamGemmaError:
        raise
    except Exception as error:  # converting a row's values to text may raise anything
        raise OptionsError(f"{expected} {type(error).__name__} from one of them") from error
