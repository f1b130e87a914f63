"""Read Parquet files: footers are read at launch, row groups by workers."""

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystems import FileSystems

from beam_gemma.batches import Located, with_schema
from beam_gemma.errors import OptionsError, StorageError, one_line
from beam_gemma.tables.hive_partitions import partitions_of
from beam_gemma.tables.source import (
    Source,
    batch_rows,
    leading_rows,
    sample_places,
    selected,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Leading rows of a file or of one of its row groups."""

    path: str
    first_row: int
    """Position in the table of the first row."""
    num_rows: int
    row_group: int | None = None
    """Index of the row group; None for the whole file."""
    partition: tuple[Any, ...] = ()
    """Values of the table's partition columns, from the file's folders."""


@dataclass(frozen=True, kw_only=True)
class ParquetSource(Source):
    """The rows of Parquet files, in file order."""

    uri: str
    schema: pa.Schema
    files: tuple[str, ...]
    file_rows: tuple[int, ...]
    """Number of leading rows to read from each file."""
    partition_schema: pa.Schema
    """Partition columns, which come from folder names; some or all may not be read."""
    partitions: tuple[tuple[Any, ...], ...]
    """Partition values of each file."""
    num_rows: int
    num_bytes: int
    is_dense: bool = True

    @classmethod
    def open(
        cls,
        uri: str,
        paths: Sequence[str],
        *,
        root: str,
        limit: int | None = None,
        columns: tuple[str, ...] | None = None,
    ) -> "ParquetSource":
        """Read the footers of the files, or with a limit only those it needs.

        Args:
            uri: The URI of the table.
            paths: The files of the table, in order.
            root: The folder of the table; folders below it may hold partition columns.
            limit: Number of rows to read; None for all.
            columns: The columns to read; None for all.

        Raises:
            OptionsError: a file is not a Parquet file, or the files do not fit one schema.
        """
        partitions = partitions_of(root, paths)
        files: dict[str, int] = {}
        num_bytes = 0
        schema: pa.Schema | None = None
        with ThreadPoolExecutor() as pool:
            footers = map(_footer, paths) if limit is not None else pool.map(_footer, paths)
            for path, (found, metadata) in zip(paths, footers, strict=True):
                schema = found if schema is None else _agreed(schema, found, path)
                left = metadata.num_rows if limit is None else limit - sum(files.values())
                files[path] = min(metadata.num_rows, left)
                num_bytes += _num_bytes(metadata, files[path])
                if limit is not None and metadata.num_rows >= left:
                    break
        assert schema is not None
        return cls(
            uri=uri,
            schema=selected(_joined(schema, partitions.schema, uri), columns, uri),
            partition_schema=partitions.schema,
            partitions=tuple(partitions.values[path] for path in files),
            files=tuple(files),
            file_rows=tuple(files.values()),
            num_rows=sum(files.values()),
            num_bytes=num_bytes,
        )

    def parts(self) -> list[Part]:
        """Return one part per file that has rows to read."""
        firsts = itertools.accumulate(self.file_rows, initial=0)
        return [
            Part(path=path, first_row=first, num_rows=rows, partition=partition)
            for path, first, rows, partition in zip(
                self.files, firsts, self.file_rows, self.partitions, strict=False
            )
            if rows
        ]

    def split(self, part: Part) -> Iterator[Part]:
        """Return the row groups that hold the rows of a part."""
        with FileSystems.open(part.path) as stream:
            metadata = pq.ParquetFile(stream).metadata
        first = 0
        for group in range(metadata.num_row_groups):
            if first >= part.num_rows:
                return
            rows = metadata.row_group(group).num_rows
            yield replace(
                part,
                first_row=part.first_row + first,
                num_rows=min(rows, part.num_rows - first),
                row_group=group,
            )
            first += rows

    def read(self, part: Part) -> Iterator[Located]:
        """Return the rows of a row group, or the leading rows of a file."""
        names = [name for name in self.schema.names if name not in self.partition_schema.names]
        position, end = part.first_row, part.first_row + part.num_rows
        with _named(part.path), FileSystems.open(part.path) as stream:
            file = pq.ParquetFile(stream)
            groups = [part.row_group] if part.row_group is not None else _leading(file, part)
            size = batch_rows(_num_bytes(file.metadata, 1))
            for batch in file.iter_batches(size, row_groups=groups, columns=names):
                rows = batch.select(names).slice(0, end - position)
                yield position, self._whole(rows, part)
                position += rows.num_rows
                if position == end:
                    return

    def _whole(self, rows: pa.RecordBatch, part: Part) -> pa.RecordBatch:
        """Return the rows with the partition columns added."""
        columns = dict(zip(rows.schema.names, rows.columns, strict=True))
        for field, value in zip(self.partition_schema, part.partition, strict=True):
            columns[field.name] = pa.repeat(pa.scalar(value, field.type), rows.num_rows)
        names = self.schema.names
        batch = pa.RecordBatch.from_arrays([columns[name] for name in names], names)
        return with_schema(batch, self.schema.remove_metadata())

    def head(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return the first rows without reading further row groups."""
        return leading_rows(self, num_rows)

    def sample(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return the first rows of row groups from across the table."""
        if num_rows >= self.num_rows:
            yield from self.head(num_rows)
            return
        places = sample_places(self.num_rows)
        groups = [
            group
            for part in self.parts()
            if _holds_any(part, places)
            for group in self.split(part)
            if _holds_any(group, places)
        ]
        for index, group in enumerate(groups):
            # Later row groups make up for short ones.
            rows = min(group.num_rows, math.ceil(num_rows / (len(groups) - index)))
            num_rows -= rows
            yield from (batch for _, batch in self.read(replace(group, num_rows=rows)))


def _holds_any(part: Part, rows: Sequence[int]) -> bool:
    return any(part.first_row <= row < part.first_row + part.num_rows for row in rows)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Name the unreadable file in the error; pages can be damaged under an intact footer."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"{path}: expected rows of Parquet, got {one_line(error)}; replace the file, "
            "then go on with --resume"
        ) from error


def _footer(path: str) -> tuple[pa.Schema, pq.FileMetaData]:
    try:
        with FileSystems.open(path) as stream:
            file = pq.ParquetFile(stream)
            return file.schema_arrow, file.metadata
    except (OSError, pa.ArrowInvalid) as error:
        raise OptionsError(f"{path}: expected a Parquet file, got: {error}") from error


def _agreed(schema: pa.Schema, found: pa.Schema, path: str) -> pa.Schema:
    """Return the merged schema of earlier files and one more file.

    A column is nullable if any file says so; a column of nulls takes its type from another file.
    """
    if schema.names != found.names:
        names = sorted(set(schema.names) ^ set(found.names))
        what = f"set of columns: {', '.join(names)}" if names else "order of columns"
        raise _disagreement(path, what)
    fields = []
    for ours, theirs in zip(schema, found, strict=True):
        try:
            (field,) = pa.unify_schemas([pa.schema([ours]), pa.schema([theirs])])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            what = f"type of {ours.name!r}: {theirs.type} for {ours.type}"
            raise _disagreement(path, what) from error
        fields.append(field)
    return pa.schema(fields, schema.metadata)


def _disagreement(path: str, what: str) -> OptionsError:
    return OptionsError(f"{path}: expected the columns of the files before it, got another {what}")


def _joined(schema: pa.Schema, partitions: pa.Schema, uri: str) -> pa.Schema:
    """Return the columns of the files, followed by the partition columns."""
    joined = pa.schema([*schema, *partitions], schema.metadata)
    for name in joined.names:
        if joined.names.count(name) > 1:
            where = "its files and its folders" if name in partitions.names else "its files, twice"
            raise OptionsError(f"{uri}: expected the column {name!r} once, got it in {where}")
    return joined


def _num_bytes(metadata: pq.FileMetaData, num_rows: int) -> int:
    """Return the approximate uncompressed bytes of the leading rows of a file."""
    groups = range(metadata.num_row_groups)
    total = sum(metadata.row_group(group).total_byte_size for group in groups)
    return total * num_rows // max(1, metadata.num_rows)


def _leading(file: pq.ParquetFile, part: Part) -> list[int]:
    """Return the row groups that hold the leading rows of a file."""
    sizes = (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
    before = itertools.accumulate(sizes, initial=0)
    return [
        i
        for i, start in zip(range(file.num_row_groups), before, strict=False)
        if start < part.num_rows
    ]
