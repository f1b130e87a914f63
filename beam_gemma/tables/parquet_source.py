"""Read Parquet files: footers are read at launch, row groups by workers."""

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedIOBase
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from beam_gemma.batches import Located, with_schema
from beam_gemma.errors import OptionsError, StorageError, one_line
from beam_gemma.storage import open_file
from beam_gemma.tables.hive_partitions import Partitions, partitions_of
from beam_gemma.tables.parquet_file import (
    has_fixed_lists,
    has_inner_dictionary,
    may_have_nulls,
    open_parquet,
    read_type,
)
from beam_gemma.tables.parquet_schema import agreed, kept_metadata
from beam_gemma.tables.source import (
    Source,
    batch_rows,
    check_selected,
    fills_batch,
    leading_rows,
    sample_places,
)

MAX_PARTS = 128
"""Most parts of one file: the worker that reads a part parses the footer, however long it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Leading rows of a file or of some of its row groups."""

    path: str
    first_row: int
    """Position in the table of the first row."""
    num_rows: int
    row_groups: range | None = None
    """Indices of the row groups; None for the whole file."""
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
    bare_files: frozenset[str]
    """Files that are read with the types of Parquet, not with those that Arrow notes beside."""
    partition_schema: pa.Schema
    """Partition columns, which come from folder names; some or all may not be read."""
    partitions: tuple[tuple[Any, ...], ...]
    """Partition values of each file."""
    num_rows: int
    num_bytes: int
    is_dense: bool = True
    folder: str | None = None

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
            columns: The columns to read; None for all. The types of others do not matter.

        Raises:
            OptionsError: a file is not a Parquet file, or the files do not fit one schema.
        """
        partitions = partitions_of(root, paths)
        footers: dict[str, _Footer] = {}
        rows: list[int] = []
        schema: pa.Schema | None = None
        with ThreadPoolExecutor() as pool:
            read = map if limit is not None else pool.map
            for path, footer in zip(
                paths, read(lambda path: _footer(path, columns), paths), strict=True
            ):
                footers[path] = footer
                schema = footer.schema if schema is None else agreed(schema, footer.schema, path)
                left = footer.num_rows if limit is None else limit - sum(rows)
                rows.append(min(footer.num_rows, left))
                if limit is not None and footer.num_rows >= left:
                    break
        assert schema is not None
        _check_casts(footers, schema)
        names = [*footers[paths[0]].names, *partitions.schema.names]
        if columns is not None:
            check_selected(names, columns, uri)
        # A column that is in the files as well has the type that it has there.
        partitions = _without(partitions, schema.names)
        schema = _ordered(schema, partitions.schema, columns)
        return cls(
            uri=uri,
            schema=schema.with_metadata(kept_metadata(schema.metadata, schema.names)),
            bare_files=frozenset(path for path, footer in footers.items() if footer.is_bare),
            partition_schema=partitions.schema,
            partitions=tuple(partitions.values[path] for path in footers),
            files=tuple(footers),
            file_rows=tuple(rows),
            num_rows=sum(rows),
            num_bytes=sum(
                footer.num_bytes * some // max(1, footer.num_rows)
                for footer, some in zip(footers.values(), rows, strict=True)
            ),
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
        """Return runs of the row groups that hold the rows of a part, each of a batch or more."""
        groups = self._row_groups(part)
        fewest = math.ceil(len(groups) / MAX_PARTS)
        run: list[Part] = []
        num_rows = num_bytes = 0
        for group, size in groups:
            run.append(group)
            num_rows, num_bytes = num_rows + group.num_rows, num_bytes + size
            if len(run) >= fewest and fills_batch(num_rows, num_bytes):
                yield _merged(run)
                run, num_rows, num_bytes = [], 0, 0
        if run:
            yield _merged(run)

    def _row_groups(self, part: Part) -> list[tuple[Part, int]]:
        """Return the row groups that hold the rows of a part, with their sizes in bytes."""
        with _named(part.path), open_file(part.path) as stream:
            metadata = open_parquet(stream, is_bare=part.path in self.bare_files).metadata
        groups, first = [], 0
        for index in range(metadata.num_row_groups):
            if first >= part.num_rows:
                break
            group = metadata.row_group(index)
            one = replace(
                part,
                first_row=part.first_row + first,
                num_rows=min(group.num_rows, part.num_rows - first),
                row_groups=range(index, index + 1),
            )
            groups.append((one, group.total_byte_size))
            first += group.num_rows
        return groups

    def read(self, part: Part) -> Iterator[Located]:
        """Return the rows of row groups, or the leading rows of a file."""
        names = [name for name in self.schema.names if name not in self.partition_schema.names]
        position, end = part.first_row, part.first_row + part.num_rows
        with _named(part.path), open_file(part.path) as stream:
            file = open_parquet(stream, is_bare=part.path in self.bare_files)
            groups = list(part.row_groups if part.row_groups is not None else _leading(file, part))
            size = batch_rows(_row_bytes(file.metadata, groups))
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
            for group, _ in self._row_groups(part)
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


class _Footer(NamedTuple):
    """What a file's footer says of the file and of the columns to read."""

    schema: pa.Schema
    """Columns to read, in the types in which they are read."""
    types: dict[str, pa.DataType]
    """Types of these columns in the file."""
    names: list[str]
    """All columns of the file."""
    num_rows: int
    num_bytes: int
    is_bare: bool


