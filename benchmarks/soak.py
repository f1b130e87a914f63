"""Runs a long job in each runner mode, and watches what its processes hold.

    python -m benchmarks.soak --rows 100000

A table of short rows, all different, goes through `python -m pipelines.generate` with a tiny model,
once for each mode of Beam's local runner. While the engine computes, the job's processes are
sampled together: resident memory, open descriptors and threads. The table has the median of the
first, the middle and the last fifth of the samples. A mode is flat if memory grows by at most a
tenth from the first to the last fifth, and descriptors and threads by at most 8. Exit code 1: a
mode is not flat, or its job failed.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from beam_gemma.tables.file_sink import open_sink
from benchmarks.overhead import write_rows
from benchmarks.table import table
from export.__main__ import export
from tests.doubles.reference import save_checkpoint, tiny_model

MODES = {
    "in_memory": [],
    "multi_threading": ["--direct_running_mode=multi_threading", "--direct_num_workers=2"],
    "multi_processing": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
}
HEADER = ("mode", "rows", "s", "of", "first fifth", "middle", "last fifth", "most", "verdict")
TICK_SECS = 0.5
MORE_MEMORY = 1.1
"""Most that memory may grow, as a factor."""
MORE_HANDLES = 8
"""Most that the number of descriptors or threads may grow."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory, descriptors and threads of all processes of a job at one time."""

    memory: int
    """Resident memory in MiB; pages that processes share are counted for each."""
    descriptors: int
    threads: int
    is_computing: bool
    """Whether the engine has finished rows, and no shard is written yet."""


def sample(process: psutil.Process, work: Path) -> Sample:
    """Return what a process and all that descend from it hold."""
    totals = [0, 0, 0]
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.Error), each.oneshot():
            totals[0] += each.memory_info().rss // MIB
            totals[1] += each.num_fds()
            totals[2] += each.num_threads()
    has_pieces = next(work.glob("pieces/*/*.arrow"), None) is not None
    is_staging = next(work.glob("staged/*"), None) is not None
    return Sample(*totals, is_computing=has_pieces and not is_staging)


def watch(command: Sequence[str], work: Path) -> tuple[int, list[Sample]]:
    """Run a command; return its exit code and samples of it."""
    samples = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.Error):
                samples.append(sample(seen, work))
            time.sleep(TICK_SECS)
    return process.returncode, samples


def fifths(values: Sequence[int]) -> tuple[int, int, int]:
    """Return the medians of the first, the middle and the last fifth of some numbers."""
    size = max(1, len(values) // 5)
    middle = (len(values) - size) // 2
    parts = (values[:size], values[middle : middle + size], values[-size:])
    first, mid, last = (round(statistics.median(part)) for part in parts)
    return first, mid, last


def is_flat(what: str, first: int, last: int) -> bool:
    """Return whether an amount has not grown from the first to the last fifth."""
    return last <= first * MORE_MEMORY if what == "memory" else last <= first + MORE_HANDLES


def lines(mode: str, rows: int, secs: float, samples: Sequence[Sample]) -> list[list[str]]:
    """Return the lines of the table for a mode."""
    computing = [each for each in samples if each.is_computing]
    if len(computing) < len(("first", "middle", "last")):
        raise SystemExit(f"{mode}: expected a job of some seconds, got {secs:.1f} s; add --rows")
    found = []
    for what, unit in (("memory", "MiB"), ("descriptors", ""), ("threads", "")):
        first, middle, last = fifths([getattr(each, what) for each in computing])
        most = max(getattr(each, what) for each in samples)
        verdict = "flat" if is_flat(what, first, last) else "not flat"
        numbers = [f"{number:,}" for number in (first, middle, last, most)]
        found.append(
            [mode, f"{rows:,}", f"{secs:,.0f}", f"{what} {unit}".strip(), *numbers, verdict]
        )
    return found


def soak(mode: str, model: str, rows: int, folder: Path) -> list[list[str]]:
    """Run the job of a mode and return its lines of the table."""
    write_rows(folder / "in.parquet", rows)
    output = folder / mode / "x.parquet"
    command = [
        sys.executable, "-m", "pipelines.generate", f"--model={model}",
        f"--input={folder}/in.parquet", f"--output={output}", "--prompt={id}", "--max_tokens=2",
        "--ignore_eos", *MODES[mode],
    ]  # fmt: skip
    started = time.monotonic()
    code, samples = watch(command, Path(open_sink(str(output)).work))
    if code:
        raise SystemExit(f"{mode}: the job ended with {code}")
    return lines(mode, rows, time.monotonic() - started, samples)


def tiny(folder: Path) -> str:
    """Export the tests' tiny Gemma 3 with random weights; return its folder."""
    export(save_checkpoint(tiny_model("gemma3_text"), folder / "checkpoint"), folder / "artifact")
    return str(folder / "artifact")


def main() -> int:
    """Run the modes and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="exported model folder, the tinier the better"
    )
    parser.add_argument("--rows", type=int, default=100_000, help="of the table")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    flags = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = flags.model or tiny(Path(folder) / "model")
        for mode in flags.modes:
            found += soak(mode, model, flags.rows, Path(folder))
            print(*found[-3:], sep="\n", file=sys.stderr)
    print(table(HEADER, found))
    return int(any(line[-1] != "flat" for line in found))


if __name__ == "__main__":
    sys.exit(main())
