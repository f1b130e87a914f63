"""One shard of an output: rows in order, each with exactly one result of every task."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from beam_gemma.batches import Located, joined
from beam_gemma.errors import BalanceError
from beam_gemma.tasks.row_keys import POSITION


def assembled(
    rows: Sequence[Located],
    results: Mapping[int, Sequence[pa.RecordBatch]],
    num_tasks: int,
    wanted: range | None,
) -> Iterator[tuple[pa.RecordBatch, list[pa.RecordBatch]]]:
    """Return the rows of a shard in the order of their positions, with the results of each task.

    Args:
        rows: Of the shard, in any order.
        results: By task, in any order, with the positions of their rows.
        num_tasks: How many there are.
        wanted: The positions that the shard must have; None where nobody knows.

    Raises:
        BalanceError: a row is missing or there twice, or has no result or several.
    """
    rows = sorted(rows, key=lambda located: located[0])
    positions = _positions(rows)
    _check_rows(positions, wanted)
    columns = [_in_order(positions, results.get(task, ())) for task in range(num_tasks)]
    start = 0
    for _, batch in rows:
        yield batch, [column.slice(start, batch.num_rows) for column in columns]
        start += batch.num_rows


def _positions(rows: Sequence[Located]) -> np.ndarray:
    runs = [np.arange(first, first + batch.num_rows) for first, batch in rows]
    return np.concatenate(runs) if runs else np.zeros(0, np.int64)


def _check_rows(positions: np.ndarray, wanted: range | None) -> None:
    if (np.diff(positions) <= 0).any():
        raise BalanceError("rows: expected each row once, got some twice; run the job again")
    if wanted is not None and not np.array_equal(positions, wanted):
        raise BalanceError(
            f"rows: expected all {len(wanted):,} rows from row {wanted.start:,} of the table on, "
            f"got {len(positions):,}; the input has changed since the job began, or rows were lost"
        )


def _in_order(positions: np.ndarray, results: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Return the results of rows, in the order of the rows."""
    found = joined(results) if results else pa.record_batch({POSITION: pa.array([], pa.int64())})
    have = found.column(POSITION).to_numpy()
    order = np.argsort(have, kind="stable")
    if not np.array_equal(have[order], positions):
        raise BalanceError(
            f"results: expected one for each of {len(positions):,} rows, got {len(have):,} for "
            f"{len(np.intersect1d(have, positions)):,} of them; run the job again"
        )
    return found.take(pa.array(order)).drop_columns([POSITION])
