"""Jobs that Ctrl-C or SIGTERM ends: one sentence, no process left, and a command that goes on."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from beam_gemma.cli.stop import resuming
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import StorageError
from beam_gemma.inference import supervised_model
from beam_gemma.inference.supervised_model import SupervisedModel, Supervision, save_finished
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.row_keys import KEY_BYTES
from benchmarks.overhead import Echo
from tests.doubles.fake_models import fake_encoder
from tests.doubles.workers_path import WORKERS_PATH
from tests.faults.conftest import NUM_REQUESTS, ROOT, Faulty

SECS = 30
"""That a job may take to begin, and to end."""
MODES = {
    "in_memory": [],
    "threads": ["--direct_running_mode=multi_threading", "--direct_num_workers=2"],
    "processes": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
}
LONG = ["--max_tokens=200", "--ignore_eos"]


@contextmanager
def started(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Run a command in a process group of its own, of which nothing is left in the end."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": WORKERS_PATH}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(holds: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    """Wait until something holds of a process that runs."""
    end = time.monotonic() + SECS
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def are_gone(family: list[psutil.Process]) -> bool:
    """Return whether processes have ended; whether they are reaped is up to the system."""
    _, left = psutil.wait_procs(family, timeout=5)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in left)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, with a path that leaves room for those of sockets."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.mark.parametrize(
    ("mode", "number"),
    [
        ("in_memory", signal.SIGINT),
        ("threads", signal.SIGTERM),
        ("processes", signal.SIGINT),
        ("processes", signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_job_in_a_sentence(
    job: Faulty, mode: str, number: signal.Signals, temporary: Path
) -> None:
    command = [sys.executable, "-m", "pipelines.generate", *job.flags(*LONG, *MODES[mode])]
    with started(command) as process:
        until(lambda: list(job.work.rglob("*.arrow")), process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert bool(family) == (mode == "processes")
        for child in family if number is signal.SIGTERM else ():
            child.suspend()  # so that it does not end by itself
        # A terminal sends Ctrl-C to all processes.
        (os.killpg if number is signal.SIGINT else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=SECS)
    assert (process.returncode, out) == (128 + number, "")
    sentence, _, line = err.partition("; go on with: ")
    name = "Ctrl-C (SIGINT)" if number is signal.SIGINT else "SIGTERM"
    assert sentence == f"error: job: stopped by {name}"
    assert shlex.split(line) == [*command, "--resume"]
    assert line.count("\n") == 1
    assert are_gone(family)
    assert list(temporary.glob("beam-gemma-workers-*")) == []
    assert 0 < job.durable() < NUM_REQUESTS
    assert job.outcome() == {}


def test_the_command_of_the_sentence_goes_on(job: Faulty, run) -> None:
    command = [sys.executable, "-m", "pipelines.generate", *job.flags(*LONG[1:])]
    with started(command) as process:
        until(lambda: list(job.work.rglob("*.arrow")), process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECS)
    line = shlex.split(err.partition("; go on with: ")[2])
    assert line[:3] == command[:3]
    code, out, err = run(line[3:])
    assert code == 0, err
    assert "rows resumed" in out


def test_a_signal_before_the_job_begins_needs_nothing_to_go_on(job: Faulty) -> None:
    """While the table is opened, from a pipe in which nothing comes."""
    pipe = job.folder / "in.jsonl"
    os.mkfifo(pipe)
    flags = [*job.flags(), f"--input={pipe}"]

    ends: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):  # nobody reads yet
            ends.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    with started([sys.executable, "-m", "pipelines.generate", *flags]) as process:
        until(is_read, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECS)
    os.close(ends[0])
    assert process.returncode == 130
    assert (out, err) == ("", "error: job: stopped by Ctrl-C (SIGINT)\n")


SLOW_TO_END = """
import sys, time
from beam_gemma.cli import stop

def command():
    print("runs", flush=True)
    time.sleep(60)

def ends():
    print("ends", flush=True)
    time.sleep(60)

stop.going_on_if(ends)
sys.exit(stop.interruptible(command))
"""


def test_a_second_signal_ends_at_once() -> None:
    with started([sys.executable, "-c", SLOW_TO_END]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "ends\n"
        before = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(SECS) == 130
        assert time.monotonic() - before < 3


@pytest.fixture
def model_of(monkeypatch):
    """Return a model with a finished row that is not saved yet, with a folder for its pieces."""
    monkeypatch.setattr(supervised_model, "_WRITERS", weakref.WeakSet())
    schema = pa.schema([("completion", pa.string()), ("error", pa.string())])
    settings = GenerateSettings(prompt_column="text", sampling=SamplingParams(max_tokens=3))

    def model(pieces: Path) -> SupervisedModel:
        model = SupervisedModel(
            Echo(fake_encoder(settings)), Supervision(pieces=str(pieces)), schema
        )
        model._pieces.add(b"k" * KEY_BYTES, {"completion": "a", "error": None})
        return model

    return model


def test_what_models_have_finished_is_saved(tmp_path: Path, model_of) -> None:
    models = [model_of(tmp_path / name) for name in "ab"]
    assert list(tmp_path.rglob("*.arrow")) == []
    save_finished()
    assert len(list(tmp_path.rglob("*.arrow"))) == len(models)


def test_model_whose_rows_cannot_be_saved_does_not_keep_others_from_it(
    tmp_path: Path, model_of
) -> None:
    (tmp_path / "file").write_text("")
    models = [model_of(tmp_path / name) for name in ("a", "file/b", "c")]
    with pytest.raises(StorageError):
        save_finished()
    assert len(list(tmp_path.rglob("*.arrow"))) == len(models) - 1


def test_the_command_that_goes_on_can_be_typed_and_tells_no_secret() -> None:
    command = ["python", "-m", "x", "--prompt=say {a b}", "--s3_secret_access_key=s3cr3t"]
    line = resuming(command)
    assert "s3cr3t" not in line
    assert shlex.split(line)[:4] == command[:4]
    assert line.endswith(" --resume")
    assert resuming(["x", "--resume=true"]) == "x --resume=true"
