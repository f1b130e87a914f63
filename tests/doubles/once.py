"""What takes long to make is made once, by one of the processes that test, and kept in build/."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

BUILD = Path(__file__).parents[2] / "build"


def alone(name: str) -> FileLock:
    """Return a lock that one process holds at a time."""
    BUILD.mkdir(exist_ok=True)
    return FileLock(BUILD / f"{name}.lock")


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder by its name; others wait while it is made.

    Args:
        name: Of the folder; it says all that the content depends on.
        make: Fills a folder that is not there, and gets its name once it is whole.
    """
    folder = BUILD / name
    with alone(name):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(folder)
    return folder
