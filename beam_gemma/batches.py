"""Arrow record batches passed between steps; every column keeps its type from end to end.

Elements of a shuffle are `Grouped`: group number, tag for the kind of rows, position of the first
row, and the rows.
"""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from apache_beam.coders.coders import Coder
from apache_beam.coders.typecoders import registry

Located: TypeAlias = tuple[int, pa.RecordBatch]
"""Position of the first row, and consecutive rows of a table."""
Tagged: TypeAlias = tuple[int, int, pa.RecordBatch]
Grouped: TypeAlias = tuple[int, Tagged]
_WIRE = pa.ipc.IpcWriteOptions(compression="zstd")


class RecordBatchCoder(Coder):
    """Coder of record batches as Arrow streams; pickle would include the buffers behind a slice."""

    def encode(self, value: pa.RecordBatch) -> bytes:
        """Return the batch and its schema as bytes."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema, options=_WIRE) as writer:
            writer.write_batch(value)
        return sink.getvalue().to_pybytes()

    def decode(self, encoded: bytes) -> pa.RecordBatch:
        """Return the batch that `encode` serialized."""
        return pa.ipc.open_stream(encoded).read_next_batch()

    def to_type_hint(self) -> type:
        """Return the type that this coder encodes."""
        return pa.RecordBatch


registry.register_coder(pa.RecordBatch, RecordBatchCoder)


def with_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch cast to a job's schema; files may differ in metadata and list types."""
    columns = [c.cast(f.type) for c, f in zip(batch.columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def joined(batches: Iterable[pa.RecordBatch]) -> pa.RecordBatch:
    """Return one batch with the rows of one or more batches."""
    batches = list(batches)
    (batch,) = pa.Table.from_batches(batches).combine_chunks().to_batches() or [
        pa.RecordBatch.from_pylist([], schema=batches[0].schema)
    ]
    return batch


def by_group(groups: np.ndarray, batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield each group with its rows, in their original order.

    Args:
        groups: [rows] group number of each row.
        batch: The rows to group.
    """
    if not len(groups):
        return
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    for start, end in zip(starts, [*starts[1:], len(ordered)], strict=True):
        yield int(ordered[start]), batch.take(pa.array(order[start:end]))
