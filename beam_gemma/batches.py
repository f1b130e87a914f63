"""Record batches between steps: a table is Arrow from end to end, so every column keeps its type.

Elements of a shuffle are `Grouped`: a group's number, a tag that says what the rows are, the
position of the first of them, and the rows.
"""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from apache_beam.coders.coders import Coder
from apache_beam.coders.typecoders import registry

Located: TypeAlias = tuple[int, pa.RecordBatch]
"""Some rows of a table and the position of the first; the others follow it one by one."""
Tagged: TypeAlias = tuple[int, int, pa.RecordBatch]
Grouped: TypeAlias = tuple[int, Tagged]
_WIRE = pa.ipc.IpcWriteOptions(compression="zstd")


class RecordBatchCoder(Coder):
    """Record batches as Arrow streams; pickle would carry what a slice is cut of."""

    def encode(self, value: pa.RecordBatch) -> bytes:
        """Return the batch and its schema as bytes."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema, options=_WIRE) as writer:
            writer.write_batch(value)
        return sink.getvalue().to_pybytes()

    def decode(self, encoded: bytes) -> pa.RecordBatch:
        """Return the batch."""
        return pa.ipc.open_stream(encoded).read_next_batch()

    def to_type_hint(self) -> type:
        """Return what this encodes."""
        return pa.RecordBatch


registry.register_coder(pa.RecordBatch, RecordBatchCoder)


def send_whole() -> None:
    """Have the workers of Beam's local runner send whole elements; for where a pipeline is made.

    Every second they send what is in their buffers, even amid an element that another thread is
    encoding (seen in Beam 2.77, with `--direct_running_mode=multi_threading`), and what is added as
    they do is lost. Nothing that ends needs that: without it they send what is complete.
    """
    from apache_beam.runners.portability.fn_api_runner import worker_handlers

    worker_handlers.DATA_BUFFER_TIME_LIMIT_MS = 0


def with_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch under a job's schema: files may differ in metadata, and lists in form."""
    columns = [c.cast(f.type) for c, f in zip(batch.columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def joined(batches: Iterable[pa.RecordBatch]) -> pa.RecordBatch:
    """Return one batch of the rows of several, of which there is at least one."""
    batches = list(batches)
    (batch,) = pa.Table.from_batches(batches).combine_chunks().to_batches() or [
        pa.RecordBatch.from_pylist([], schema=batches[0].schema)
    ]
    return batch


def by_group(groups: np.ndarray, batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Return the rows of each group, in their order.

    Args:
        groups: [rows] the group of each row.
        batch: The rows.
    """
    if not len(groups):
        return
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    for start, end in zip(starts, [*starts[1:], len(ordered)], strict=True):
        yield int(ordered[start]), batch.take(pa.array(order[start:end]))
