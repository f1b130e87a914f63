"""Importing this holds a worker's job amid its pieces, with `--beam_plugins=tests.faults.held`.

The worker that writes the third piece says who it is, and waits to be killed or let go.
"""

import os
import time
from pathlib import Path

from beam_gemma.inference import saved_results
from tests.faults import HOLDER, NUM_HELD

_write = saved_results.write_once
_written: list[str] = []


def _held(path: str, content: bytes) -> None:
    holder = Path(path).with_name(HOLDER)
    if len(_written) == NUM_HELD:
        partial = holder.with_suffix(".partial")
        partial.write_text(str(os.getpid()))
        partial.rename(holder)
        while holder.exists():
            time.sleep(0.01)
    _write(path, content)
    _written.append(path)


saved_results.MAX_ROWS = saved_results.MIN_ROWS
saved_results.write_once = _held
