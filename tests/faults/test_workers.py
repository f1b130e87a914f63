"""Worker processes that are killed amid a bundle: the job ends at once, and goes on."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.faults.conftest import ROOT, Faulty, assert_whole, resumed

pytestmark = pytest.mark.timeout(300)
WORKER = "apache_beam.runners.worker.sdk_worker_main"
SECS = 60
"""That a job may take to notice."""


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the worker processes of a job, the one with the engine first."""
    family = psutil.Process(process.pid).children(recursive=True)
    found = [child for child in family if child.name() != "sh" and WORKER in child.cmdline()]
    return sorted(found, key=lambda child: child.cpu_times().user, reverse=True)


@pytest.mark.parametrize("place", [0, 1], ids=["with the engine", "without"])
def test_a_worker_is_killed(job: Faulty, undisturbed: Faulty, run, place: int) -> None:
    command = [sys.executable, "-m", "pipelines.generate", *job.flags()]
    mode = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    process = subprocess.Popen(
        [*command, *mode],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and job.durable() < 32:
            time.sleep(0.02)
        family = workers(process)
        family[place].kill()
        out, err = process.communicate(timeout=SECS)
    finally:
        process.kill()
    assert process.returncode != 0, out
    assert "error" in err.lower()
    assert not [worker for worker in family if worker.is_running()]
    assert job.outcome() == {}
    kept = job.durable()
    assert kept >= 32
    assert resumed(job, run) == (219 - kept) * 24
    assert_whole(job, undisturbed)
