"""What a table to write is: shards are staged beside it and appear together, when all are done."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import pyarrow as pa

from beam_gemma.storage import _is_there, delete_folder

Format = Literal["parquet", "jsonl"]
FORMATS: tuple[Format, ...] = ("parquet", "jsonl")


class Sink(ABC):
    """A table to write."""

    uri: str
    format: Format
    """Of staged shards."""
    work: str
    """Folder of what is not finished: staged shards and the pieces of results that are done."""
    can_append: ClassVar[bool] = False

    @abstractmethod
    def earlier(self) -> list[str]:
        """Return the names of an earlier output, in whole or in part."""

    def check(self, schema: pa.Schema) -> None:  # noqa: B027
        """Refuse a schema that cannot be written, before a job starts.

        Raises:
            OptionsError: a column has a type that cannot be written.
        """

    @abstractmethod
    def publish(self, staged: Sequence[str], record: Mapping[str, Any]) -> None:
        """Make staged shards the output, in place of an earlier one.

        Beam may call this again with the same shards. After a kill in the middle, it is called
        with new ones.

        Args:
            staged: Files of the shards, in order.
            record: Of the run.
        """

    def is_unfinished(self) -> bool:
        """Return whether an earlier job has left something to go on with."""
        return _is_there(self.work)

    def clear(self) -> None:
        """Remove what is not finished."""
        delete_folder(self.work)
