"""Put staged files in the place of an earlier output, so that no reader sees rows of both.

An earlier output is not deleted but set aside, into the work folder: its record first, then its
files. Only when all of it is aside do the staged files take their names. What is to be renamed is
written down before the first rename, so another worker can go on in the middle, and a later job can
undo all of it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from beam_gemma.errors import StorageError
from beam_gemma.storage import (
    is_file,
    literal_pattern,
    match_files,
    move,
    read_file,
    remove,
    write_once,
)

PLANS, ASIDE = "publish", "replaced"
"""Subfolders of the work folder: what each job renames, and the files that it replaces."""
MOVED_AT_ONCE = 100
"""Objects that are copied and then deleted by one call."""
Pair = tuple[str, str]
Check = Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """The files that one job renames."""

    old: tuple[Pair, ...]
    """Files of the earlier output, each with its place aside; the record of its run is first."""
    new: tuple[Pair, ...]
    """Staged files, each with its name in the output."""

    @classmethod
    def of_job(
        cls,
        work: str,
        job: str,
        *,
        earlier: Callable[[], Sequence[str]],
        new: Sequence[Pair],
        check: Check,
    ) -> "Exchange":
        """Return the exchange that a job has written down, or write down a new one.

        Args:
            work: The work folder.
            job: The id of the job.
            earlier: Returns the files to replace, the record of their run first.
            new: Staged files, each with its name in the output.
            check: Called before each rename; raises an error to stop.

        Raises:
            StorageError: a staged file is missing.
        """
        path = f"{work}/{PLANS}/{job}.json"
        if (written := cls.read(path)) is not None:
            if written.new == tuple(new):
                return written
            # A runner that begins a job anew stages other files.
            written.undo(check)
            remove([path])
        for staged, _ in new:
            if not is_file(staged):
                raise StorageError(
                    f"{staged}: expected a staged shard to publish, got none; go on with --resume"
                )
        aside = f"{work}/{ASIDE}/{job}"
        old = tuple((name, f"{aside}/{name.rpartition('/')[2]}") for name in earlier())
        exchange = cls(old=old, new=tuple(new))
        write_once(path, json.dumps({"old": exchange.old, "new": exchange.new}).encode())
        return exchange

    @classmethod
    def read(cls, path: str) -> "Exchange | None":
        """Return the exchange in a file, or None if there is no such file."""
        content = read_file(path)
        if content is None:
            return None
        told = {key: tuple(map(tuple, pairs)) for key, pairs in json.loads(content).items()}
        return cls(**told)

    def run(self, check: Check) -> None:
        """Rename all files; an exchange that broke off goes on.

        Args:
            check: Called before each rename; raises an error to stop.

        Raises:
            StorageError: a staged file is missing and has not been renamed by this exchange.
        """
        self._set_aside(check)
        # Nothing has a name of the output now, unless this exchange has given it.
        left = [(staged, name) for staged, name in self.new if is_file(staged)]
        names = {name for _, name in left}
        for staged, name in self.new:
            if name not in names and not is_file(name):
                raise StorageError(
                    f"{name}: expected the staged shard {staged} to become it, got none; go on "
                    "with --resume"
                )
        _move(left, check)

    def undo(self, check: Check) -> None:
        """Bring back the files of the earlier output, its record last.

        Args:
            check: Called before each rename; raises an error to stop.
        """
        if all(is_file(aside) for _, aside in self.old):
            _move([(name, staged) for staged, name in self.new if is_file(name)], check)
        back = [(aside, name) for name, aside in reversed(self.old) if is_file(aside)]
        _move(back[:-1], check)
        _move(back[-1:], check)

    def _set_aside(self, check: Check) -> None:
        there = [(name, aside) for name, aside in self.old if is_file(name)]
        copied = {name for name, aside in there if is_file(aside)}
        left = [(name, aside) for name, aside in there if name not in copied]
        _move(left[:1], check)
        _move(left[1:], check)
        # An object store copies and then deletes: here a call ended in between.
        renamed = {name for staged, name in self.new if not is_file(staged)}
        remove(sorted(copied - renamed))


def _move(pairs: Sequence[Pair], check: Check) -> None:
    """Rename files, one by one where a rename takes no time, else many at once."""
    size = 1 if all("://" not in path for path, _ in pairs) else MOVED_AT_ONCE
    for first in range(0, len(pairs), size):
        check()
        move(pairs[first : first + size])


def undo_all(work: str, finished_by: str | None, check: Check) -> None:
    """Undo what jobs that did not finish have renamed.

    Args:
        work: The work folder of an output.
        finished_by: The job whose record lies beside the output, if there is one.
        check: Called before each rename; raises an error to stop.
    """
    for path in match_files(f"{literal_pattern(work)}/{PLANS}/*.json"):
        exchange = Exchange.read(path)
        if exchange is not None and path != f"{work}/{PLANS}/{finished_by}.json":
            exchange.undo(check)
        remove([path])
