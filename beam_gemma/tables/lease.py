"""The lease of an output: of all jobs that write it, one may publish.

A lease is a numbered file in `lease/` of the work folder, and names the job that holds it. It is
created exclusively and never changed. The highest number is in force, so a job takes the place of
another by creating the next one: of two jobs that try at once, one is first. A job whose place was
taken finds out when it publishes.
"""

import json
import logging
import os
import platform
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path

from beam_gemma.errors import StorageError
from beam_gemma.storage import create_once, literal_pattern, match_files, read_file, remove

FOLDER = "lease"
_LOG = logging.getLogger(__name__)


class Standing(IntEnum):
    """Whether the job that holds a lease still runs, as far as another process can see."""

    ENDED = 0
    """The job ran in a process of this machine that has ended, or earlier in this process."""
    UNSEEN = 1
    """The job runs, or ran, on another machine or on a service such as Dataflow."""
    RUNNING = 2
    """The process of this machine that the job runs in is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A lease: the job that holds it, and where that job was launched."""

    job: str
    """Random id of the job."""
    host: str
    """Name of the machine that launched the job."""
    machine: str
    """Id of the machine's boot and of its process numbers; empty if the system does not tell."""
    pid: int
    process: str
    """When the process began, in ticks since the boot: process numbers are used again."""
    started: str
    """When the job was launched, in ISO 8601."""
    is_remote: bool
    """Whether the job outlives the process that launched it."""

    @classmethod
    def of_this_process(cls, job: str, *, is_remote: bool) -> "Lease":
        """Return the lease of a job that this process launches."""
        return cls(
            job=job,
            host=platform.node(),
            machine=_machine(),
            pid=os.getpid(),
            process=_process(os.getpid()) or "",
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            is_remote=is_remote,
        )

    @property
    def standing(self) -> Standing:
        """Whether the job still runs, as far as this process can see."""
        if self.is_remote or not self.machine or self.machine != _machine():
            return Standing.UNSEEN
        # One process runs its jobs one after the other.
        is_own = self.pid == os.getpid()
        is_there = self.process == _process(self.pid)
        return Standing.RUNNING if is_there and not is_own else Standing.ENDED

    def __str__(self) -> str:
        if self.is_remote:
            return f"a job that {self.host} submitted at {self.started}"
        return f"a job of process {self.pid} on {self.host}, started at {self.started}"


def new_job() -> str:
    """Return a random id for a job."""
    return uuid.uuid4().hex


def take(work: str, lease: Lease, *, up_to: Standing) -> Lease | None:
    """Take the lease of a work folder, unless another job is in the way; return that job's.

    Args:
        work: The work folder.
        lease: The lease to take.
        up_to: Up to which standing the place of another job may be taken.
    """
    while True:
        number, other = _newest(work)
        if other is not None and other.job == lease.job:
            return None
        if other is not None and other.standing > up_to:
            return other
        if create_once(_path(work, number + 1), json.dumps(asdict(lease)).encode()):
            if other is not None and other.standing > Standing.ENDED:
                _LOG.warning("%s: taken from %s, which can no longer publish", work, other)
            return None


def release(work: str, job: str) -> bool:
    """Give back the lease of a work folder, if a job holds it; return whether none is left."""
    number, holder = _newest(work)
    if holder is None or holder.job != job:
        return False
    remove([_path(work, number)])
    return _newest(work) == (0, None)


def is_held(work: str, job: str) -> bool:
    """Return whether a job holds the lease of a work folder."""
    _, holder = _newest(work)
    return holder is not None and holder.job == job


def check_held(work: str, job: str) -> None:
    """Check that a job still holds the lease of a work folder.

    Raises:
        StorageError: another job has taken the lease, or it has been deleted.
    """
    _, holder = _newest(work)
    if holder is None or holder.job != job:
        raise StorageError(
            f"{work}: expected the lease of this job, got {holder or 'none'}; nothing more is "
            "published, because another job has taken the place of this one"
        )


def _newest(work: str) -> tuple[int, Lease | None]:
    """Return the number and the content of the lease in force; 0 and None if there is none."""
    numbers = [Path(path).stem for path in match_files(f"{literal_pattern(work)}/{FOLDER}/*.json")]
    number = max(map(int, filter(str.isdecimal, numbers)), default=0)
    content = read_file(_path(work, number)) if number else None
    return number, None if content is None else _parse(work, content)


def _parse(work: str, content: bytes) -> Lease:
    try:
        told = json.loads(content)
        return Lease(**{field.name: told[field.name] for field in fields(Lease)})
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{work}/{FOLDER}: expected the lease of a job, got a file of another form; delete "
            "this folder if no job writes the output"
        ) from error


def _path(work: str, number: int) -> str:
    return f"{work}/{FOLDER}/{number:06}.json"


def _machine() -> str:
    """Return an id that two processes share if they can see each other's process numbers."""
    boot = _told(Path("/proc/sys/kernel/random/boot_id").read_text)
    numbers = _told(lambda: str(Path("/proc/self/ns/pid").readlink()))
    return f"{boot.strip()} {numbers}" if boot and numbers else ""


def _process(pid: int) -> str | None:
    """Return when a process of this machine began, or None if it is not running."""
    # The command comes first, in parentheses, and may hold any character.
    told = _told(Path(f"/proc/{pid}/stat").read_text).rpartition(")")[2].split()
    return None if not told or told[0] in "ZX" else told[19]


def _told(read: Callable[[], str]) -> str:
    """Return what the system tells, or an empty text if it does not."""
    try:
        return read()
    except OSError:
        return ""
