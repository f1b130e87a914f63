"""What a table to read is: its schema, its size, and parts that workers read."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from beam_gemma.batches import Located
from beam_gemma.errors import OptionsError, nearest

BATCH_ROWS = 16_384
BATCH_BYTES = 8 << 20
"""Most rows, and about the most bytes, that move through a pipeline together."""
SAMPLE_ROWS = 1000
SAMPLE_PLACES = 10
"""So many rows, from so many places all over a table, are enough to look at it by."""


class Source(ABC):
    """A table to read.

    Each row has a position, which is the same whenever and wherever it is read.
    """

    uri: str
    schema: pa.Schema
    num_rows: int | None
    """Rows to read; None where nobody knows."""
    num_bytes: int
    """About how much data that is."""
    is_dense: bool
    """Whether positions are the numbers from 0 up to that of the rows."""
    files: tuple[str, ...] = ()
    """What is read, where that is files."""
    copies: str | None = None
    """Folder of what is copied to be read; it may go when all has been read."""

    @abstractmethod
    def parts(self) -> list[Any]:
        """Return what a job begins with, at its launch: few, and small enough to send along."""

    def split(self, part: Any) -> Iterator[Any]:
        """Return what workers read one by one, on a worker."""
        yield part

    @abstractmethod
    def read(self, part: Any) -> Iterator[Located]:
        """Return the rows of a part, on a worker, under the source's schema without metadata."""

    @abstractmethod
    def head(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return the first rows, at launch; no more is read than what holds them."""

    @abstractmethod
    def sample(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return rows from several places of the table, at launch; all where there are no more."""

    @property
    def expected_rows(self) -> int | None:
        """About how many rows there are; None where that cannot be told either."""
        return self.num_rows


def selected(schema: pa.Schema, columns: tuple[str, ...] | None, uri: str) -> pa.Schema:
    """Return the columns of a table that are asked for, in the order of the asking.

    Raises:
        OptionsError: there is no such column.
    """
    if columns is None:
        return schema
    for column in columns:
        if column not in schema.names:
            raise OptionsError(
                f"--columns: expected columns of {uri}, got {column!r}"
                f"{nearest(column, schema.names)}"
            )
    return pa.schema([schema.field(column) for column in columns], schema.metadata)
