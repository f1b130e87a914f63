"""Interface of output tables: shards are staged, then published together when all are done."""

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
    """File format of staged shards."""
    work: str
    """Folder of unfinished work: staged shards and saved pieces of results."""
    can_append: ClassVar[bool] = False

    @abstractmethod
    def earlier(self) -> list[str]:
        """Return the names of an earlier output, complete or not."""

    def check(self, schema: pa.Schema) -> None:  # noqa: B027
        """Reject a schema that cannot be written, before a job starts.

        Raises:
            OptionsError: a column has a type that cannot be written.
        """

    @abstractmethod
    def publish(self, staged: Sequence[str], record: Mapping[str, Any]) -> None:
        """Make the staged shards the output, replacing an earlier one.

        Beam may call this again with the same shards. After a kill midway, it is called with new
        shards.

        Args:
            staged: The paths of the staged shards, in order.
            record: The record of the run.
        """

    def is_unfinished(self) -> bool:
        """Return whether an earlier job left work that can be resumed."""
        return _is_there(self.work)

    def clear(self) -> None:
        """Delete the folder of unfinished work."""
        delete_folder(self.work)
