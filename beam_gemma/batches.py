"""Arrow record batches passed between steps; every column keeps its type from end to end.

Some columns of JSON lines have values that no one Arrow type holds as they are, such as objects
whose keys differ. They are columns of JSON text, which a mark in their fields tells from texts.

Elements of a shuffle are `Grouped`: group number, tag for the kind of rows, position of the first
row, and the rows. Beam's local runner keeps them in memory; rows with pictures are too large for
that, and are held in files (`held_in`).
"""

import json
import os
import struct
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from apache_beam.coders.coders import Coder
from apache_beam.coders.typecoders import registry

from beam_gemma.errors import StorageError, one_line
from beam_gemma.storage import delete_folder, make_private

Located: TypeAlias = tuple[int, pa.RecordBatch]
"""Position of the first row, and consecutive rows of a table."""
Tagged: TypeAlias = tuple[int, int, pa.RecordBatch]
Grouped: TypeAlias = tuple[int, Tagged]
JSON_TEXT = b"beam_gemma.json"
"""Metadata key of the fields of JSON text."""
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Units of Arrow's times: how many a second has."""
_WIRE = pa.ipc.IpcWriteOptions(compression="zstd")


HELD_IN = "BEAM_GEMMA_HELD_IN"
"""Environment variable with the folder of held batches. It is set for a job on this machine alone,
and reaches all of its threads and processes."""
MIN_HELD_BYTES = 16 << 10
"""Least size of a batch that is held in a file."""
FILE_BYTES = 256 << 20
"""Size from which on a file of held batches takes no more; a reader maps one file into memory."""
_HELD = struct.Struct("!4s16sQ")
_MARK = b"held"
"""Beginning of a reference to a held batch: the id of a file, and an offset. No stream has it."""
_PAGE = 4096


class RecordBatchCoder(Coder):
    """Coder of record batches as Arrow streams; pickle would include the buffers behind a slice.

    Of a large batch in a job that holds them in files, only a reference is encoded.
    """

    def encode(self, value: pa.RecordBatch) -> bytes:
        """Return the batch and its schema as bytes.

        Raises:
            StorageError: the batch is to be held in a file, which cannot be written.
        """
        folder = os.environ.get(HELD_IN)
        if folder is not None and value.nbytes >= MIN_HELD_BYTES:
            return _HOLDER.put(folder, value)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema, options=_WIRE) as writer:
            writer.write_batch(value)
        return sink.getvalue().to_pybytes()

    def decode(self, encoded: bytes) -> pa.RecordBatch:
        """Return the batch that `encode` serialized."""
        if encoded.startswith(_MARK):
            return _held(os.environ[HELD_IN], encoded)
        return pa.ipc.open_stream(encoded).read_next_batch()

    def estimate_size(self, value: pa.RecordBatch) -> int:
        """Return the size of a batch in memory; Beam samples it, without need of an encoding."""
        return int(value.nbytes)

    def to_type_hint(self) -> type:
        """Return the type that this coder encodes."""
        return pa.RecordBatch


registry.register_coder(pa.RecordBatch, RecordBatchCoder)


@contextmanager
def held_in(folder: str) -> Iterator[None]:
    """Hold large batches of a job in files of a folder while the block runs.

    Args:
        folder: A folder on this machine that is not there yet; it is deleted in the end.
    """
    make_private(folder)
    os.environ[HELD_IN] = folder
    try:
        yield
    finally:
        del os.environ[HELD_IN]
        delete_folder(folder)


class _Holder:
    """Appends batches to files, which belong to this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._owner = 0

    def put(self, folder: str, batch: pa.RecordBatch) -> bytes:
        """Write a batch and return a reference to it."""
        with self._lock:
            try:
                path = self._file_in(Path(folder))
                # Arrow reads without a copy what begins on a page.
                start = -(-path.stat().st_size // _PAGE) * _PAGE
                with path.open("r+b") as file:
                    file.seek(start)
                    with pa.ipc.new_stream(file, batch.schema) as writer:
                        writer.write_batch(batch)
            except OSError as error:
                raise StorageError(
                    f"{folder}: expected to hold {batch.nbytes:,} bytes of rows, got "
                    f"{one_line(error)}; make room there, then go on with --resume"
                ) from error
            return _HELD.pack(_MARK, bytes.fromhex(path.name), start)

    def _file_in(self, folder: Path) -> Path:
        """Return the file to append to, a new one if the last is full."""
        path = self._path
        is_own = path is not None and path.parent == folder and self._owner == os.getpid()
        if path is None or not is_own or path.stat().st_size >= FILE_BYTES:
            path = self._path = folder / uuid.uuid4().hex
            self._owner = os.getpid()
            path.touch(mode=0o600)
        return path


_HOLDER = _Holder()


def _held(folder: str, reference: bytes) -> pa.RecordBatch:
    """Return a held batch, whose columns stay in the file until they are looked at."""
    _, name, start = _HELD.unpack(reference)
    with pa.memory_map(f"{folder}/{name.hex()}") as file:
        file.seek(start)
        return pa.ipc.open_stream(file).read_next_batch()


def with_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch cast to a job's schema; files may differ in metadata and list types."""
    columns = [c.cast(f.type) for c, f in zip(batch.columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def is_json_text(field: pa.Field) -> bool:
    """Return whether a column holds JSON values as text."""
    return JSON_TEXT in (field.metadata or {})


def python_value(field: pa.Field, value: pa.Scalar) -> Any:
    """Return a value of a column as a Python object; times that Python cannot hold become text.

    Raises:
        ValueError: Python cannot hold the value.
        OverflowError: likewise.
    """
    if is_json_text(field):
        text = value.as_py()
        return None if text is None else json.loads(text)
    try:
        return value.as_py()
    except (ValueError, OverflowError, KeyError):
        if not pa.types.is_temporal(value.type):
            raise
        return time_text(value, separator=" ")


def time_text(value: pa.Scalar, *, separator: str = "T") -> str | None:
    """Return a date or time in ISO 8601, in full precision, also if Python cannot hold it.

    A year beyond 9999 or before 1 has a sign if it is negative and as many digits as it needs. A
    time in a zone that is not known is in UTC. A duration is in seconds.

    Args:
        value: The date, time, timestamp or duration.
        separator: What to put between date and time.
    """
    if not value.is_valid:
        return None
    kind = value.type
    if pa.types.is_date(kind):
        days = value.value if pa.types.is_date32(kind) else value.value // 86_400_000
        return str(np.datetime64(days, "D"))
    seconds, rest = divmod(value.value, UNITS[kind.unit])
    if pa.types.is_duration(kind):
        return str(value.value / UNITS[kind.unit])
    digits = f".{rest:0{len(str(UNITS[kind.unit])) - 1}}" if rest else ""
    if pa.types.is_time(kind):
        return str(np.datetime64(seconds, "s"))[11:] + digits
    try:
        whole = pa.scalar(seconds, pa.timestamp("s", kind.tz)).as_py().isoformat(separator)
    except (ValueError, OverflowError, KeyError):
        whole = str(np.datetime64(seconds, "s")).replace("T", separator)
        whole += "" if kind.tz is None else "+00:00"
    # A zone may follow the seconds, which end 8 characters after the separator.
    end = whole.index(separator) + 9
    return whole[:end] + digits + whole[end:]


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
