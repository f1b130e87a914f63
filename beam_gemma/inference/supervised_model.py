"""A model at work on a job: finished rows become durable, and work that leads nowhere is stopped.

It stops where more rows fail than the job may have, or where the tokens are spent that it may cost.
Then no other row begins; those that have begun are finished and kept, and only then the job fails.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from beam_gemma.errors import (
    BeamGemmaError,
    BudgetError,
    EngineError,
    FailuresError,
    OptionsError,
)
from beam_gemma.inference.saved_results import PieceWriter
from beam_gemma.inputs.row import Row
from beam_gemma.monitoring.result_summary import reason_of
from beam_gemma.tasks.interface import StreamingModel, in_order
from beam_gemma.tasks.row_keys import REQUEST_KEY

MIN_ROWS = 100
"""Rows that are enough to say which share of them fails."""
SHOWN_REASONS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervision:
    """What to see to while a model is at work on a job."""

    pieces: str
    """Folder where finished rows become durable."""
    max_error_fraction: float = 1.0
    """Of rows that may fail; with more, the job stops."""
    max_cost_tokens: int | None = None
    """That a process may compute, of prompts and completions, before it begins with no other row;
    None for any number."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_error_fraction <= 1:
            raise OptionsError(
                f"max_error_fraction: expected 0 to 1, got {self.max_error_fraction:g}"
            )
        if self.max_cost_tokens is not None and self.max_cost_tokens < 1:
            raise OptionsError(f"max_cost_tokens: expected at least 1, got {self.max_cost_tokens}")


class SupervisedModel:
    """A model that many threads share, in the process where it runs."""

    def __init__(
        self, model: StreamingModel, supervision: Supervision, result_schema: pa.Schema
    ) -> None:
        """Take charge of a model.

        Args:
            model: At work.
            supervision: What to see to.
            result_schema: Of its results.
        """
        self._model = model
        self._supervision = supervision
        self._pieces = PieceWriter(supervision.pieces, result_schema)
        self._num_begun = self._num_done = 0
        self._reasons: Counter[str] = Counter()
        self._verdict: Callable[[], BeamGemmaError] | None = None
        """What ends the job, once it is to end."""
        self._lock = threading.Lock()  # guards the four above

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the result columns of each row, in order; they are durable then.

        Args:
            rows: With the keys of their requests.

        Raises:
            BudgetError: no tokens are left to compute all of them.
            FailuresError: more rows have failed than may.
            StorageError: results cannot be made durable.
        """
        self._begin(len(rows))
        results: dict[int, dict[str, Any]] = {}
        try:
            for index, result in self._model.stream(rows):
                results[index] = result
                self._keep(rows[index], result)
        except EngineError:
            # Others that share the model may have brought it to its end.
            if self._verdict is None:
                raise
        finally:
            self._pieces.flush()
        if self._verdict is not None and len(results) < len(rows):
            raise self._verdict()
        return in_order(results.items())

    def take_counts(self) -> dict[str, int]:
        """Return what the model has counted and no call has returned yet."""
        return self._model.take_counts()

    def take_pulse(self) -> dict[str, Any]:
        """Return the samples of the model that no call has returned yet."""
        return self._model.take_pulse()

    def _begin(self, num_rows: int) -> None:
        if self._verdict is not None:
            raise self._verdict()
        with self._lock:
            self._num_begun += num_rows

    def _keep(self, row: Row, result: Mapping[str, Any]) -> None:
        """Make a result durable, and end the job where it is time to."""
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
        # Of all rows that have begun, so that whichever end first say nothing of the others.
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
