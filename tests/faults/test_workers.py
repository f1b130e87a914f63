"""Worker processes that are killed amid a bundle: the job ends at once, and goes on."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.doubles.job_server import WORKER, job_server, start
from tests.faults.conftest import LENGTH, NUM_ALIKE, NUM_OK, Faulty, assert_whole, resumed

SECS = 60
"""That a job may take to notice."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[str]]]:
    """A job server, and the flags that lead to it."""
    with job_server(tmp_path) as running:
        yield running


def workers(parent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the worker processes, the one with the engine first."""
    family = psutil.Process(parent.pid).children(recursive=True)
    found = [child for child in family if child.name() != "sh" and WORKER in child.cmdline()]
    return sorted(found, key=lambda child: child.cpu_times().user, reverse=True)


def lose_a_worker(job: Faulty, flags: list[str], place: int, server=None) -> None:
    """Run the job until some rows are durable, kill one of its workers, and see it fail."""
    log = job.folder / "job.log"
    process = start(["pipelines.generate", *job.flags(), *flags], log)
    family = []
    try:
        while process.poll() is None and job.durable() < 32:
            time.sleep(0.02)
        family = workers(server or process)
        family[place].kill()
        assert process.wait(SECS) != 0
    finally:
        for left in (process, *family):
            with suppress(psutil.NoSuchProcess):
                left.kill()
    assert "error" in log.read_text().lower()
    assert job.outcome() == {}


def assert_goes_on(job: Faulty, undisturbed: Faulty, run) -> None:
    kept = job.durable()
    assert kept >= 32
    assert resumed(job, run) == (NUM_OK - NUM_ALIKE - kept) * LENGTH
    assert_whole(job, undisturbed)


@pytest.mark.parametrize("place", [0, 1], ids=["with the engine", "without"])
def test_a_worker_of_several_is_killed(job: Faulty, undisturbed: Faulty, run, place: int) -> None:
    lose_a_worker(job, ["--direct_running_mode=multi_processing", "--direct_num_workers=2"], place)
    assert_goes_on(job, undisturbed, run)


def test_a_worker_of_a_job_server_is_killed(job: Faulty, undisturbed: Faulty, run, server) -> None:
    process, flags = server
    lose_a_worker(job, flags, 0, process)
    assert_goes_on(job, undisturbed, run)
