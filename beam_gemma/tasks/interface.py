"""Interface between the Beam layer and the tasks: generate, classify, moderate and embed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar, Protocol, runtime_checkable

import pyarrow as pa

from beam_gemma.inputs.row import ColumnUse, Prompt, Row

Encoder = Callable[[Row], Prompt]
"""Function that turns a row into its prompt; needs no model weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Token ids to compute for one row."""

    prompts: tuple[Prompt, ...]
    """One prompt, or one per question."""
    sequences: tuple[tuple[int, ...], ...]
    """Token ids to compute before any new token: the prompts, possibly with labels. Those of
    pictures and sounds are below 0, and differ between these; see `told_apart`."""
    sources: tuple[tuple[int, ...], ...] = ()
    """Token ids that the encoder of an encoder-decoder reads: the source of each prompt. Empty for
    other models."""


def asked(
    prompts: Sequence[Prompt],
    sequences: Iterable[tuple[Prompt, tuple[int, ...]]],
) -> Asked:
    """Return what a row asks for; media are in the source where there is one.

    Args:
        prompts: The prompts of the row.
        sequences: Each sequence of tokens that the model continues or scores, after its prompt.
    """
    return Asked(
        prompts=tuple(prompts),
        sequences=tuple(
            ids if prompt.source_token_ids else told_apart(prompt, ids) for prompt, ids in sequences
        ),
        sources=tuple(
            told_apart(prompt, prompt.source_token_ids)
            for prompt in prompts
            if prompt.source_token_ids
        ),
    )


def told_apart(prompt: Prompt, token_ids: Sequence[int]) -> tuple[int, ...]:
    """Return the token ids of a sequence with those of media told apart, as the engine does.

    Args:
        prompt: The prompt that the sequence starts with.
        token_ids: The token ids of the sequence.
    """
    told = list(token_ids)
    for start, file, view, num_tokens in prompt.places:
        number = -1 - int(prompt.files[file].digest[-12:], 16) - view
        told[start : start + num_tokens] = [number] * num_tokens
    return tuple(told)


class Settings(ABC):
    """Settings of a task."""

    __slots__ = ()

    SOURCES: ClassVar[tuple[str, ...]]
    """Names of the settings that can define a row's input."""

    @property
    def has_source(self) -> bool:
        """True if any of `SOURCES` is set; otherwise each row is a string, used as the input."""
        return any(getattr(self, name) is not None for name in self.SOURCES)

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, ColumnUse]:
        """Columns that the task reads, with the use of each."""

    @property
    @abstractmethod
    def result_schema(self) -> pa.Schema:
        """Columns that the task adds to each row."""

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Columns with pictures, in the order in which requests have them."""
        return ()

    @property
    def allow_missing_images(self) -> bool:
        """True if a null stands for no picture; otherwise such a row is an error."""
        return False

    @property
    def image_tokens(self) -> int | None:
        """Most tokens of a picture, for models that take several sizes; None for the default."""
        return None

    @property
    def pan_and_scan(self) -> bool:
        """True to add crops of pictures that are much wider than high, or higher than wide."""
        return False

    @property
    def audio_columns(self) -> tuple[str, ...]:
        """Columns with sounds, in the order in which requests have them."""
        return ()

    @property
    def allow_missing_audio(self) -> bool:
        """True if a null stands for no sound; otherwise such a row is an error."""
        return False

    @property
    def split_audio(self) -> bool:
        """True to split sounds that are too long into clips; otherwise such rows are errors."""
        return False

    @property
    def file_columns(self) -> tuple[str, ...]:
        """Columns whose values are pictures or sounds."""
        return (*self.image_columns, *self.audio_columns)

    @property
    def media_columns(self) -> tuple[str, ...]:
        """Columns whose values may bring pictures or sounds: those of files, and conversations."""
        uses = ("images", "audio", "messages")
        return tuple(name for name, use in self.columns.items() if use in uses)

    @property
    def is_sampled(self) -> bool:
        """True if results are random, so rows with equal requests may get different results."""
        return False

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of tokens in a row's completion."""
        return 0

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON-serializable settings that affect a result, beside the model and the row's request.

        Templates are left out, because the request already reflects them.
        """
        columns = {field.name: str(field.type) for field in self.result_schema}
        return {"columns": columns, **self._parameters()}

    def _parameters(self) -> dict[str, Any]:
        """Return the task's own parameters, without the columns."""
        return {}


@runtime_checkable
class Model(Protocol):
    """A task with its model loaded, in this process or in another one behind a proxy."""

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the result columns of each row."""

    def take_counts(self) -> dict[str, int]:
        """Return the counts since the last call."""

    def take_pulse(self) -> dict[str, Any]:
        """Return the samples of the model's work since the last call; see `Pulse`."""


class StreamingModel(Model, Protocol):
    """A model in this process that yields each result when it is ready, and can be drained."""

    def stream(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row's index and result columns as soon as they are known."""

    def drain(self) -> None:
        """Stop starting rows; streams end after the rows that have started."""

    def num_tokens(self) -> int:
        """Return the number of prompt and completion tokens computed so far."""


def in_order(stream: Iterable[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the results of a stream in the order of their rows."""
    return [result for _, result in sorted(stream, key=itemgetter(0))]


def task_name(settings: Settings) -> str:
    """Return the name of a task: generate, classify, moderate or embed."""
    return type(settings).__name__.removesuffix("Settings").lower()
