"""A job whose faults are tried, and what it gives undisturbed."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.cli import run as cli
from beam_gemma.tables.file_sink import FileSink, open_sink
from pipelines.generate import main
from tests.conftest import TinyModel
from tests.doubles.workers_path import WORKERS_PATH

ROOT = Path(__file__).parent.parent.parent
NUM_ROWS = 120
NUM_OK = NUM_ROWS - 1
"""One row has no text."""
NUM_ALIKE = 10
"""Rows that ask what the one before them asks."""
NUM_REQUESTS = NUM_OK - NUM_ALIKE
LENGTH = 4
"""Tokens of a completion."""


@dataclass(frozen=True)
class Faulty:
    """A table, and a job over it that may be run again and again."""

    model: str
    folder: Path

    @property
    def work(self) -> Path:
        """Where what is not finished lies."""
        return Path(self._sink.work)

    @property
    def record(self) -> Path:
        """What is written last."""
        return Path(self._sink.record_path)

    @property
    def _sink(self) -> FileSink:
        return open_sink(f"{self.folder}/out/x.parquet")

    def flags(self, *more: str) -> list[str]:
        """Return the command line."""
        return [
            f"--model={self.model}", f"--input={self.folder}/in.parquet",
            f"--output={self.folder}/out/x.parquet", "--prompt=say {text}",
            f"--max_tokens={LENGTH}", "--max_num_seqs=8", "--num_shards=3", *more,
        ]  # fmt: skip

    @property
    def report(self) -> Path:
        """What a doomed process leaves."""
        return self.folder / "report.json"

    def doomed(self, place: str, *more: str) -> "subprocess.CompletedProcess[str]":
        """Run the job in a process that something happens to at a place; see `doomed`."""
        command = [sys.executable, "-m", "tests.faults.doomed", place, str(self.report)]
        resume = ["--resume"] if self.work.exists() else []
        return subprocess.run(
            [*command, *self.flags(*resume, *more)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": WORKERS_PATH},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def kill(self, place: str) -> int:
        """Run the job in a process that dies at a place; return the completion tokens computed."""
        ended = self.doomed(place)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        return json.loads(self.report.read_text())["completion_tokens"]

    def durable(self) -> int:
        """Return the rows that are durable."""
        return sum(
            pa.ipc.open_file(path).get_batch(0).num_rows for path in self.work.rglob("*.arrow")
        )

    def outcome(self) -> dict[str, bytes]:
        """Return the files of the output."""
        files = sorted((self.folder / "out").glob("x-*-of-*.parquet"))
        return {file.name: file.read_bytes() for file in files}

    def summary(self) -> dict[str, Any]:
        """Return what the record of the run says of the results."""
        return json.loads(self.record.read_text())["tasks"][0]["results"]

    def leftovers(self) -> list[str]:
        """Return what lies beside the output and is no part of it."""
        whole = {*self.outcome(), self.record.name}
        return [file.name for file in (self.folder / "out").iterdir() if file.name not in whole]


def resumed(job: Faulty, run: Callable[..., Any]) -> int:
    """Finish a job; return the completion tokens that it took."""
    code, out, err = run(job.flags("--resume"))
    assert code == 0, err
    assert out.startswith(f"read {NUM_ROWS} = ok {NUM_OK} + failed 1 = written {NUM_ROWS} rows; ")
    tokens = re.search(r"\+ ([\d,]+) completion tokens", out)
    return int(tokens[1].replace(",", "")) if tokens else 0


def assert_whole(job: Faulty, undisturbed: Faulty) -> None:
    """Nothing is missing, nothing differs, and nothing else is left."""
    assert job.outcome() == undisturbed.outcome()
    assert job.leftovers() == []
    assert job.summary() == undisturbed.summary()


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of many lengths in several row groups; each twelfth asks what the one before asks."""
    rng = np.random.default_rng(3)
    texts = ["ab" * int(n) + str(i) for i, n in enumerate(rng.integers(1, 40, NUM_ROWS))]
    texts[11::12] = texts[10::12]
    texts[5] = None
    path = tmp_path_factory.mktemp("faults") / "in.parquet"
    pq.write_table(pa.table({"id": range(NUM_ROWS), "text": texts}), path, row_group_size=25)
    return path


@pytest.fixture
def job(tiny_gemma3: TinyModel, table: Path, tmp_path: Path) -> Faulty:
    """The job in a folder of its own."""
    (tmp_path / "in.parquet").hardlink_to(table)
    return Faulty(str(tiny_gemma3.artifact.path), tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command line in this process; return exit code, output and errors."""

    def run_with(flags: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate", *flags])
        code = cli.exit_code(main)
        return code, *capsys.readouterr()

    return run_with


@pytest.fixture(scope="session")
def undisturbed(
    tiny_gemma3: TinyModel, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> Faulty:
    """The same job, done in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "in.parquet").hardlink_to(table)
    job = Faulty(str(tiny_gemma3.artifact.path), folder)
    argv, sys.argv = sys.argv, ["generate", *job.flags()]
    try:
        assert cli.exit_code(main) == 0
    finally:
        sys.argv = argv
    return job
