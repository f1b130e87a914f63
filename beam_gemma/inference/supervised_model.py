"""Supervision of a model: finished rows become durable, and a job over its limits is stopped.

A job stops if more rows fail than allowed, or if its token budget is spent. Then no new row starts;
rows that have started are finished and kept, and only then does the job fail.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import pyarrow as pa

from beam_gemma.errors import (
    BeamGemmaError,
    BudgetError,
    EngineError,
    FailuresError,
    OptionsError,
    StorageError,
)
from beam_gemma.inference.saved_results import PieceWriter
from beam_gemma.inputs.row import Row
from beam_gemma.monitoring.result_summary import reason_of
from beam_gemma.tasks.interface import StreamingModel, in_order
from beam_gemma.tasks.row_keys import REQUEST_KEY

MIN_ROWS = 100
"""Least number of rows that the share of failed rows is taken of."""
SHOWN_REASONS = 3
_WRITERS: WeakSet[PieceWriter] = WeakSet()
"""Those of all supervised models of this process."""


def save_finished() -> None:
    """Make all rows durable that the models of this process have finished.

    Raises:
        StorageError: results of a model cannot be made durable; those of the others are.
    """
    failed: StorageError | None = None
    for writer in list(_WRITERS):
        try:
            writer.flush()
        except StorageError as error:
            failed = error
    if failed is not None:
        raise failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervision:
    """Limits of a job, and the folder for its finished rows."""

    pieces: str
    """Folder where finished rows are stored."""
    max_error_fraction: float = 1.0
    """Share of rows that may fail; above it, the job stops."""
    max_cost_tokens: int | None = None
    """Token budget per process, for prompts and completions; once spent, no new rows start. None
    for no limit."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_error_fraction <= 1:
            raise OptionsError(
                f"max_error_fraction: expected 0 to 1, got {self.max_error_fraction:g}"
            )
        if self.max_cost_tokens is not None and self.max_cost_tokens < 1:
            raise OptionsError(f"max_cost_tokens: expected at least 1, got {self.max_cost_tokens}")


class SupervisedModel:
    """A supervised model that many threads share, in the process where it runs."""

    def __init__(
        self, model: StreamingModel, supervision: Supervision, result_schema: pa.Schema
    ) -> None:
        """Start supervising a model.

        Args:
            model: The model to supervise.
            supervision: The job's limits, and the folder for its rows.
            result_schema: The schema of the model's results.
        """
        self._model = model
        self._supervision = supervision
        self._pieces = PieceWriter(supervision.pieces, result_schema)
        _WRITERS.add(self._pieces)
        self._num_begun = self._num_done = 0
        self._reasons: Counter[str] = Counter()
        self._verdict: Callable[[], BeamGemmaError] | None = None
        """Function that returns the error to end the job with; None while the job goes on."""
        self._lock = threading.Lock()  # guards the four above

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the result columns of each row, in order, once successful ones are durable.

        Args:
            rows: The rows, each with its request key.

        Raises:
            BudgetError: the token budget is spent before all rows are computed.
            FailuresError: more rows have failed than allowed.
            StorageError: results cannot be made durable.
        """
        self._begin(len(rows))
        results: dict[int, dict[str, Any]] = {}
        try:
            for index, result in self._model.stream(rows):
                results[index] = result
                self._keep(rows[index], result)
        except EngineError:
            # Another thread that shares the model may have drained it.
            if self._verdict is None:
                raise
        finally:
            self._pieces.flush()
        if self._verdict is not None and len(results) < len(rows):
            raise self._verdict()
        return in_order(results.items())

    def take_counts(self) -> dict[str, int]:
        """Return the model's counts since the last call."""
        return self._model.take_counts()

    def take_pulse(self) -> dict[str, Any]:
        """Return the model's samples since the last call."""
        return self._model.take_pulse()

    def _begin(self, num_rows: int) -> None:
        if self._verdict is not None:
            raise self._verdict()
        with self._lock:
            self._num_begun += num_rows

    def _keep(self, row: Row, result: Mapping[str, Any]) -> None:
        """Store a successful result, and end the job if a limit is exceeded."""
        error = result["error"]
        if error is None:
            assert not isinstance(row, str)
            self._pieces.add(row[REQUEST_KEY], result)
        with self._lock:
            self._num_done += 1
            if error is not None:
                self._reasons[reason_of(error)] += 1
            verdict = self._judge()
            if verdict is None or self._verdict is not None:
                return
            self._verdict = verdict
        self._model.drain()

    def _judge(self) -> Callable[[], BeamGemmaError] | None:
        limits = self._supervision
        # The share is of all started rows: failed rows may finish before the others.
        num_rows = max(self._num_begun, MIN_ROWS)
        if self._reasons.total() > limits.max_error_fraction * num_rows:
            return self._failures
        cost = limits.max_cost_tokens
        return self._spent if cost is not None and self._model.num_tokens() >= cost else None

    def _failures(self) -> FailuresError:
        reasons = "; ".join(f"{n:,} x {r}" for r, n in self._reasons.most_common(SHOWN_REASONS))
        return FailuresError(
            f"rows: expected at most {self._supervision.max_error_fraction:g} of them to fail, got "
            f"{self._reasons.total():,} of the first {self._num_begun:,}: {reasons}"
        )

    def _spent(self) -> BudgetError:
        num_kept = self._num_done - self._reasons.total()
        return BudgetError(
            f"max_cost_tokens: expected to do with {self._supervision.max_cost_tokens:,} tokens, "
            f"got {self._model.num_tokens():,} for {num_kept:,} requests, whose results are "
            "durable; go on with --resume and what tokens may be spent then"
        )
