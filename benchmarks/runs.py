"""One run of one system, in a process of its own: what it is asked, and what it reports.

A run is a list of steps. Each system says of each of its steps how long it took, how many prompt
tokens it computed and how many useful new tokens it chose; every figure follows from these alone,
by the same rule for all. A step that computes prompt tokens belongs to the prompt phase, any other
to the decode phase.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from beam_gemma.monitoring.progress import Count
from benchmarks.rate import Operations
from benchmarks.workload import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a system is asked."""

    model: str
    """The exported folder."""
    weights: str
    """The same weights in the form that the system reads."""
    rows: list[Row]
    batch_size: int
    """Rows that run at once."""
    sort_by: str = "prompt_tokens"
    """What a system without a scheduler sorts rows by: `prompt_tokens` or `max_tokens`."""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass."""

    seconds: float
    """Since the step before ended."""
    prompt_tokens: int
    new_tokens: int
    """Those that a row asked for; what a padded batch computes beyond them is not work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a system reports."""

    batch_size: int
    token_ids: list[list[int]]
    """New tokens of each row."""
    steps: list[Step]
    startup_secs: float
    """From the start of the process until the model is loaded and warm."""
    work_secs: float
    """From then until the last token."""
    tail_secs: float
    """From then until the results are where they belong."""
    peak_bytes: int
    """Largest resident memory of the process, loading included."""
    backlog_occupancy: float | None = None
    """Share of the slots in use while rows wait, where the system keeps that count."""

    @property
    def rows_per_sec(self) -> float:
        """Rows completed in the time from the first prompt to the last token."""
        return len(self.token_ids) / self.work_secs

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second of the prompt phase."""
        steps = [step for step in self.steps if step.prompt_tokens]
        return sum(step.prompt_tokens for step in steps) / sum(step.seconds for step in steps)

    @property
    def decode_rate(self) -> float:
        """New tokens per second of the decode phase."""
        return sum(s.new_tokens for s in self._decode) / sum(s.seconds for s in self._decode)

    @property
    def occupancy(self) -> float:
        """Mean share of the slots that a decode step used for useful tokens."""
        used = sum(step.new_tokens for step in self._decode)
        return used / (len(self._decode) * self.batch_size)

    def decode_operations_per_sec(self, operations: Operations) -> float:
        """Return the useful matrix operations per second of the decode phase."""
        return self.decode_rate * (operations.layers + operations.head)

    def operations_per_sec(self, operations: Operations, *, skip: int = 0) -> float:
        """Return the useful matrix operations per second of all steps but the first `skip`."""
        steps = self.steps[skip:]
        work = 0
        for step in steps:
            # A new token leaves the head in its step and passes the layers in the next.
            num_tokens = step.prompt_tokens or step.new_tokens
            work += num_tokens * operations.layers + step.new_tokens * operations.head
        return work / sum(step.seconds for step in steps)

    @property
    def _decode(self) -> list[Step]:
        return [step for step in self.steps if not step.prompt_tokens]


class Timeline:
    """Turns counts into steps as they come in."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.restart()

    def restart(self) -> None:
        """Forget what was counted; the next step begins now."""
        self.steps.clear()
        self.started = self.ended = time.perf_counter()

    def add(self, count: Count) -> None:
        """Take what a step has computed; counts of finished rows are no steps."""
        if not (count.prompt_tokens or count.completion_tokens):
            return
        now = time.perf_counter()
        self.steps.append(Step(now - self.ended, count.prompt_tokens, count.completion_tokens))
        self.ended = now

    @property
    def work_secs(self) -> float:
        """From the start to the end of the last step."""
        return self.ended - self.started


def run_system(module: str, job: Job) -> Run:
    """Run a system in a new process.

    Raises:
        RuntimeError: it broke; its last words are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "job.json"), Path(folder, "run.json")
        asked.write_text(json.dumps(asdict(job)))
        command = [sys.executable, "-m", module, asked, answered]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not answered.exists():
            raise RuntimeError(f"{module}: {(done.stdout + done.stderr)[-2000:]}")
        return run_from_json(json.loads(answered.read_text()))


def run_from_json(fields: dict) -> Run:
    """Return a run that `asdict` took apart."""
    return Run(**fields | {"steps": [Step(**step) for step in fields["steps"]]})


def serve(system: Callable[[Job], Run]) -> None:
    """Answer `run_system`, inside the new process."""
    asked, answered = map(Path, sys.argv[1:])
    fields = json.loads(asked.read_text())
    rows = [Row(**row) for row in fields["rows"]]
    run = system(Job(**fields | {"rows": rows}))
    answered.write_text(json.dumps(asdict(run)))


def timed_run(job: Job, complete: Callable[[list[Row]], tuple[list[list[int]], list[Step]]]) -> Run:
    """Complete a short row to warm up, then all rows of a job.

    Args:
        job: What is asked.
        complete: Returns the new tokens of each row, and the steps that they took.
    """
    complete([Row(text="", prompt_token_ids=(2, 5, 6, 7), max_tokens=2)])
    startup_secs = secs_since_process_start()
    start = time.perf_counter()
    token_ids, steps = complete(job.rows)
    return Run(
        batch_size=job.batch_size,
        token_ids=token_ids,
        steps=steps,
        startup_secs=startup_secs,
        work_secs=time.perf_counter() - start,
        tail_secs=0.0,
        peak_bytes=peak_bytes(),
    )


def secs_since_process_start() -> float:
    """Return the age of this process, the interpreter's own start included."""
    return time.time() - psutil.Process().create_time()


def peak_bytes() -> int:
    """Return the largest resident memory of this process, with that of its largest child."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(kind).ru_maxrss * 1024 for kind in kinds)
