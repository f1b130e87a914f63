"""Write tables as files: shards are staged beside the output, then renamed together."""

import functools
import json
import os
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
from beam_gemma.errors import OptionsError, StorageError, one_line
from beam_gemma.storage import (
    create,
    is_file,
    literal_pattern,
    make_private,
    match_files,
    read_file,
    remove,
    write_once,
)
from beam_gemma.tables import json_lines
from beam_gemma.tables.exchange import ASIDE, Exchange, undo_all
from beam_gemma.tables.held_types import held_schema
from beam_gemma.tables.lease import check_held, is_held
from beam_gemma.tables.sink import FORMATS, STAGED, Format, Sink

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

    def check(self, schema: pa.Schema) -> None:
        """Reject a schema with a type that files of the format cannot hold.

        Raises:
            OptionsError: a column cannot be written.
        """
        held_schema(schema, self.format)

    def earlier(self) -> list[str]:
        """Return the output files of an earlier job, in order."""
        name = re.compile(re.escape(self.prefix) + SHARD.pattern + re.escape(f".{self.format}"))
        found = match_files(f"{literal_pattern(self.prefix)}-*-of-*.{self.format}")
        return [path for path in found if name.fullmatch(path)]

    def publish(self, staged: Sequence[str], record: Mapping[str, Any]) -> None:
        """Rename the staged files, with an earlier output set aside, and write the record.

        An error brings the earlier output back.

        Raises:
            StorageError: a file cannot be renamed or written, a staged file is missing, or another
                job has taken the lease.
        """
        job = record["job"]
        if self._published_by() == job:
            return
        check_held(self.work, job)
        check = functools.partial(check_held, self.work, job)
        exchange = Exchange.of_job(
            self.work,
            job,
            earlier=self._earlier,
            new=list(zip(staged, self._names(len(staged)), strict=True)),
            check=check,
        )
        try:
            exchange.run(check)
            check()
            content = json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n"
            write_once(self.record_path, content)
        except BaseException as error:  # also a signal that ends this process
            self._undo(exchange, job)
            if isinstance(error, OSError | BeamIOError):
                raise StorageError(
                    f"{self.uri}: expected to rename its files, got {one_line(error)}; once that "
                    "is set right, go on with --resume"
                ) from error
            raise

    def check_held(self, job: str) -> None:
        """Check that a job holds the lease, unless it has published the output already."""
        if self._published_by() != job:
            check_held(self.work, job)

    def restore(self, job: str) -> None:
        """Bring back the output that an earlier job broke off in replacing."""
        check = functools.partial(check_held, self.work, job)
        undo_all(self.work, self._published_by(), check)

    @property
    def trial_path(self) -> str:
        """Path beside the output."""
        return self.record_path

    def record(self) -> Mapping[str, Any] | None:
        """Return the record that lies beside the output; None if there is none, or a part."""
        content = read_file(self.record_path)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            return None  # of a job of version 0.7.0 that ended amid its record

    def _published_by(self) -> str | None:
        """Return the job whose record lies beside the output; None if there is none or no job."""
        return (self.record() or {}).get("job")

    def _names(self, number: int) -> list[str]:
        """Return the names of an output's files."""
        return [f"{self.prefix}-{i:05}-of-{number:05}.{self.format}" for i in range(number)]

    def _earlier(self) -> list[str]:
        """Return the record and the files of an earlier output."""
        return [path for path in (self.record_path,) if is_file(path)] + self.earlier()

    def _undo(self, exchange: Exchange, job: str) -> None:
        if not is_held(self.work, job):
            return  # the names belong to the job that has taken the lease
        try:
            exchange.undo(functools.partial(check_held, self.work, job))
        except (OSError, BeamIOError) as error:
            raise StorageError(
                f"{self.uri}: expected to bring back the earlier output, got {one_line(error)}; "
                f"its files are in {self.work}/{ASIDE}, go on with --resume"
            ) from error


def open_sink(uri: str) -> FileSink:
    """Return the sink for an output URI.

    Raises:
        OptionsError: the name does not end in .parquet or .jsonl.
    """
    uri = os.path.expanduser(uri)  # noqa: PTH111 - a Path would change URIs
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
    make_private(sink.work)
    path = f"{sink.work}/{STAGED}/{shard:05}-{uuid.uuid4().hex}.{sink.format}"
    stream = create(path)
    return path, (
        _ParquetShard(stream, held_schema(schema, "parquet"))
        if sink.format == "parquet"
        else _JsonlShard(stream)
    )


def check_writable(flag: str, path: str) -> None:
    """Check that a file can be written by a trial write, which may leave its folder behind.

    Raises:
        OptionsError: the trial write beside the path fails, or the path is a folder.
    """
    attempt = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        create(attempt).close()
        remove([attempt])
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
        typed = json_lines.with_typed_columns(batch, self._schema)
        self._batches.append(with_schema(typed, self._schema))
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
