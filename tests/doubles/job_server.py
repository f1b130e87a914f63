"""A portable runner whose workers are processes of their own: Beam's job server."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.doubles.emulators import ROOT, free_port

WORKER = "apache_beam.runners.worker.sdk_worker_main"
SERVER = "apache_beam.runners.portability.local_job_service_main"


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a Python module; what it says goes into a file."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=stream, stderr=stream
        )


@contextmanager
def job_server(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[str]]]:
    """Run the server until the block ends; yield it, and the flags that lead to it."""
    port = free_port()
    log = folder / "server.log"
    process = start([SERVER, "--port", str(port)], log)
    try:
        while "Listening" not in log.read_text():
            assert process.poll() is None
            time.sleep(0.1)
        yield (
            process,
            [
                "--runner=PortableRunner",
                f"--job_endpoint=localhost:{port}",
                "--environment_type=beam:env:harness_subprocess_python:v1",
                f"--environment_config={sys.executable} -m {WORKER}",
            ],
        )
    finally:
        process.kill()
        process.wait()
