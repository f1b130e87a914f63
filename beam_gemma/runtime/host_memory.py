"""Memory of the host that this process may use: the machine's, or less under a limit.

A container's limit is one of its control group, which the machine's own figures do not show; a
process that passes it is killed. A limit of `ulimit -v` is on addresses, so that nothing more can
be allocated beyond it.
"""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path("/")


class HostMemory(NamedTuple):
    """Memory in bytes."""

    available: int
    """What can be allocated now: free memory, and file pages that need not be kept."""
    total: int


class _Files(NamedTuple):
    """The files in which a version of control groups has the limit and the use of a group."""

    controller: str
    """The line of /proc/self/cgroup that names the process's group; v2 has no name."""
    mount: str
    limit: str
    usage: str
    reclaimable: str
    """Key in memory.stat of file pages that a group gives back first."""


VERSIONS = (
    _Files("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    _Files("", "sys/fs/cgroup/unified", "memory.max", "memory.current", "inactive_file"),
    _Files(
        "memory",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def host_memory(root: Path = ROOT) -> HostMemory:
    """Return the memory of the machine or of the tightest limit, whichever is less.

    Args:
        root: The folder that holds `proc` and `sys`.
    """
    machine = psutil.virtual_memory()
    rooms = [HostMemory(machine.available, machine.total), *_groups(root), *_addresses()]
    return HostMemory(min(room.available for room in rooms), min(room.total for room in rooms))


def _addresses() -> Iterator[HostMemory]:
    """Yield the memory that a limit of this process's addresses leaves, if it has one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield HostMemory(max(limit - psutil.Process().memory_info().vms, 0), limit)


def _groups(root: Path) -> Iterator[HostMemory]:
    """Yield the memory of each group with a limit that this process is in."""
    for files in VERSIONS:
        for group in _folders(root, files):
            try:
                limit = int((group / files.limit).read_text())
                usage = int((group / files.usage).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").open())
            except (OSError, ValueError):
                # Not every folder has a limit: the root of v2 lacks the file, and "max" is none.
                continue
            reclaimable = int(stat.get(files.reclaimable, 0))
            yield HostMemory(max(limit - usage + reclaimable, 0), limit)


def _folders(root: Path, files: _Files) -> Iterator[Path]:
    """Yield the folder of this process's group and of all groups around it.

    A container that sees only its own groups may have their root mounted in place of the path that
    the process is told, so folders that are missing are left out by the reader.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if files.controller in controllers.split(","):
            mount = root / files.mount
            group = mount / path.lstrip("/")
            yield group
            if group != mount:
                yield from [p for p in group.parents if p == mount or mount in p.parents]
