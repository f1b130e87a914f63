"""Tables in files of JSON lines: all lines are looked at once at launch, for the types.

For a dry run some from all over the table are enough, so types that only others have are not known
to it.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from beam_gemma.batches import Located
from beam_gemma.tables import json_lines
from beam_gemma.tables.source import BATCH_ROWS, SAMPLE_PLACES, SAMPLE_ROWS, Source, selected


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some lines of a file."""

    path: str
    start: int
    """Where they begin, in bytes."""
    num_bytes: int
    first_row: int
    """Of the table."""
    num_rows: int


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The lines that begin between two places of a file."""

    path: str
    start: int = 0
    """In bytes."""
    end: int | None = None
    """None for all that follow."""


@dataclass(frozen=True, kw_only=True)
class JsonlSource(Source):
    """The rows of JSON lines files, one after the other."""

    uri: str
    schema: pa.Schema
    file_schema: pa.Schema
    """With the columns that are not read."""
    files: tuple[str, ...]
    lines: tuple[Part, ...]
    num_rows: int | None
    num_bytes: int
    is_dense: bool = True

    @classmethod
    def open(
        cls,
        uri: str,
        paths: Sequence[str],
        *,
        limit: int | None = None,
        columns: tuple[str, ...] | None = None,
        dry_run: bool = False,
    ) -> "JsonlSource":
        """Find the types of all columns; with a limit, from the lines that it needs.

        Args:
            uri: Of the table.
            paths: Of its files, in order.
            limit: Rows to read; None for all.
            columns: To read; None for all.
            dry_run: Whether only to look at some lines, from all over the table. Such a source may
                have more rows than it knows and reads.

        Raises:
            OptionsError: a line is not a JSON object, or the files do not make one table.
        """
        is_sample = dry_run and limit is None
        sections = [[_Stretch(path) for path in paths]]
        if is_sample:
            sections, limit = _sections(paths), math.ceil(SAMPLE_ROWS / SAMPLE_PLACES)
        schema = pa.schema([])
        parts: list[Part] = []
        files: dict[str, None] = {}
        is_part = False
        for section in sections:
            left = limit
            for stretch in section:
                if left is not None and left <= 0:
                    break
                found, lines = _scan(stretch, _num_rows(parts), left)
                schema = json_lines.unify_schemas(schema, found, stretch.path)
                files[stretch.path] = None
                parts += lines
                left = None if left is None else left - _num_rows(lines)
            is_part |= is_sample and left == 0
        schema = pa.schema([field.with_type(_settled(field.type)) for field in schema])
        return cls(
            uri=uri,
            schema=selected(schema, columns, uri),
            file_schema=schema,
            files=tuple(files),
            lines=tuple(parts),
            num_rows=None if is_part else _num_rows(parts),
            num_bytes=sum(_sizes(paths)) if is_part else _num_bytes(parts),
        )

    def parts(self) -> list[Part]:
        """Return chunks of lines."""
        return list(self.lines)

    def read(self, part: Part) -> Iterator[Located]:
        """Return the rows of a chunk."""
        position = part.first_row
        with FileSystems.open(part.path) as stream:
            stream.seek(part.start)
            lines = itertools.islice(json_lines.content_lines(stream), part.num_rows)
            while chunk := list(itertools.islice(lines, BATCH_ROWS)):
                yield (
                    position,
                    json_lines.parse_lines(chunk, self.file_schema).select(self.schema.names),
                )
                position += len(chunk)

    def head(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return the first rows; no line after them is read."""
        for part in self.lines:
            rows = min(part.num_rows, num_rows - part.first_row)
            if rows <= 0:
                return
            yield from (batch for _, batch in self.read(replace(part, num_rows=rows)))

    def sample(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return the first rows; for a dry run, the only ones from all over the table."""
        return self.head(num_rows)

    @property
    def expected_rows(self) -> int | None:
        """How many rows there are, or would be if all were as long as those looked at."""
        if self.num_rows is not None:
            return self.num_rows
        return round(self.num_bytes * _num_rows(self.lines) / _num_bytes(self.lines))


def _num_rows(parts: Sequence[Part]) -> int:
    return sum(part.num_rows for part in parts)


def _num_bytes(parts: Sequence[Part]) -> int:
    return sum(part.num_bytes for part in parts)


def _sizes(paths: Sequence[str]) -> list[int]:
    """Return the bytes of each file."""
    return [
        file.size_in_bytes
        for found in FileSystems.match(list(paths))
        for file in found.metadata_list
    ]


def _sections(paths: Sequence[str]) -> list[list[_Stretch]]:
    """Return the table in as many sections as a sample has places, each of so many bytes."""
    sizes = _sizes(paths)
    starts = [sum(sizes) * i // SAMPLE_PLACES for i in range(SAMPLE_PLACES + 1)]
    files = list(zip(paths, itertools.accumulate(sizes, initial=0), sizes, strict=False))
    return [
        [
            _Stretch(path, max(start - first, 0), min(end - first, size))
            for path, first, size in files
            if max(start, first) < min(end, first + size)
        ]
        for start, end in itertools.pairwise(starts)
    ]


def _settled(kind: pa.DataType) -> pa.DataType:
    """Return a type that has texts inside where nothing but nulls has been found.

    PyArrow makes broken arrays of lists of nulls.
    """

    def inner(kind: pa.DataType) -> pa.DataType:
        return pa.string() if pa.types.is_null(kind) else _settled(kind)

    if pa.types.is_list(kind):
        return pa.list_(inner(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(inner(field.type)) for field in kind])
    return kind


def _scan(stretch: _Stretch, first_row: int, limit: int | None) -> tuple[pa.Schema, list[Part]]:
    """Return the types of columns in a stretch of a file, and its lines in chunks."""
    schema = pa.schema([])
    parts = []
    with FileSystems.open(stretch.path) as stream:
        start = _begin(stream, stretch.start)
        name = f"{stretch.path}, from byte {start:,} on" if start else stretch.path
        for chunk in json_lines.chunks(_lines(stream, start, stretch.end), name, limit=limit):
            schema = json_lines.unify_schemas(schema, chunk.schema, name)
            parts.append(
                Part(
                    path=stretch.path,
                    start=start,
                    num_bytes=chunk.num_bytes,
                    first_row=first_row,
                    num_rows=chunk.num_rows,
                )
            )
            start += chunk.num_bytes
            first_row += chunk.num_rows
    return schema, parts


def _begin(stream: BinaryIO, place: int) -> int:
    """Go to the first line that begins at a place or after it, and return where that is."""
    if place == 0:
        return 0
    stream.seek(place - 1)  # where the line before may end
    return place - 1 + len(stream.readline())


def _lines(stream: Iterable[bytes], start: int, end: int | None) -> Iterator[bytes]:
    """Return the lines that begin before a place."""
    for line in stream:
        if end is not None and start >= end:
            return
        start += len(line)
        yield line
