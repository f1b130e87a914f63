"""What is logged while a job runs: errors of Beam only if the job does not tell them itself."""

import logging
import subprocess
import sys
import threading

import pytest

from beam_gemma.cli.held_logs import HeldLogs
from tests.doubles.workers_path import WORKERS_PATH

BEAM = logging.getLogger("apache_beam.runners.portability.local_job_service")
OURS = logging.getLogger("beam_gemma.inference.task_handler")
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
WORKER = (
    'severity: WARN timestamp {   seconds: 1 } message: "%s" log_location: "/x/y.py:42" '
    'thread: "MainThread" '
)


def noise() -> None:
    """Say what a failing job says in a process."""
    BEAM.error("a traceback")
    logging.error("a traceback of the root")
    sys.stderr.write("a traceback, printed\n")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()


@pytest.fixture
def said(caplog):
    """Return what was logged; what Beam logs goes straight to the handlers of the root."""
    return lambda: [(record.name, record.getMessage()) for record in caplog.records]


def test_errors_of_a_failing_job_are_not_shown(said, capsys):
    with pytest.raises(ValueError, match="the error"), HeldLogs(with_workers=False):  # noqa: PT012
        noise()
        raise ValueError("the error")
    assert said() == []
    assert capsys.readouterr().err == ""


def test_errors_of_a_job_that_succeeds_are_shown_in_the_end(said, capsys):
    with HeldLogs(with_workers=False):
        noise()
        assert said() == []
    assert [message for _, message in said()] == ["a traceback", "a traceback of the root"]
    assert "a traceback, printed\n" in capsys.readouterr().err
    BEAM.error("after it")
    assert said()[-1] == (BEAM.name, "after it")


def test_warnings_pass_and_those_of_workers_lose_what_wraps_them(said):
    with HeldLogs(with_workers=False):
        OURS.warning("ours")
        OURS.error("ours, too")
        BEAM.warning("of Beam")
        BEAM.warning("Worker: %s", WORKER % r"engine: \"caf\303\251\"")
        BEAM.warning("Worker: %s", WORKER % "Discarding unparseable args: [\\'--x\\']")
        assert said() == [
            (OURS.name, "ours"),
            (OURS.name, "ours, too"),
            (BEAM.name, "of Beam"),
            ("worker", 'engine: "café"'),
        ]


JOB = """
import logging, os, subprocess, sys
from beam_gemma.cli.held_logs import HeldLogs
logging.basicConfig()
try:
    with HeldLogs(with_workers=True) as held:
        subprocess.run(["sh", "-c", "echo a traceback of a worker >&2"])
        os.write(2, b"native words\\n")
        logging.getLogger("beam_gemma").warning("ours")
        print("progress", file=held.stream)
        if sys.argv[1] == "fails":
            raise ValueError
except ValueError:
    print("error: the sentence", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("outcome", "last"),
    [
        ("fails", "error: the sentence\n"),
        ("succeeds", "a traceback of a worker\nnative words\n"),
    ],
)
def test_what_worker_processes_print_is_kept(outcome, last):
    ended = subprocess.run(
        [sys.executable, "-c", JOB, outcome], env={"PYTHONPATH": WORKERS_PATH},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stderr == f"WARNING:beam_gemma:ours\nprogress\n{last}"
