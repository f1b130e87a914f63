"""Base class of `Generator` and `Classifier`, which run on an engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.stats import Tally
from beam_gemma.inputs.row import Row
from beam_gemma.monitoring.progress import Count
from beam_gemma.tasks.interface import Settings, in_order


class EngineModel(ABC):
    """Runs a task on an engine; many threads can share one model."""

    def __init__(
        self, engine: Engine, settings: Settings, *, on_result: Callable[[Count], None]
    ) -> None:
        """Initialize the model.

        Args:
            engine: The engine that runs the model.
            settings: The settings of the task.
            on_result: Called with a count of each row as soon as the row is done, from any thread.
                The engine counts tokens itself.
        """
        self._engine = engine
        self._on_result = on_result
        self._names = settings.result_schema.names
        self._tally = Tally(engine)

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the result columns of each row, in the order of the rows."""
        return in_order(self.stream(rows))

    @abstractmethod
    def stream(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row's index and result columns as soon as they are known."""

    def drain(self) -> None:
        """Stop starting rows; rows that have started still finish."""
        self._engine.drain()

    def num_tokens(self) -> int:
        """Return the number of tokens that the engine has computed."""
        return self._engine.stats.num_tokens

    def take_counts(self) -> dict[str, int]:
        """Return the engine's counts since the last call."""
        return self._tally.take()

    def take_pulse(self) -> dict[str, Any]:
        """Return the engine's samples since the last call."""
        return self._engine.pulse.take()

    def _failure(self, error: str) -> dict[str, Any]:
        """Count a row that failed before reaching the engine, and return its result."""
        self._on_result(Count(rows=1, failed=1))
        return dict.fromkeys(self._names) | {"error": error}
