"""Which process of a machine runs a shared engine, so that no second one starts in silence."""

import atexit
import logging
import os
import tempfile
from pathlib import Path


def claim(key: str) -> None:
    """Note that this process runs the engine of a key; warn if its last owner has died.

    Beam lets one process of a machine load at a time.
    """
    note = Path(tempfile.gettempdir()) / f"beam-gemma-{key}.pid"
    former = note.read_text() if note.exists() else ""
    if former and not _is_alive(int(former)):
        logging.getLogger(__name__).warning(
            "engine: process %s, which ran it for this machine, has died; process %d loads the "
            "model anew",
            former,
            os.getpid(),
        )
    note.write_text(str(os.getpid()))
    # A process that ends in peace takes its note along.
    atexit.register(note.unlink, missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user, so there is one
        return True
    return True
