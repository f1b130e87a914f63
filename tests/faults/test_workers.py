"""Worker processes that are killed amid a bundle: the job ends at once, and goes on."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import ROOT, Faulty, assert_whole, resumed

pytestmark = pytest.mark.timeout(300)
WORKER = "apache_beam.runners.worker.sdk_worker_main"
SERVER = "apache_beam.runners.portability.local_job_service_main"
SECS = 60
"""That a job may take to notice."""


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a Python module; what it says goes into a file."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=stream, stderr=stream
        )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[str]]]:
    """A job server that starts its workers as processes; it, and the flags that lead to it."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = tmp_path / "server.log"
    process = start([SERVER, "--port", str(port)], log)
    try:
        while "Listening" not in log.read_text():
            assert process.poll() is None
            time.sleep(0.1)
        flags = [
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{port}",
            "--environment_type=beam:env:harness_subprocess_python:v1",
            f"--environment_config={sys.executable} -m {WORKER}",
        ]
        yield process, flags
    finally:
        process.kill()
        process.wait()


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
    assert resumed(job, run) == (219 - kept) * 24
    assert_whole(job, undisturbed)


@pytest.mark.parametrize("place", [0, 1], ids=["with the engine", "without"])
def test_a_worker_of_several_is_killed(job: Faulty, undisturbed: Faulty, run, place: int) -> None:
    lose_a_worker(job, ["--direct_running_mode=multi_processing", "--direct_num_workers=2"], place)
    assert_goes_on(job, undisturbed, run)


def test_a_worker_of_a_job_server_is_killed(job: Faulty, undisturbed: Faulty, run, server) -> None:
    process, flags = server
    lose_a_worker(job, flags, 0, process)
    assert_goes_on(job, undisturbed, run)


def test_a_job_server_does_the_job(job: Faulty, undisturbed: Faulty, server) -> None:
    log = job.folder / "job.log"
    process = start(["pipelines.generate", *job.flags(), *server[1]], log)
    assert process.wait(SECS) == 0, log.read_text()
    assert_whole(job, undisturbed)
