"""Tables in files of JSON lines: all lines are looked at once at launch, for the types.

For a dry run the first are enough, so types that show further down are not known to it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from beam_gemma import jsonl
from beam_gemma.batches import Located
from beam_gemma.source import BATCH_ROWS, SAMPLE_ROWS, Source, selected


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
            dry_run: Whether only to look at the first lines. Such a source may have more rows than
                it knows and reads.

        Raises:
            OptionsError: a line is not a JSON object, or the files do not make one table.
        """
        is_sample = dry_run and limit is None
        if is_sample:
            limit = SAMPLE_ROWS
        schema = pa.schema([])
        parts: list[Part] = []
        files: list[str] = []
        num_rows = 0
        for path in paths:
            if limit is not None and num_rows >= limit:
                break
            found, lines = _scan(path, num_rows, limit)
            schema = jsonl.unify_schemas(schema, found, path)
            num_rows += sum(part.num_rows for part in lines)
            files.append(path)
            parts += lines
        is_part = is_sample and num_rows == limit
        schema = pa.schema([field.with_type(_settled(field.type)) for field in schema])
        return cls(
            uri=uri,
            schema=selected(schema, columns, uri),
            file_schema=schema,
            files=tuple(files),
            lines=tuple(parts),
            num_rows=None if is_part else num_rows,
            num_bytes=_size(paths) if is_part else sum(part.num_bytes for part in parts),
        )

    def parts(self) -> list[Part]:
        """Return chunks of lines."""
        return list(self.lines)

    def read(self, part: Part) -> Iterator[Located]:
        """Return the rows of a chunk."""
        position = part.first_row
        with FileSystems.open(part.path) as stream:
            stream.seek(part.start)
            lines = itertools.islice(jsonl.content_lines(stream), part.num_rows)
            while chunk := list(itertools.islice(lines, BATCH_ROWS)):
                yield position, jsonl.parse_lines(chunk, self.file_schema).select(self.schema.names)
                position += len(chunk)

    def head(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return the first rows; no line after them is read."""
        for part in self.lines:
            rows = min(part.num_rows, num_rows - part.first_row)
            if rows <= 0:
                return
            yield from (batch for _, batch in self.read(replace(part, num_rows=rows)))


def _size(paths: Sequence[str]) -> int:
    return sum(
        file.size_in_bytes
        for found in FileSystems.match(list(paths))
        for file in found.metadata_list
    )


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


def _scan(path: str, first_row: int, limit: int | None) -> tuple[pa.Schema, list[Part]]:
    """Return the types of a file's columns and its lines in chunks."""
    schema = pa.schema([])
    parts = []
    start = 0
    with FileSystems.open(path) as stream:
        left = None if limit is None else limit - first_row
        for chunk in jsonl.chunks(stream, path, limit=left):
            schema = jsonl.unify_schemas(schema, chunk.schema, path)
            parts.append(
                Part(
                    path=path,
                    start=start,
                    num_bytes=chunk.num_bytes,
                    first_row=first_row,
                    num_rows=chunk.num_rows,
                )
            )
            start += chunk.num_bytes
            first_row += chunk.num_rows
    return schema, parts
