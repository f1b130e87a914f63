"""What the Beam layer asks of a task: generate, embed or classify."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar, Protocol, runtime_checkable

import pyarrow as pa

from beam_gemma.inputs.row import ColumnUse, Prompt, Row

Encoder = Callable[[Row], Prompt]
"""Makes what the model sees of one row; needs no weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a row asks of the model."""

    prompts: tuple[Prompt, ...]
    """One, or one for each question."""
    sequences: tuple[tuple[int, ...], ...]
    """Token ids that are computed before anything new: the prompts, perhaps with labels."""


class Settings(ABC):
    """What to ask of each row."""

    __slots__ = ()

    SOURCES: ClassVar[tuple[str, ...]]
    """The settings of which one says what a row's input is made of."""

    @property
    def has_source(self) -> bool:
        """Whether one of them is given; without any, each example is the input."""
        return any(getattr(self, name) is not None for name in self.SOURCES)

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, ColumnUse]:
        """The columns that they take."""

    @property
    @abstractmethod
    def result_schema(self) -> pa.Schema:
        """Columns that each row gains."""

    @property
    def is_sampled(self) -> bool:
        """Whether results are drawn, so that rows that ask the same may differ in theirs."""
        return False

    @property
    def max_new_tokens(self) -> int:
        """Most tokens that a row's completion may have."""
        return 0

    @property
    def parameters(self) -> dict[str, Any]:
        """What a result depends on beside the model and the request of its row, as JSON holds it.

        Templates are not in it, since requests are made of them.
        """
        columns = {field.name: str(field.type) for field in self.result_schema}
        return {"columns": columns, **self._parameters()}

    def _parameters(self) -> dict[str, Any]:
        """Return those of the task, beside the columns."""
        return {}


@runtime_checkable
class Model(Protocol):
    """A task with its model loaded, in this process or behind a proxy."""

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the result columns of each row."""

    def take_counts(self) -> dict[str, int]:
        """Return what has been counted and not been returned yet."""

    def take_pulse(self) -> dict[str, Any]:
        """Return the samples of its work that have not been returned yet; see `pulse`."""


class StreamingModel(Model, Protocol):
    """A model in this process, which can be watched while it is at work."""

    def stream(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row's index and result columns as soon as they are known."""

    def drain(self) -> None:
        """Begin with no other row: streams end with those that have begun."""

    def num_tokens(self) -> int:
        """Return the tokens computed so far, of prompts and of completions."""


def in_order(stream: Iterable[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the results of a stream in the order of their rows."""
    return [result for _, result in sorted(stream, key=itemgetter(0))]


def task_name(settings: Settings) -> str:
    """Return what a task is called: generate, classify, moderate or embed."""
    return type(settings).__name__.removesuffix("Settings").lower()
