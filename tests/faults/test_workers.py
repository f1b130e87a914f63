"""Worker processes that are killed amid a bundle: the job ends at once, and goes on."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from beam_gemma.inference.saved_results import MIN_ROWS
from tests.doubles.job_server import WORKER, job_server
from tests.doubles.workers_path import WORKERS_PATH
from tests.faults import HOLDER, NUM_HELD
from tests.faults.conftest import (
    LENGTH,
    NUM_REQUESTS,
    ROOT,
    Faulty,
    assert_whole,
    resumed,
)

SECS = 60
"""That a job may take to notice."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[str]]]:
    """A job server, and the flags that lead to it."""
    with job_server(tmp_path) as (process, flags):
        worker = f"PYTHONPATH={WORKERS_PATH} {sys.executable} -m {WORKER}"
        yield process, [*flags, f"--environment_config={worker}"]


def start(job: Faulty, flags: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the job; its workers wait once some rows are durable."""
    plugin = "--beam_plugins=tests.faults.held"
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.generate", *job.flags(plugin, *flags)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": WORKERS_PATH},
            stdout=stream,
            stderr=stream,
        )


def workers(parent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the worker processes."""
    family = psutil.Process(parent.pid).children(recursive=True)
    return [child for child in family if child.name() != "sh" and WORKER in child.cmdline()]


def lose_a_worker(job: Faulty, flags: list[str], server=None, *, has_engine: bool = True) -> None:
    """Run the job until some rows are durable, kill one of its workers, and see it fail."""
    log = job.folder / "job.log"
    process = start(job, flags, log)
    family = []
    try:
        while not (holders := list(job.work.rglob(HOLDER))):
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        family = workers(server or process)
        engine = int(holders[0].read_text())
        next(child for child in family if (child.pid == engine) == has_engine).kill()
        holders[0].unlink()
        assert process.wait(SECS) != 0
    finally:
        for left in (process, *family):
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()
    assert "error" in log.read_text().lower()
    assert job.outcome() == {}


def assert_goes_on(job: Faulty, undisturbed: Faulty, run) -> None:
    kept = job.durable()
    assert kept >= NUM_HELD * MIN_ROWS
    assert resumed(job, run) == (NUM_REQUESTS - kept) * LENGTH
    assert_whole(job, undisturbed)


@pytest.mark.parametrize("has_engine", [True, False], ids=["with the engine", "without"])
def test_a_worker_of_several_is_killed(
    job: Faulty, undisturbed: Faulty, run, has_engine: bool
) -> None:
    flags = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    lose_a_worker(job, flags, has_engine=has_engine)
    assert_goes_on(job, undisturbed, run)


def test_a_worker_of_a_job_server_is_killed(job: Faulty, undisturbed: Faulty, run, server) -> None:
    process, flags = server
    lose_a_worker(job, flags, process)
    assert_goes_on(job, undisturbed, run)
