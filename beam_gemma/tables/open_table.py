"""Open a table by its URI, and the Beam transform that reads it."""

import re
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PBegin, PCollection

from beam_gemma.batches import Located
from beam_gemma.beam_internals import send_whole
from beam_gemma.errors import OptionsError
from beam_gemma.monitoring.progress import METRICS_NAMESPACE
from beam_gemma.storage import match_files
from beam_gemma.tables.hive_partitions import is_data
from beam_gemma.tables.jsonl_source import JsonlSource
from beam_gemma.tables.parquet_source import ParquetSource
from beam_gemma.tables.source import Source

WILDCARD = re.compile(r"[*?\[]")


def open_source(
    uri: str,
    *,
    limit: int | None = None,
    columns: tuple[str, ...] | None = None,
    dry_run: bool = False,
) -> Source:
    """Find the files of a table and read its schema.

    Args:
        uri: A file, a pattern, or a folder of Parquet files, on any Beam file system. Folders
            such as `day=2024-01-01` below it, or after a pattern's first wildcard, become columns.
        limit: Number of rows to read, in file order; None for all.
        columns: The columns to read; None for all.
        dry_run: Open for a preview only: without a limit, the types of JSON lines come from a
            sample of the lines.

    Raises:
        OptionsError: the table or a column does not exist, or the files do not fit one schema.
    """
    if uri.endswith(".jsonl"):
        paths = _found(match_files(uri), uri)
        return JsonlSource.open(uri, paths, limit=limit, columns=columns, dry_run=dry_run)
    root, paths = _parquet_files(uri)
    return ParquetSource.open(uri, _found(paths, uri), root=root, limit=limit, columns=columns)


class ReadTable(beam.PTransform[PBegin, PCollection[Located]]):
    """Reads a table as Arrow record batches, each with the position of its first row.

    The table's schema is read when the transform is made.

    Args:
        table: What `open_source` takes, such as `articles.parquet`, or an open source.

    Raises:
        OptionsError: there is no such table, or its files do not make one table.

    Example:
        >>> articles = ReadTable("examples/articles.parquet")
        >>> articles.source.schema.names[:2]
        ['id', 'title']
    """

    def __init__(self, table: str | Source) -> None:
        super().__init__()
        self.source = open_source(table) if isinstance(table, str) else table

    def expand(self, pbegin: PBegin) -> PCollection[Located]:
        """Apply the transform."""
        send_whole()
        return (
            pbegin
            | "Parts" >> beam.Create(self.source.parts(), reshuffle=False)
            | "Split" >> beam.FlatMap(self.source.split)
            | "Spread" >> beam.Reshuffle()
            | "Rows" >> beam.ParDo(_Read(self.source)).with_output_types(tuple[int, pa.RecordBatch])
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


def _parquet_files(uri: str) -> tuple[str, list[str]]:
    """Return the folder of a table and its files."""
    folder = uri.rstrip("/")
    name = folder.rpartition("/")[2]
    is_named = name.endswith(".parquet")
    if not is_named and ("." in name.strip(".") or WILDCARD.search(name)):
        raise OptionsError(
            f"{uri}: expected files that end in .parquet or .jsonl, or a folder of Parquet files"
        )
    if wildcard := WILDCARD.search(uri):
        root = uri[: wildcard.start()].rpartition("/")[0]
        return root, match_files(uri if is_named else f"{folder}/*.parquet")
    inside = [path for path in match_files(f"{folder}/**.parquet") if is_data(path, folder)]
    # Spark writes table.parquet as a folder.
    if inside or not is_named or uri.endswith("/"):
        return folder, inside
    return folder.rpartition("/")[0], match_files(uri)


def _found(paths: list[str], uri: str) -> list[str]:
    if not paths:
        raise OptionsError(f"{uri}: expected at least one file, got none; check the path")
    return paths
