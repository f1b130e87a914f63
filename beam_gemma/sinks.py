"""Writing tables: sharded files that appear all at once, when every row is in them."""

import re
from dataclasses import dataclass
from typing import BinaryIO

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filebasedsink import FileBasedSink
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.iobase import Write
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PCollection

from beam_gemma import jsonl
from beam_gemma.errors import OptionsError
from beam_gemma.progress import METRICS_NAMESPACE
from beam_gemma.records import FORMATS, Format, match_files, with_schema

ROW_GROUP_BYTES = 64 << 20
"""Of Arrow data that become one row group."""
SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sink:
    """Where a table is written: `dir/name.parquet` becomes `dir/name-00000-of-00004.parquet`."""

    prefix: str
    format: Format
    num_shards: int = 0
    """Files to write; 0 leaves it to the runner."""

    @property
    def suffix(self) -> str:
        """End of each file name."""
        return f".{self.format}"

    def shards(self) -> list[str]:
        """Return the files that an earlier job has written here."""
        name = re.compile(re.escape(self.prefix) + SHARD.pattern + re.escape(self.suffix))
        found = match_files(f"{self.prefix}-*-of-*{self.suffix}")
        return [path for path in found if name.fullmatch(path)]

    def delete(self) -> None:
        """Remove what an earlier job has written here."""
        if shards := self.shards():
            FileSystems.delete(shards)


def open_sink(uri: str, *, num_shards: int = 0) -> Sink:
    """Return where a table is written.

    Raises:
        OptionsError: the name has no format that can be written.
    """
    stem, _, suffix = uri.rpartition(".")
    for file_format in FORMATS:
        if suffix == file_format and stem.rpartition("/")[2]:
            return Sink(prefix=stem, format=file_format, num_shards=num_shards)
    raise OptionsError(f"{uri}: expected a name that ends in .parquet or .jsonl")


class WriteRecords(beam.PTransform[PCollection[pa.RecordBatch], PCollection[str]]):
    """Writes record batches to the files of a sink; there is one even if there is no batch."""

    def __init__(self, sink: Sink, schema: pa.Schema) -> None:
        super().__init__()
        self._sink = sink
        self._schema = schema

    def expand(self, batches: PCollection[pa.RecordBatch]) -> PCollection[str]:
        """Apply the transform."""
        return batches | Write(_ShardedFiles(self._sink, self._schema))


class _ShardedFiles(FileBasedSink):
    """The files of a table, each written by one worker and renamed once all are complete."""

    def __init__(self, sink: Sink, schema: pa.Schema) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            sink.prefix, coder=None, file_name_suffix=sink.suffix, num_shards=sink.num_shards
        )
        self._format = sink.format
        self._schema = schema
        self._written = Metrics.counter(METRICS_NAMESPACE, "rows_written")

    def open(self, temp_path: str) -> "_ParquetShard | _JsonlShard":
        stream = super().open(temp_path)
        return (
            _ParquetShard(stream, self._schema)
            if self._format == "parquet"
            else _JsonlShard(stream)
        )

    def write_record(self, shard: "_ParquetShard | _JsonlShard", batch: pa.RecordBatch) -> None:
        shard.write(batch)
        self._written.inc(batch.num_rows)


class _ParquetShard:
    """An open Parquet file that gathers batches into row groups."""

    def __init__(self, stream: BinaryIO, schema: pa.Schema) -> None:
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
    """An open file of JSON lines."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, batch: pa.RecordBatch) -> None:
        self._stream.write(jsonl.format_rows(batch))

    def close(self) -> None:
        self._stream.close()
