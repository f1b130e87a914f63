"""Launch: rows balance or the job fails, and errors are one sentence."""

import pytest

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


def test_errors_of_others_keep_their_trace():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_code(main)


def test_exit_code_of_a_command_is_its_own():
    assert exit_code(lambda: 7) == 7
