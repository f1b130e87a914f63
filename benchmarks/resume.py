"""Measures the cost of a kill: compares killed and resumed jobs with an uninterrupted one.

    python -m benchmarks.resume --model models/gemma-3-270m --rows 2000 --kills 10

Each kill has its own job, stopped with `kill -9` after a random share of the tokens, between 5 %
and 95 %; one more job is stopped as soon as the first shard is staged. Each job then continues with
`--resume`. Counts include all tokens that the engines computed, also those of rows lost in the
kill. Exit code 1: a job computed more than 1.05 times the tokens of one pass, or its output is not
byte-identical to that of one pass.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from beam_gemma.cli.run import exit_code
from beam_gemma.monitoring.progress import METER
from beam_gemma.tables.file_sink import open_sink
from benchmarks.table import table
from pipelines.generate import main as generate

HEADER = ("killed at", "durable then", "tokens until then", "tokens after", "of one pass", "same")
LIMIT = 1.05
TICK_SECS = 0.01
COMMIT = 1.0
"""Share that means a kill while shards are staged."""


@dataclass(frozen=True)
class Job:
    """A job in its own folder."""

    folder: Path
    flags: tuple[str, ...]

    @property
    def work(self) -> Path:
        """Folder of the job's unfinished work."""
        return Path(open_sink(f"{self.folder}/x.parquet").work)

    def run(self, *more: str, until: Callable[[int], bool] = lambda _: False) -> int:
        """Run the job, kill it once `until` holds, and return the number of computed tokens."""
        meter = self.folder / "meter"
        meter.write_text("0")
        command = [sys.executable, "-m", "benchmarks.resume", "--meter", str(meter), "--"]
        output = f"--output={self.folder}/x.parquet"
        with subprocess.Popen(
            [*command, *self.flags, output, *more], stdout=subprocess.DEVNULL
        ) as process:
            while process.poll() is None:
                if until(read_meter(meter)):
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(TICK_SECS)
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"the job ended with {process.returncode}")
        return read_meter(meter)

    def output(self) -> list[bytes]:
        """Return the files of the output, in order."""
        return [path.read_bytes() for path in sorted(self.folder.glob("x-*.parquet"))]

    def is_staging(self) -> bool:
        """Return whether a shard is being staged."""
        return any((self.work / "staged").glob("*"))

    def num_durable(self) -> int:
        """Return the number of durable rows."""
        return sum(
            pa.ipc.open_file(path).get_batch(0).num_rows for path in self.work.rglob("*.arrow")
        )


def read_meter(path: Path) -> int:
    """Return the number of computed tokens that a job last reported."""
    return int(path.read_text())


def metered(path: Path, flags: Sequence[str]) -> int:
    """Run the command line, and keep writing the number of computed tokens to a file."""

    def tell() -> None:
        new = path.with_suffix(".new")
        while True:
            new.write_text(str(METER.read().completion_tokens))
            new.replace(path)
            time.sleep(TICK_SECS)

    threading.Thread(target=tell, daemon=True).start()
    sys.argv = ["pipelines.generate", *flags]
    code = exit_code(generate)
    time.sleep(5 * TICK_SECS)
    return code


def killed(job: Job, share: float, once: int, whole: list[bytes]) -> tuple[str, ...]:
    """Kill a job at a share of its tokens and finish it; return a line of the table."""

    def is_time(tokens: int) -> bool:
        return job.is_staging() if share == COMMIT else tokens >= share * once

    before = job.run(until=is_time)
    durable = job.num_durable()
    after = job.run("--resume")
    place = "staging" if share == COMMIT else f"{share:.0%}"
    same = "yes" if job.output() == whole else "no"
    cost = (before + after) / once
    return place, f"{durable:,}", f"{before:,}", f"{after:,}", f"{cost:.3f}", same


def main() -> int:
    """Run the benchmark, or one job of it."""
    if sys.argv[1] == "--meter":
        return metered(Path(sys.argv[2]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--rows", type=int, default=2000, help="of the table")
    parser.add_argument("--kills", type=int, default=10, help="beside the one while it stages")
    parser.add_argument("--max_tokens", type=int, default=32, help="of a completion")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    flags = parser.parse_args()
    rng = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        rows = [" ".join(str(rng.randrange(1000)) for _ in range(8)) for _ in range(flags.rows)]
        pq.write_table(pa.table({"id": range(flags.rows), "text": rows}), f"{folder}/in.parquet")
        command = (
            f"--model={flags.model}", f"--input={folder}/in.parquet", "--prompt={text}",
            f"--max_tokens={flags.max_tokens}", "--ignore_eos", "--num_shards=4",
        )  # fmt: skip
        jobs = []
        for number in range(flags.kills + 2):
            path = Path(folder) / str(number)
            path.mkdir()
            jobs.append(Job(path, command))
        once, whole = jobs[0].run(), jobs[0].output()
        shares = [*sorted(rng.uniform(0.05, 0.95) for _ in range(flags.kills)), COMMIT]
        lines = []
        for job, share in zip(jobs[1:], shares, strict=True):
            lines.append(killed(job, share, once, whole))
            sys.stderr.write(json.dumps(lines[-1]) + "\n")
    sys.stdout.write(f"one pass: {once:,} tokens, {flags.rows:,} rows\n\n{table(HEADER, lines)}\n")
    return int(any(float(cost) > LIMIT or same == "no" for *_, cost, same in lines))


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    sys.exit(main())
