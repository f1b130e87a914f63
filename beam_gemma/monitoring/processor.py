"""Names of this machine's processors."""

import functools
import os
import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def processor_of(device: str) -> str:
    """Return the name of this machine's GPU, or of its CPU with the number of cores."""
    if device == "cuda":
        files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        return next((name for file in files if (name := _entry(file, "Model"))), "CUDA device")
    return f"{cpu_name() or platform.machine()}, {os.cpu_count()} cores"


def cpu_name() -> str | None:
    """Return the name of this machine's CPU; None if the system does not tell it."""
    return _entry(CPU_INFO, "model name")


def _entry(file: Path, key: str) -> str | None:
    """Return the value of the first line `key : value` of a file."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)
