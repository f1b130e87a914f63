"""Two jobs that write one output: one is refused, or the first can no longer publish."""

import os
import signal
import subprocess
import sys
import time

import pytest

from beam_gemma.cli import run as cli
from tests.doubles.workers_path import WORKERS_PATH
from tests.faults.conftest import NUM_ROWS, ROOT, Faulty, assert_whole

SECS = 100


@pytest.fixture
def stopped(job: Faulty):
    """Start the job in a process that stands still before it publishes; return it."""
    command = [sys.executable, "-m", "tests.faults.doomed", "stopped", str(job.report)]
    process = subprocess.Popen(
        [*command, *job.flags("--overwrite")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": WORKERS_PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + SECS
        while not job.report.exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_job_that_stood_still_while_another_took_its_place(
    job: Faulty, undisturbed: Faulty, run, stopped
) -> None:
    """Only by --overwrite, because its process is there; what it has staged is gone then."""
    for flags in ([], ["--resume"]):
        code, out, err = run(job.flags(*flags))
        assert (code, out) == (cli.USAGE, "")
        if flags:
            assert f"got a job of process {stopped.pid} on " in err
            assert err.endswith("; wait for its end, or take its place by --overwrite\n")
    assert job.outcome() == {}
    code, out, _ = run(job.flags("--overwrite"))
    assert code == 0
    assert f"= written {NUM_ROWS} rows" in out
    stopped.send_signal(signal.SIGCONT)
    out, err = stopped.communicate(timeout=SECS)
    assert (stopped.returncode, out) == (cli.FAILURE, "")
    assert "expected the lease of this job, got none; nothing more is published" in err
    assert_whole(job, undisturbed)


def test_of_two_jobs_at_once_one_is_refused(job: Faulty, undisturbed: Faulty) -> None:
    command = [sys.executable, "-m", "pipelines.generate", *job.flags()]
    both = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": WORKERS_PATH},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=SECS) for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [cli.SUCCESS, cli.USAGE], told
    _, err = told[codes.index(cli.USAGE)]
    assert err.startswith("error: --output: expected no ")
    assert err.count("\n") == 1
    assert_whole(job, undisturbed)
