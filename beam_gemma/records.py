"""Reading tables: where their files are, what is in them, and their rows.

A table is Arrow from end to end: it moves as record batches of a few rows, so that work spreads
over a job's workers, and every column keeps its exact type.
"""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.coders.coders import BytesCoder, Coder
from apache_beam.coders.typecoders import registry
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.parquetio import ReadFromParquetBatched
from apache_beam.io.textio import ReadFromText
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PBegin, PCollection
from apache_beam.transforms.window import GlobalWindows

from beam_gemma import jsonl
from beam_gemma.errors import OptionsError
from beam_gemma.progress import METRICS_NAMESPACE

Format = Literal["parquet", "jsonl"]
FORMATS: tuple[Format, ...] = ("parquet", "jsonl")
ROWS_PER_BATCH = 16
"""Rows that move through a pipeline together: few, so that no worker holds a whole row group."""


class RecordBatchCoder(Coder):
    """Record batches between steps, as Arrow streams; pickle would carry what a slice is cut of."""

    def encode(self, value: pa.RecordBatch) -> bytes:
        """Return the batch and its schema as bytes."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write_batch(value)
        return sink.getvalue().to_pybytes()

    def decode(self, encoded: bytes) -> pa.RecordBatch:
        """Return the batch."""
        return pa.ipc.open_stream(encoded).read_next_batch()

    def to_type_hint(self) -> type:
        """Return what this encodes."""
        return pa.RecordBatch


registry.register_coder(pa.RecordBatch, RecordBatchCoder)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A table to read."""

    pattern: str
    """Of its files."""
    format: Format
    files: tuple[str, ...]
    """In order."""
    file_rows: tuple[int, ...]
    """Rows to read of each file."""
    schema: pa.Schema
    is_whole: bool = True
    """Whether every row of every file that the pattern matches is to be read."""

    @property
    def num_rows(self) -> int:
        """Rows to read."""
        return sum(self.file_rows)

    def head(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return the first rows; of the files, only what holds them is read."""
        for path, rows in zip(self.files, self.file_rows, strict=True):
            if num_rows <= 0:
                return
            yield from _read_first((path, min(rows, num_rows)), self.format, self.schema)
            num_rows -= rows


def open_source(uri: str, *, limit: int | None = None) -> Source:
    """Find the files of a table and read its schema.

    Args:
        uri: A file, a pattern, or a folder of Parquet files, on any file system of Beam.
        limit: Rows to read, in the order of the files; None for all.

    Raises:
        OptionsError: there is no such file, or the files do not make one table.
    """
    file_format, pattern = _format_of(uri)
    paths = match_files(pattern)
    if not paths:
        raise OptionsError(f"{uri}: expected at least one file, got none; check the path")
    describe = partial(_describe, file_format=file_format, limit=limit)
    files: dict[str, int] = {}
    schema = None
    with ThreadPoolExecutor() as pool:
        described = pool.map(describe, paths) if limit is None else map(describe, paths)
        for path, (found, num_rows) in zip(paths, described, strict=True):
            schema = found if schema is None else _agreed(schema, found, path, file_format)
            left = num_rows if limit is None else limit - sum(files.values())
            files[path] = min(num_rows, left)
            if limit is not None and num_rows >= left:
                break
    assert schema is not None
    return Source(
        pattern=pattern,
        format=file_format,
        files=tuple(files),
        file_rows=tuple(files.values()),
        schema=schema,
        is_whole=limit is None,
    )


class ReadRecords(beam.PTransform[PBegin, PCollection[pa.RecordBatch]]):
    """Reads a table as record batches."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source

    def expand(self, pbegin: PBegin) -> PCollection[pa.RecordBatch]:
        """Apply the transform."""
        source = self._source
        if not source.is_whole:
            files = list(zip(source.files, source.file_rows, strict=True))
            batches = (
                pbegin
                | "Files" >> beam.Create(files)
                | "Spread" >> beam.Reshuffle()
                | "ReadFirst" >> beam.FlatMap(_read_first, source.format, source.schema)
            )
        elif source.format == "parquet":
            batches = (
                pbegin
                | "ReadParquet" >> ReadFromParquetBatched(source.pattern, validate=False)
                | "Slice" >> beam.FlatMap(_slices, source.schema)
            )
        else:
            batches = (
                pbegin
                | "ReadLines" >> ReadFromText(source.pattern, coder=BytesCoder(), validate=False)
                | "Parse" >> beam.ParDo(_ParseLines(source.schema))
            )
        return batches | "Count" >> beam.Map(_count_read).with_output_types(pa.RecordBatch)


class _ParseLines(beam.DoFn):
    """Gathers lines into batches of rows."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema

    def start_bundle(self) -> None:
        self._lines: list[bytes] = []

    def process(self, line: bytes) -> Iterator[pa.RecordBatch]:
        if line and not line.isspace():
            self._lines.append(line)
        if len(self._lines) == ROWS_PER_BATCH:
            yield jsonl.parse_lines(self._lines, self._schema)
            self._lines = []

    def finish_bundle(self) -> Iterator[Any]:
        if self._lines:
            batch = jsonl.parse_lines(self._lines, self._schema)
            yield GlobalWindows.windowed_value_at_end_of_window(batch)


def _format_of(uri: str) -> tuple[Format, str]:
    """Return the format of a table and the pattern of its files."""
    name = uri.rstrip("/").rpartition("/")[2]
    for file_format in FORMATS:
        if name.endswith(f".{file_format}") and not uri.endswith("/"):
            return file_format, uri
    if "." in name.strip(".") or set(name) & set("*?["):
        raise OptionsError(
            f"{uri}: expected files that end in .parquet or .jsonl, or a folder of Parquet files"
        )
    return "parquet", uri.rstrip("/") + "/*.parquet"


def match_files(pattern: str) -> list[str]:
    """Return the files that a pattern matches, in order.

    Raises:
        OptionsError: the file system is not known or cannot be listed.
    """
    try:
        (result,) = FileSystems.match([pattern])
    except (BeamIOError, ValueError) as error:
        raise OptionsError(f"{pattern}: expected files that can be listed, got: {error}") from error
    return sorted(file.path for file in result.metadata_list)


def _describe(path: str, *, file_format: Format, limit: int | None) -> tuple[pa.Schema, int]:
    """Return the schema and the number of rows of one file."""
    with FileSystems.open(path) as stream:
        if file_format == "jsonl":
            return jsonl.infer_schema(stream, path, limit=limit)
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise OptionsError(f"{path}: expected a Parquet file, got: {error}") from error
        return file.schema_arrow, file.metadata.num_rows


def _agreed(schema: pa.Schema, found: pa.Schema, path: str, file_format: Format) -> pa.Schema:
    """Return the one schema of all files so far."""
    if file_format == "jsonl":
        return jsonl.unify_schemas(schema, found, path)
    if not found.equals(schema):
        raise OptionsError(
            f"{path}: expected the columns of the files before it, got another "
            f"{_difference(schema, found)}"
        )
    return schema


def _difference(schema: pa.Schema, found: pa.Schema) -> str:
    if schema.names != found.names:
        names = sorted(set(schema.names) ^ set(found.names))
        return f"set of columns: {', '.join(names)}" if names else "order of columns"
    name = next(n for i, n in enumerate(schema.names) if not schema.field(i).equals(found.field(i)))
    return f"type of {name!r}: {found.field(name).type} for {schema.field(name).type}"


def _read_first(
    file_rows: tuple[str, int], file_format: Format, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Return so many rows of a file, from the first; no row group after them is read."""
    path, num_rows = file_rows
    with FileSystems.open(path) as stream:
        if file_format == "jsonl":
            lines = itertools.islice(jsonl.content_lines(stream), num_rows)
            while chunk := list(itertools.islice(lines, ROWS_PER_BATCH)):
                yield jsonl.parse_lines(chunk, schema)
            return
        file = pq.ParquetFile(stream)
        for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=_row_groups(file, num_rows)):
            yield with_schema(batch.slice(0, num_rows), schema)
            num_rows -= batch.num_rows
            if num_rows <= 0:
                return


def _row_groups(file: pq.ParquetFile, num_rows: int) -> list[int]:
    """Return the leading row groups that hold so many rows."""
    sizes = (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
    before = itertools.accumulate(sizes, initial=0)
    return [
        i for i, start in zip(range(file.num_row_groups), before, strict=False) if start < num_rows
    ]


def _slices(table: pa.Table, schema: pa.Schema) -> Iterable[pa.RecordBatch]:
    return (with_schema(b, schema) for b in table.to_batches(max_chunksize=ROWS_PER_BATCH))


def with_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch under a job's schema: files may differ in metadata, and lists in form."""
    columns = [c.cast(f.type) for c, f in zip(batch.columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _count_read(batch: pa.RecordBatch) -> pa.RecordBatch:
    Metrics.counter(METRICS_NAMESPACE, "rows_read").inc(batch.num_rows)
    return batch
