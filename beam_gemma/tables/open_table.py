"""Open a table by its URI, and the Beam transform that reads it."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PBegin, PCollection

from beam_gemma.batches import Located
from beam_gemma.beam_internals import private_ports, send_whole
from beam_gemma.errors import OptionsError
from beam_gemma.monitoring.progress import METRICS_NAMESPACE
from beam_gemma.storage import literal_pattern, match_files
from beam_gemma.tables.hive_partitions import HIDDEN, is_data, parts_below
from beam_gemma.tables.jsonl_source import JsonlSource
from beam_gemma.tables.parquet_source import ParquetSource
from beam_gemma.tables.source import Source

WILDCARD = re.compile(r"[*?\[]")
ENDS = {"parquet": ".parquet", "jsonl": ".jsonl"}
LOGS = {
    "Delta table": "_delta_log/*",
    "Hudi table": ".hoodie/*",
    "Iceberg table": "metadata/*.metadata.json",
}
"""Files that make a folder a table of another kind. They say which of its Parquet files hold the
present rows; the others are of earlier versions."""


def open_source(
    uri: str,
    *,
    limit: int | None = None,
    columns: tuple[str, ...] | None = None,
    dry_run: bool = False,
) -> Source:
    """Find the files of a table and read its schema.

    Args:
        uri: A file, a pattern, or a folder of Parquet files or of JSON lines, on any Beam file
            system. What is there under this very name is no pattern, whatever signs the name has.
            A leading `~` is the home folder. Folders such as `day=2024-01-01` below it, or after a
            pattern's first wildcard, become columns.
        limit: Number of rows to read, in file order; None for all.
        columns: The columns to read; None for all.
        dry_run: Open for a preview only: without a limit, the types of JSON lines come from a
            sample of the lines.

    Raises:
        OptionsError: the table or a column does not exist, or the files do not fit one schema.
    """
    uri = os.path.expanduser(uri)  # noqa: PTH111 - a Path would change URIs
    found = _find(uri)
    if not found.paths:
        raise OptionsError(f"{uri}: expected at least one file, got none; check the path")
    source: JsonlSource | ParquetSource
    if found.is_jsonl:
        source = JsonlSource.open(uri, found.paths, limit=limit, columns=columns, dry_run=dry_run)
    else:
        source = ParquetSource.open(uri, found.paths, root=found.root, limit=limit, columns=columns)
    return replace(source, folder=found.root or ("/" if uri.startswith("/") else ""))


class _Found(NamedTuple):
    """The files of a table."""

    root: str
    """Folder of the table."""
    paths: list[str]
    is_jsonl: bool = False


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
        private_ports()
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


def _find(uri: str) -> _Found:
    folder = uri.rstrip("/")
    name = folder.rpartition("/")[2]
    ends = [end for end in ENDS.values() if name.endswith(end)]
    is_pattern = WILDCARD.search(uri) is not None and not _is_there(folder)
    if not ends and ("." in name.strip(".") or (is_pattern and WILDCARD.search(name))):
        raise OptionsError(
            f"{uri}: expected files that end in .parquet or .jsonl, or a folder of such files"
        )
    if is_pattern:
        return _match(uri, uri if ends else f"{folder}/*.parquet")
    # Spark writes table.parquet as a folder.
    inside = _inside(folder)
    if inside.paths or not ends or uri.endswith("/"):
        return inside
    return _Found(folder.rpartition("/")[0], _files(folder), uri.endswith(ENDS["jsonl"]))


def _is_there(path: str) -> bool:
    if FileSystems.exists(path) or FileSystems.exists(f"{path}/"):
        return True
    # In an object store, a folder exists only if it contains objects.
    return "://" in path and is_any(f"{literal_pattern(path)}/**")


def _files(path: str) -> list[str]:
    return [path] if FileSystems.exists(path) else []


def _match(uri: str, pattern: str) -> _Found:
    """Return the files that match a pattern; it passes over hidden ones that it does not name."""
    place = WILDCARD.search(pattern)
    assert place is not None
    root = pattern[: place.start()].rpartition("/")[0]
    named = {part[:1] for part in parts_below(pattern, root)} & set(HIDDEN)
    hidden = tuple(set(HIDDEN) - named)
    paths = [
        path
        for path in match_files(pattern)
        if not any(part.startswith(hidden) for part in parts_below(path, root))
    ]
    is_jsonl = pattern.endswith(ENDS["jsonl"])
    if not is_jsonl:
        _refuse_other_tables(uri, root)
    return _Found(root, paths, is_jsonl)


def _inside(folder: str) -> _Found:
    """Return the Parquet files of a folder or, if it has none, its files of JSON lines."""

    def below(end: str) -> list[str]:
        found = match_files(f"{literal_pattern(folder)}/**{end}")
        return [path for path in found if is_data(path, folder)]

    paths = below(ENDS["parquet"])
    _refuse_other_tables(folder, folder)
    if paths or not (lines := below(ENDS["jsonl"])):
        return _Found(folder, paths)
    for path in lines:
        if len(parts_below(path, folder)) > 1:
            raise OptionsError(
                f"{path}: expected JSON lines without folders of partitions, whose values would "
                "not be read; name the files by a pattern"
            )
    return _Found(folder, lines, is_jsonl=True)


def _refuse_other_tables(uri: str, root: str) -> None:
    """Refuse a folder whose Parquet files are not all rows of its table.

    Raises:
        OptionsError: the folder, or one that it is a part of, has a log of versions.
    """
    folders = [root]
    while "=" in folders[-1].rpartition("/")[2]:
        folders.append(folders[-1].rpartition("/")[0])
    places = [(folder, kind, log) for folder in folders for kind, log in LOGS.items()]
    # Iceberg keeps its files in a folder beside that of its metadata.
    top, _, name = folders[-1].rpartition("/")
    if name == "data":
        places.append((top, "Iceberg table", LOGS["Iceberg table"]))
    for folder, kind, log in places:
        if is_any(f"{literal_pattern(folder)}/{log}"):
            raise OptionsError(
                f"{uri}: expected a folder whose files are all of the table's rows, got a {kind}, "
                "which keeps files of earlier versions; write its present rows to Parquet with an "
                "engine that reads it, such as Spark or DuckDB, and read those"
            )


def is_any(pattern: str) -> bool:
    """Return whether any file matches a pattern."""
    (found,) = FileSystems.match([pattern], limits=[1])
    return bool(found.metadata_list)
