"""Interface of output tables: shards are staged, then published together when all are done."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import pyarrow as pa

from beam_gemma.storage import delete_folder, has_files, make_private
from beam_gemma.tables import lease
from beam_gemma.tables.lease import Lease, Standing

Format = Literal["parquet", "jsonl"]
FORMATS: tuple[Format, ...] = ("parquet", "jsonl")
STAGED, PIECES = "staged", "pieces"
"""Subfolders of the work folder: shards of one job, and results that later jobs use."""


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

    @abstractmethod
    def record(self) -> Mapping[str, Any] | None:
        """Return the record of the run that wrote the output; None if it has none."""

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
            record: The record of the run, with its `job`, which holds the lease.

        Raises:
            StorageError: the job does not hold the lease; nothing is published.
        """

    @property
    def trial_path(self) -> str:
        """Path that is written on trial before a job starts."""
        return f"{self.work}/trial"

    def hold(self, claim: Lease, *, up_to: Standing) -> Lease | None:
        """Take the lease for a job; return that of a job in the way, if there is one.

        What an earlier job has staged is deleted, so that it can publish nothing if it goes on. If
        it broke off while it replaced an output, that output is put back.

        Args:
            claim: The lease to take.
            up_to: Up to which standing the place of another job may be taken.
        """
        make_private(self.work)
        other = lease.take(self.work, claim, up_to=up_to)
        if other is None:
            self.restore(claim.job)
            delete_folder(f"{self.work}/{STAGED}")
        return other

    def check_held(self, job: str) -> None:
        """Check that a job holds the lease.

        Raises:
            StorageError: another job has taken it, or it has been deleted.
        """
        lease.check_held(self.work, job)

    def release(self, job: str) -> None:
        """Give back the lease, if a job holds it."""
        if lease.release(self.work, job) and not self.is_unfinished():
            delete_folder(self.work)

    def restore(self, job: str) -> None:  # noqa: B027
        """Bring back an output that an earlier job broke off in replacing.

        Args:
            job: The job that holds the lease.
        """

    def begin_anew(self) -> None:
        """Delete the saved results of an earlier job."""
        delete_folder(f"{self.work}/{PIECES}")

    def is_unfinished(self) -> bool:
        """Return whether an earlier job left work that can be resumed."""
        return has_files(self.work, besides=lease.FOLDER)

    def clear(self) -> None:
        """Delete the folder of unfinished work, with the lease."""
        delete_folder(self.work)
