"""Launch: rows balance or the job fails, and errors are one sentence."""

import logging

import pytest

from beam_gemma.cli.failures import failure
from beam_gemma.cli.run import FAILURE, SUCCESS, USAGE, exit_code, report
from beam_gemma.errors import OptionsError

BALANCED = {
    "rows_read": 1064,
    "written_ok": 1063,
    "written_failed": 1,
    "rows_written": 1064,
    "prompt_tokens": 5120,
    "completion_tokens": 3072,
}


@pytest.fixture(autouse=True)
def not_verbose():
    """Jobs of other tests may have left the level of `--verbose`."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.WARNING)
    yield
    root.setLevel(level)


def test_summary_of_a_job_that_balances(capsys):
    assert report(BALANCED, 41.2) == SUCCESS
    out, err = capsys.readouterr()
    assert out == (
        "read 1,064 = ok 1,063 + failed 1 = written 1,064 rows; "
        "5,120 prompt + 3,072 completion tokens in 41.2 s (74.6 tokens/s)\n"
    )
    assert err == ""


@pytest.mark.parametrize("name", ["rows_read", "written_ok", "written_failed", "rows_written"])
@pytest.mark.parametrize("by", [-1, 1])
def test_job_that_does_not_balance_fails(name, by, capsys):
    assert report({**BALANCED, name: BALANCED[name] + by}, 1.0) == FAILURE
    assert "error: rows: expected the counts above to be equal" in capsys.readouterr().err


def test_summary_tells_how_full_the_steps_were(capsys):
    counts = BALANCED | {"decode_rows": 6016, "decode_slots": 6400}
    assert report(counts, 41.2) == SUCCESS
    assert capsys.readouterr().out.endswith("(74.6 tokens/s); steps 94 % full\n")


def test_summary_of_a_job_that_completes_nothing(capsys):
    counts = {name: count for name, count in BALANCED.items() if name != "completion_tokens"}
    assert report(counts, 40.0) == SUCCESS
    assert capsys.readouterr().out.endswith("rows; 5,120 tokens in 40.0 s (128.0 tokens/s)\n")


def test_job_without_rows(capsys):
    assert report({}, 0.0) == SUCCESS
    assert capsys.readouterr().out.startswith("read 0 = ok 0 + failed 0 = written 0 rows")


def test_errors_of_ours_are_one_sentence(capsys):
    def main():
        raise OptionsError("flag: expected this, got that")

    assert exit_code(main) == USAGE
    assert capsys.readouterr() == ("", "error: flag: expected this, got that\n")


def test_errors_of_others_are_one_sentence_too(capsys):
    def main():
        raise ZeroDivisionError("by 0")

    assert exit_code(main) == FAILURE
    assert capsys.readouterr().err == (
        "error: job: expected to finish, got ZeroDivisionError: by 0; --verbose shows the "
        "traceback\n"
    )


def test_exit_code_of_a_command_is_its_own():
    assert exit_code(lambda: 7) == 7


TRACE = """Traceback (most recent call last):
  File "apache_beam/runners/common.py", line 1512, in apache_beam.runners.common.DoFnRunner.process
{}

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "apache_beam/runners/common.py", line 1623, in apache_beam.runners.common._reraise_augmented
{}
"""


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [
        (
            "beam_gemma.errors.ArtifactError: m: expected a folder, got none",
            "beam_gemma.errors.ArtifactError: m: expected a folder, got none [while running 'Key']",
            "m: expected a folder, got none",
        ),
        (
            "KeyError: 'x'",
            "KeyError: \"x [while running 'Generate/Key']\"",
            "job: expected to finish, got KeyError: \"x\"; --verbose shows the traceback",
        ),
        (
            "RuntimeError: odd",
            "RuntimeError: odd [while running 'Generate/Key']",
            "job: expected to finish, got RuntimeError: odd; --verbose shows the traceback",
        ),
        (
            "OSError: [Errno 28] No space left on device",
            "RuntimeError: OSError: [Errno 28] No space left on device [while running 'Stage']",
            "disk: expected room for what the job writes, got OSError: [Errno 28] No space left on "
            "device; make room, then go on with --resume",
        ),
        (
            "MemoryError",
            "beam_gemma.errors.EngineError: engine: stopped by MemoryError: [while running 'I']",
            "memory: expected enough for the job, got MemoryError; free memory, lower "
            "--max_num_seqs or take a machine with more, then go on with --resume",
        ),
        (
            "ValueError: odd",
            "beam_gemma.errors.EngineError: engine: stopped by ValueError: odd",
            "engine: stopped by ValueError: odd",
        ),
    ],
)  # fmt: skip
def test_the_error_of_a_worker_is_one_sentence(first, last, told):
    error = RuntimeError(TRACE.format(first, last))
    assert failure(error) == told


def test_a_worker_that_died_and_other_errors_of_runners_are_sentences_too():
    died = failure(RuntimeError("Channel closed prematurely."))
    assert died.startswith("worker: expected its process to finish, got RuntimeError: Channel clos")
    assert failure(MemoryError("\n")).startswith("memory: expected enough for the job, got Memory")


def test_verbose_shows_the_trace_before_the_sentence(capsys):
    logging.getLogger().setLevel(logging.INFO)

    def main():
        raise ZeroDivisionError("by 0")

    assert exit_code(main) == FAILURE
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: job: expected to finish, got ZeroDivisionError: by 0"