def _footer(path: str, columns: tuple[str, ...] | None) -> _Footer:
    try:
        with open_file(path) as stream:
            file, is_bare = _opened(stream, path, columns)
            found, metadata = file.schema_arrow, file.metadata
            wanted = _wanted(found.names, columns, path)
            nulls = [
                has_fixed_lists(found.field(name).type) and may_have_nulls(metadata, name)
                for name in wanted
            ]
            fields = [
                field.with_type(read_type(field.type, has_nulls=has_nulls))
                for field, has_nulls in zip(map(found.field, wanted), nulls, strict=True)
            ]
            is_bare |= any(nulls)
            is_bare |= any(has_inner_dictionary(found.field(name).type) for name in wanted)
            if is_bare:
                found = open_parquet(stream, is_bare=True).schema_arrow
            return _Footer(
                schema=pa.schema(fields, found.metadata),
                types={name: found.field(name).type for name in wanted},
                names=found.names,
                num_rows=metadata.num_rows,
                num_bytes=_num_bytes(metadata, range(metadata.num_row_groups)),
                is_bare=is_bare,
            )
    except (OSError, pa.ArrowException) as error:
        raise OptionsError(f"{path}: expected a Parquet file, got: {error}") from error


def _opened(
    stream: BufferedIOBase, path: str, columns: tuple[str, ...] | None
) -> tuple[pq.ParquetFile, bool]:
    """Return a file, and whether it is bare, for columns of types that PyArrow does not have."""
    try:
        return open_parquet(stream), False
    except pa.ArrowNotImplementedError as error:
        unknown = f"expected columns of types that can be read, got an error: {error}"
        if columns is None:
            raise OptionsError(f"{path}: {unknown}; name those to read with --columns") from error
        file = open_parquet(stream, is_bare=True)
        # Integers of 128 bits, as polars writes them, are bytes to Parquet.
        for name in set(columns) & set(file.schema_arrow.names):
            if pa.types.is_fixed_size_binary(file.schema_arrow.field(name).type):
                raise OptionsError(
                    f"{path}: column {name!r}: {unknown}; leave it out of --columns"
                ) from error
        return file, True


def _wanted(names: list[str], columns: tuple[str, ...] | None, path: str) -> list[str]:
    """Return the columns to read of those that a file has."""
    wanted = names if columns is None else [name for name in columns if name in names]
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise OptionsError(f"{path}: expected the column {twice[0]!r} once, got it twice")
    return wanted


def _check_casts(footers: dict[str, _Footer], schema: pa.Schema) -> None:
    """Check that each file's columns can be read in the table's types."""
    for path, footer in footers.items():
        for name, kind in footer.types.items():
            wanted = schema.field(name).type
            try:
                pa.array([], kind).cast(wanted)
            except pa.ArrowNotImplementedError as error:
                raise OptionsError(
                    f"{path}: column {name!r}: expected a type that can be read as {wanted}, got "
                    f"{kind}; leave it out with --columns"
                ) from error


def _without(partitions: Partitions, names: Sequence[str]) -> Partitions:
    """Return partition columns without those of these names."""
    kept = [i for i, name in enumerate(partitions.schema.names) if name not in names]
    return Partitions(
        schema=pa.schema([partitions.schema.field(i) for i in kept]),
        values={path: tuple(values[i] for i in kept) for path, values in partitions.values.items()},
    )


def _ordered(
    schema: pa.Schema, partitions: pa.Schema, columns: tuple[str, ...] | None
) -> pa.Schema:
    """Return the requested columns in their order, or those of files and then of folders."""
    joined = pa.schema([*schema, *partitions], schema.metadata)
    if columns is None:
        return joined
    return pa.schema([joined.field(column) for column in columns], joined.metadata)


def _merged(run: Sequence[Part]) -> Part:
    """Return consecutive row groups as one part."""
    groups = [group for part in run for group in part.row_groups or ()]
    return replace(
        run[0],
        num_rows=sum(part.num_rows for part in run),
        row_groups=range(groups[0], groups[-1] + 1),
    )


def _num_bytes(metadata: pq.FileMetaData, groups: Sequence[int]) -> int:
    """Return the uncompressed bytes of row groups."""
    return sum(metadata.row_group(group).total_byte_size for group in groups)


def _row_bytes(metadata: pq.FileMetaData, groups: Sequence[int]) -> int:
    """Return the mean uncompressed bytes of a row in row groups."""
    num_rows = sum(metadata.row_group(group).num_rows for group in groups)
    return _num_bytes(metadata, groups) // max(1, num_rows)


def _leading(file: pq.ParquetFile, part: Part) -> list[int]:
    """Return the row groups that hold the leading rows of a file."""
    sizes = (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
    before = itertools.accumulate(sizes, initial=0)
    return [
        i
        for i, start in zip(range(file.num_row_groups), before, strict=False)
        if start < part.num_rows
    ]
