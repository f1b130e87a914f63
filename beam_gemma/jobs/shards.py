"""Which shard of the output a row belongs to: a function of its position alone.

Where positions are dense, a shard is a range of them, so the output keeps the order of the input
and each shard knows exactly which rows it must have. Elsewhere runs of positions are spread.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from beam_gemma.tables.source import Source

RUN_BITS = 10
"""Of positions that stay together where they are spread: runs of 1,024."""
SHARD_BYTES = 256 << 20
"""About the most data of one shard, which one worker holds while it writes it."""
SHARD_ROWS = 250_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How rows make shards."""

    num_shards: int
    num_rows: int | None
    """Positions are the numbers below it; None where they are anything."""

    @classmethod
    def of(cls, source: Source, results: pa.Schema, *, num_shards: int = 0) -> "Layout":
        """Return a layout for a table.

        Args:
            source: The table.
            results: Columns that it gains.
            num_shards: How many shards; 0 for as many as make none too large.
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
        """Return the positions that a shard must have; None where nobody knows."""
        if self.num_rows is None:
            return None
        first, last = (-(-(shard + i) * self.num_rows // self.num_shards) for i in (0, 1))
        return range(first, last)

    def split(
        self, position: int, batch: pa.RecordBatch
    ) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """Return the slices of located rows that belong to one shard each, with their position."""
        shards = self.shards_of(position + np.arange(batch.num_rows))
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        if not len(starts):
            return
        for start, end in zip(starts, [*starts[1:], batch.num_rows], strict=True):
            yield int(shards[start]), position + int(start), batch.slice(start, end - start)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return numbers without a pattern of their own: splitmix64."""
    mixed = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _width(kind: pa.DataType) -> int:
    """Return about how many bytes a result takes."""
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _width(kind.value_type)
    return kind.bit_width // 8 if pa.types.is_primitive(kind) else 64
