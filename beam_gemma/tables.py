"""Tables to read, by their names."""

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PBegin, PCollection

from beam_gemma.batches import Located
from beam_gemma.errors import OptionsError
from beam_gemma.jsonl_source import JsonlSource
from beam_gemma.parquet_source import ParquetSource
from beam_gemma.progress import METRICS_NAMESPACE
from beam_gemma.sink import FORMATS, Format
from beam_gemma.source import Source, match_files


def open_source(
    uri: str, *, limit: int | None = None, columns: tuple[str, ...] | None = None
) -> Source:
    """Find a table and read its schema.

    Args:
        uri: A file, a pattern, or a folder of Parquet files, on any file system of Beam.
        limit: Rows to read, in the order of the files; None for all.
        columns: To read; None for all.

    Raises:
        OptionsError: there is no such table or column, or the files do not make one table.
    """
    file_format, pattern = _format_of(uri)
    paths = match_files(pattern)
    if not paths:
        raise OptionsError(f"{uri}: expected at least one file, got none; check the path")
    open_files = ParquetSource.open if file_format == "parquet" else JsonlSource.open
    return open_files(uri, paths, limit=limit, columns=columns)


class ReadTable(beam.PTransform[PBegin, PCollection[Located]]):
    """Reads a table: some rows at a time, with the position of the first."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source

    def expand(self, pbegin: PBegin) -> PCollection[Located]:
        """Apply the transform."""
        return (
            pbegin
            | "Parts" >> beam.Create(self._source.parts(), reshuffle=False)
            | "Split" >> beam.FlatMap(self._source.split)
            | "Spread" >> beam.Reshuffle()
            | "Rows"
            >> beam.ParDo(_Read(self._source)).with_output_types(tuple[int, pa.RecordBatch])
        )


class _Read(beam.DoFn):
    """Reads a part of a table."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._rows_read = Metrics.counter(METRICS_NAMESPACE, "rows_read")

    def process(self, part: Any) -> Iterator[Located]:
        for position, batch in self._source.read(part):
            self._rows_read.inc(batch.num_rows)
            yield position, batch


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
