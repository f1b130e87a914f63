"""Assign rows to output shards by their position alone.

If positions are dense, a shard is a range of them: the output keeps the order of the input, and
each shard knows exactly which rows it must have. Otherwise runs of positions are hashed to shards.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from beam_gemma.batches import Located, joined
from beam_gemma.errors import BalanceError
from beam_gemma.tables.source import Source
from beam_gemma.tasks.row_keys import POSITION

RUN_BITS = 10
"""Low bits of a position that hashing ignores: runs of 1,024 positions stay together."""
SHARD_BYTES = 256 << 20
"""Approximate maximum size of a shard, in bytes; one worker holds it while writing."""
SHARD_ROWS = 250_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Assignment of rows to shards."""

    num_shards: int
    num_rows: int | None
    """Number of rows if positions are dense, from 0; None if they are not."""

    @classmethod
    def of(cls, source: Source, results: pa.Schema, *, num_shards: int = 0) -> "Layout":
        """Return a layout for a table.

        Args:
            source: The input table.
            results: The schema of the result columns to add.
            num_shards: The number of shards; 0 for as many as the size limits require.
        """
        num_rows = source.num_rows or 0
        num_bytes = source.num_bytes + num_rows * sum(_width(field.type) for field in results)
        wanted = max(1, -(-num_bytes // SHARD_BYTES), -(-num_rows // SHARD_ROWS))
        return cls(num_shards=num_shards or wanted, num_rows=num_rows if source.is_dense else None)

    def shards_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the shard of each position: [rows] int64 to [rows] int64."""
        if self.num_rows is not None:
            return positions * self.num_shards // max(1, self.num_rows)
        return (_mixed(positions >> RUN_BITS) % np.uint64(self.num_shards)).astype(np.int64)

    def rows_of(self, shard: int) -> range | None:
        """Return the positions that a shard must have; None if unknown."""
        if self.num_rows is None:
            return None
        first, last = (-(-(shard + i) * self.num_rows // self.num_shards) for i in (0, 1))
        return range(first, last)

    def split(
        self, position: int, batch: pa.RecordBatch
    ) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """Split rows into slices of one shard each: shard, position of the first row, rows."""
        shards = self.shards_of(position + np.arange(batch.num_rows))
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        if not len(starts):
            return
        for start, end in zip(starts, [*starts[1:], batch.num_rows], strict=True):
            yield int(shards[start]), position + int(start), batch.slice(start, end - start)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return the splitmix64 hash of each number."""
    mixed = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _width(kind: pa.DataType) -> int:
    """Return the approximate bytes per value of a result column."""
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _width(kind.value_type)
    return kind.bit_width // 8 if pa.types.is_primitive(kind) else 64


def assembled(
    rows: Sequence[Located],
    results: Mapping[int, Sequence[pa.RecordBatch]],
    num_tasks: int,
    wanted: range | None,
) -> Iterator[tuple[pa.RecordBatch, list[pa.RecordBatch]]]:
    """Return the rows of a shard in the order of their positions, with the results of each task.

    Args:
        rows: The rows of the shard, in any order.
        results: The results by task, in any order, with the positions of their rows.
        num_tasks: The number of tasks.
        wanted: The positions that the shard must have; None if unknown.

    Raises:
        BalanceError: a row is missing or duplicated, or does not have exactly one result.
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
    """Return the results in the order of the positions."""
    found = joined(results) if results else pa.record_batch({POSITION: pa.array([], pa.int64())})
    have = found.column(POSITION).to_numpy()
    order = np.argsort(have, kind="stable")
    if not np.array_equal(have[order], positions):
        raise BalanceError(
            f"results: expected one for each of {len(positions):,} rows, got {len(have):,} for "
            f"{len(np.intersect1d(have, positions)):,} of them; run the job again"
        )
    return found.take(pa.array(order)).drop_columns([POSITION])
