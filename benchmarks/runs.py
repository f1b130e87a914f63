"""One run of one system in its own process: the job it gets and the figures it reports.

A run is a list of steps. For each step a system reports its duration, the number of prompt tokens
computed and the number of useful new tokens chosen; all rates follow from these by the same rules
for all systems. A step that computes prompt tokens belongs to the prompt phase, any other to the
decode phase.
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

from beam_gemma.monitoring.progress import Count
from beam_gemma.monitoring.startup_log import process_age
from benchmarks.rate import Operations
from benchmarks.workload import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The work and settings that a system gets."""

    model: str
    """Exported model folder."""
    weights: str
    """Path of the same weights in the system's own format."""
    rows: list[Row]
    batch_size: int
    """Rows that run at once."""
    sort_by: str = "prompt_tokens"
    """Sort key of rows for a system without a scheduler: `prompt_tokens` or `max_tokens`."""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass."""

    seconds: float
    """Seconds since the previous step ended."""
    prompt_tokens: int
    new_tokens: int
    """Requested new tokens; excess tokens of a padded batch are not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The figures that a system reports."""

    batch_size: int
    token_ids: list[list[int]]
    """New tokens of each row."""
    steps: list[Step]
    startup_secs: float
    """Seconds from process start until the model is loaded and warm."""
    work_secs: float
    """Seconds from the end of startup to the last token."""
    tail_secs: float
    """Seconds from the last token until the results are written."""
    peak_bytes: int
    """Peak resident memory of the process in bytes, including loading."""
    backlog_occupancy: float | None = None
    """Share of the slots in use while rows wait; None if the system does not count it."""

    @property
    def rows_per_sec(self) -> float:
        """Rows per second from the first prompt to the last token."""
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
        """Mean share of the slots that compute useful tokens in decode steps."""
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
            # A new token uses the head in its own step and the layers in the next step.
            num_tokens = step.prompt_tokens or step.new_tokens
            work += num_tokens * operations.layers + step.new_tokens * operations.head
        return work / sum(step.seconds for step in steps)

    @property
    def _decode(self) -> list[Step]:
        return [step for step in self.steps if not step.prompt_tokens]


class Timeline:
    """Records incoming counts as timed steps."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.restart()

    def restart(self) -> None:
        """Delete all steps; the next step begins now."""
        self.steps.clear()
        self.started = self.ended = time.perf_counter()

    def add(self, count: Count) -> None:
        """Record a step's counts; counts without tokens, as for finished rows, are skipped."""
        if not (count.prompt_tokens or count.completion_tokens):
            return
        now = time.perf_counter()
        self.steps.append(Step(now - self.ended, count.prompt_tokens, count.completion_tokens))
        self.ended = now

    @property
    def work_secs(self) -> float:
        """Seconds from the start to the end of the last step."""
        return self.ended - self.started


def run_system(module: str, job: Job) -> Run:
    """Run a system in a new process.

    Raises:
        RuntimeError: the process failed; the message has the end of its output.
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
    """Return the run that `asdict` turned into these fields."""
    return Run(**fields | {"steps": [Step(**step) for step in fields["steps"]]})


def serve(system: Callable[[Job], Run]) -> None:
    """Run a system on the job from `run_system`, inside the new process."""
    asked, answered = map(Path, sys.argv[1:])
    fields = json.loads(asked.read_text())
    rows = [Row(**row) for row in fields["rows"]]
    run = system(Job(**fields | {"rows": rows}))
    answered.write_text(json.dumps(asdict(run)))


def timed_run(job: Job, complete: Callable[[list[Row]], tuple[list[list[int]], list[Step]]]) -> Run:
    """Complete a short row to warm up, then all rows of a job.

    Args:
        job: The job to run.
        complete: Function that returns the new tokens of each row, and the steps.
    """
    complete([Row(text="", prompt_token_ids=(2, 5, 6, 7), max_tokens=2)])
    startup_secs = process_age()
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


def last_words(process: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that a failed process wrote to standard error."""
    return (process.stderr.strip() or "no error").splitlines()[-1]


def peak_bytes() -> int:
    """Return the peak resident memory of this process plus that of its largest child, in bytes."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(kind).ru_maxrss * 1024 for kind in kinds)
