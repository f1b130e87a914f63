"""Files in memory before somebody maps them: read by many at once, as storage serves them fastest.

Whoever maps a file reads it page by page as it is used, which leaves most of a disk's speed unused.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NUM_THREADS = 8
PIECE_BYTES = 16 << 20


def read_ahead(paths: Iterable[Path]) -> None:
    """Read files into the system's cache, each page once; links to one file are one file."""
    files = {(info.st_dev, info.st_ino): path for path in paths for info in [path.stat()]}
    pieces = [
        (path, offset)
        for path in files.values()
        for offset in range(0, path.stat().st_size, PIECE_BYTES)
    ]
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="read-ahead") as pool:
        for _ in pool.map(_read, pieces):
            pass


def _read(piece: tuple[Path, int]) -> None:
    path, offset = piece
    file = os.open(path, os.O_RDONLY)
    try:
        os.pread(file, PIECE_BYTES, offset)
    finally:
        os.close(file)
