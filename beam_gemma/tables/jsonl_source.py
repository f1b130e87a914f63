"""Read JSON lines files: all lines are parsed once at launch to infer the column types.

A dry run parses only a sample from across the table, so it misses types that occur elsewhere.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase

import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from beam_gemma.batches import Located
from beam_gemma.errors import StorageError, one_line
from beam_gemma.storage import open_file
from beam_gemma.tables import json_lines
from beam_gemma.tables.source import (
    BATCH_ROWS,
    SAMPLE_PLACES,
    SAMPLE_ROWS,
    Source,
    check_selected,
    leading_rows,
    sample_places,
    selected,
)

COUNT_BYTES = 1 << 20
"""Bytes to read at once when lines are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Consecutive lines of a file."""

    path: str
    start: int
    """Byte offset of the first line."""
    num_bytes: int
    first_row: int
    """Position in the table of the first row."""
    num_rows: int


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The lines that begin in a byte range of a file."""

    path: str
    start: int = 0
    """Start of the range, in bytes."""
    end: int | None = None
    """End of the range, exclusive, in bytes; None for the end of the file."""


@dataclass(frozen=True, kw_only=True)
class JsonlSource(Source):
    """The rows of JSON lines files, in file order."""

    uri: str
    schema: pa.Schema
    files: tuple[str, ...]
    lines: tuple[Part, ...]
    num_rows: int | None
    num_bytes: int
    is_dense: bool = True
    folder: str | None = None

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
        """Infer the column types from all lines, or from those within the limit.

        Args:
            uri: The URI of the table.
            paths: The files of the table, in order.
            limit: Number of rows to read; None for all.
            columns: The columns to read; None for all.
            dry_run: Without a limit, read only a sample of lines from across the table; the number
                of rows may then be unknown.

        Raises:
            OptionsError: a line is not a JSON object, or the files do not fit one schema.
        """
        is_sample = dry_run and limit is None
        sections = [[_Stretch(path) for path in paths]]
        if is_sample:
            sections, limit = _sections(paths), math.ceil(SAMPLE_ROWS / SAMPLE_PLACES)
        found = json_lines.Columns(columns)
        parts: list[Part] = []
        files: dict[str, None] = {}
        is_part = False
        for section in sections:
            left = limit
            for stretch in section:
                if left is not None and left <= 0:
                    break
                lines = _scan(stretch, found, _num_rows(parts), left)
                files[stretch.path] = None
                parts += lines
                left = None if left is None else left - _num_rows(lines)
            is_part |= is_sample and left == 0
        if columns is not None:
            check_selected(found.names, columns, uri)
        return cls(
            uri=uri,
            schema=found.schema if columns is None else selected(found.schema, columns, uri),
            files=tuple(files),
            lines=tuple(parts),
            num_rows=None if is_part else _num_rows(parts),
            num_bytes=sum(_sizes(paths)) if is_part else _num_bytes(parts),
        )

    def parts(self) -> list[Part]:
        """Return the chunks of lines found at launch."""
        return list(self.lines)

    def read(self, part: Part) -> Iterator[Located]:
        """Return the rows of a chunk."""
        position = part.first_row
        with _unchanged(part), open_file(part.path) as stream:
            stream.seek(part.start)
            lines = itertools.islice(json_lines.content_lines(stream), part.num_rows)
            while chunk := list(itertools.islice(lines, BATCH_ROWS)):
                yield position, json_lines.parse_lines(chunk, self.schema)
                position += len(chunk)

    def head(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return the first rows without reading further lines."""
        return leading_rows(self, num_rows)

    def sample(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return the first known rows; in a dry run, those come from across the table."""
        return self.head(num_rows)

    @property
    def expected_rows(self) -> int | None:
        """Number of rows, estimated from the mean length of the sampled lines if not counted."""
        if self.num_rows is not None:
            return self.num_rows
        return round(self.num_bytes * _num_rows(self.lines) / _num_bytes(self.lines))


def _num_rows(parts: Sequence[Part]) -> int:
    return sum(part.num_rows for part in parts)


def _num_bytes(parts: Sequence[Part]) -> int:
    return sum(part.num_bytes for part in parts)


def _sizes(paths: Sequence[str]) -> list[int]:
    """Return the size of each file in bytes."""
    return [
        file.size_in_bytes
        for found in FileSystems.match(list(paths))
        for file in found.metadata_list
    ]


def _sections(paths: Sequence[str]) -> list[list[_Stretch]]:
    """Split the table into `SAMPLE_PLACES` sections of equal size in bytes."""
    sizes = _sizes(paths)
    bounds = [*sample_places(sum(sizes)), sum(sizes)]
    files = list(zip(paths, itertools.accumulate(sizes, initial=0), sizes, strict=False))
    return [
        [
            _Stretch(path, max(start - first, 0), min(end - first, size))
            for path, first, size in files
            if max(start, first) < min(end, first + size)
        ]
        for start, end in itertools.pairwise(bounds)
    ]


@contextmanager
def _unchanged(part: Part) -> Iterator[None]:
    """Name the file in the error; its lines were read at launch, so it has changed since."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StorageError(
            f"{part.path}, from byte {part.start:,} on: expected the lines that were there when "
            f"the job began, got {one_line(error)}; put the file back, then go on with --resume"
        ) from error


def _scan(
    stretch: _Stretch, columns: json_lines.Columns, first_row: int, limit: int | None
) -> list[Part]:
    """Return the lines of a stretch of a file in chunks, and add to the columns found so far."""
    parts = []
    with open_file(stretch.path) as stream:
        start = first = _begin(stream, stretch.start)
        lines = _lines(stream, start, stretch.end)
        for chunk in json_lines.chunks(
            lines,
            stretch.path,
            columns,
            limit=limit,
            lines_before=lambda: _num_lines(stretch.path, first),
        ):
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
    return parts


def _num_lines(path: str, end: int) -> int:
    """Return the number of lines in the first bytes of a file."""
    with open_file(path) as stream:
        blocks = (stream.read(min(COUNT_BYTES, end - at)) for at in range(0, end, COUNT_BYTES))
        return sum(block.count(b"\n") for block in blocks)


def _begin(stream: BufferedIOBase, place: int) -> int:
    """Seek to the first line that begins at or after an offset and return its offset."""
    if place == 0:
        return 0
    stream.seek(place - 1)  # the line break before `place`, if a line begins there
    return place - 1 + len(stream.readline())


def _lines(stream: Iterable[bytes], start: int, end: int | None) -> Iterator[bytes]:
    """Return the lines that begin before the offset `end`."""
    for line in stream:
        if end is not None and start >= end:
            return
        start += len(line)
        yield line
