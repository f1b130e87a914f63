"""Write tables as files: shards are staged beside the output, then renamed together."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems

from beam_gemma.batches import with_schema
from beam_gemma.errors import OptionsError, one_line
from beam_gemma.storage import create, match_files
from beam_gemma.tables import json_lines
from beam_gemma.tables.sink import FORMATS, Format, Sink

ROW_GROUP_BYTES = 64 << 20
"""Arrow bytes to collect before a row group is written."""
SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True, kw_only=True)
class FileSink(Sink):
    """A table to write as files: `dir/name.parquet` becomes `dir/name-00000-of-00004.parquet`."""

    uri: str
    prefix: str
    """Start of all file names, folder included."""
    format: Format
    work: str

    @property
    def record_path(self) -> str:
        """Path of the run record, written last: if it exists, the output is complete."""
        return f"{_hidden(self.prefix)}.run.json"

    def earlier(self) -> list[str]:
        """Return the output files of an earlier job, in order."""
        name = re.compile(re.escape(self.prefix) + SHARD.pattern + re.escape(f".{self.format}"))
        found = match_files(f"{self.prefix}-*-of-*.{self.format}")
        return [path for path in found if name.fullmatch(path)]

    def publish(self, staged: Sequence[str], record: Mapping[str, Any]) -> None:
        """Rename the staged files, delete files of an earlier output and write the record."""
        if FileSystems.exists(self.record_path):
            FileSystems.delete([self.record_path])
        final = [
            f"{self.prefix}-{i:05}-of-{len(staged):05}.{self.format}" for i in range(len(staged))
        ]
        # On a second call, some files have already been renamed.
        left = [pair for pair in zip(staged, final, strict=True) if FileSystems.exists(pair[0])]
        for _, path in left:
            if FileSystems.exists(path):
                FileSystems.delete([path])
        if left:
            FileSystems.rename(*map(list, zip(*left, strict=True)))
        if missing := [path for path in final if not FileSystems.exists(path)]:
            raise BeamIOError(f"{missing[0]}: expected a staged shard to become it, got none")
        if old := sorted(set(self.earlier()) - set(final)):
            FileSystems.delete(old)
        with create(self.record_path) as stream:
            stream.write(json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")


def open_sink(uri: str) -> FileSink:
    """Return the sink for an output URI.

    Raises:
        OptionsError: the name does not end in .parquet or .jsonl.
    """
    stem, _, suffix = uri.rpartition(".")
    for file_format in FORMATS:
        if suffix == file_format and stem.rpartition("/")[2]:
            return FileSink(uri=uri, prefix=stem, format=file_format, work=f"{_hidden(uri)}.work")
    raise OptionsError(f"{uri}: expected a name that ends in .parquet or .jsonl")


def _hidden(path: str) -> str:
    """Return the path with `_` before the file name, which table readers skip."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}_{name}"


@runtime_checkable
class ShardFile(Protocol):
    """A shard file open for writing."""

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows to the file."""

    def close(self) -> None:
        """Finish the file."""


def stage(sink: Sink, shard: int, schema: pa.Schema) -> tuple[str, ShardFile]:
    """Open a staged shard under a unique name; return its path and the file."""
    path = f"{sink.work}/staged/{shard:05}-{uuid.uuid4().hex}.{sink.format}"
    stream = create(path)
    return path, (
        _ParquetShard(stream, schema) if sink.format == "parquet" else _JsonlShard(stream)
    )


def check_writable(flag: str, path: str) -> None:
    """Check that a file can be written by a trial write, which may leave its folder behind.

    Raises:
        OptionsError: the trial write beside the path fails, or the path is a folder.
    """
    attempt = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        create(attempt).close()
        FileSystems.delete([attempt])
        is_folder = FileSystems.exists(f"{path}/")
    except Exception as error:  # each file system raises its own errors
        raise OptionsError(
            f"{flag}: expected a file that can be written, got {one_line(error)} at {path}"
        ) from error
    if is_folder:
        raise OptionsError(f"{flag}: expected a file that can be written, got the folder {path}")


class _ParquetShard:
    """An open Parquet file that collects batches into row groups."""

    def __init__(self, stream: BufferedIOBase, schema: pa.Schema) -> None:
        self._stream = stream
        self._schema = schema
        self._writer = pq.ParquetWriter(stream, schema, compression="zstd")
        self._batches: list[pa.RecordBatch] = []
        self._num_bytes = 0

    def write(self, batch: pa.RecordBatch) -> None:
        self._batches.append(with_schema(batch, self._schema))
        self._num_bytes += batch.nbytes
        if self._num_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._stream.close()

    def _flush(self) -> None:
        if self._batches:
            self._writer.write_table(pa.Table.from_batches(self._batches, self._schema))
        self._batches, self._num_bytes = [], 0


class _JsonlShard:
    """An open JSON lines file."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream = stream

    def write(self, batch: pa.RecordBatch) -> None:
        self._stream.write(json_lines.format_rows(batch))

    def close(self) -> None:
        self._stream.close()
