"""What takes long to make is made once, by one of the processes that test, and kept in build/."""

import functools
import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"
MAKING = Counter[str]()
"""CPU seconds that this process has spent on each folder that it made."""
MAKERS = (
    "cuda_models",
    "cuda_newer_models",
    "cuda_sources",
    "cuda_vision",
    "embedding_gemma2_models",
    "encoder_decoder_models",
    "gemma3n_models",
    "gemma3n_seeing",
    "gemma4_hearing",
    "gemma4_models",
    "gemma4_seeing",
    "mobilenet",
    "real_model",
    "recurrent_models",
    "reference",
    "sentence_model",
    "thinking",
    "tiny_tokenizer",
    "tool_models",
    "vision_models",
)
"""The modules beside this one that make checkpoints or trace graphs."""


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
            before = time.process_time() - MAKING.total()  # what is made within is counted there
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(folder)
            MAKING[name] += time.process_time() - MAKING.total() - before
    return folder


@functools.cache
def exporter_digest() -> str:
    """Return a digest of all that decides what an export of a test's model holds."""
    return _digest(_exporter() + [Path(__file__).with_name(f"{name}.py") for name in MAKERS])


@functools.cache
def source_digest() -> str:
    """Return a digest of all that decides what a traced graph holds, but for its settings."""
    return _digest(_exporter())


def _exporter() -> list[Path]:
    """Return the files of the exporter and of the wing that it imports."""
    folders = (ROOT / "export", ROOT / "beam_gemma/model")
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def _digest(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
