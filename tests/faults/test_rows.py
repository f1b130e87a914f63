"""Rows that are bad in every way, and tables that are: an error on the row, or one for the job."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.doubles.workers_path import WORKERS_PATH
from tests.faults.conftest import LENGTH, ROOT, Faulty, assert_whole, resumed


def broken_utf8() -> pa.Array:
    """Return strings of which the middle one is not UTF-8."""
    good, bad = b"good", b"\xff\xfe\xfa"
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 4, 7, 11)))
    return pa.StringArray.from_buffers(3, offsets, pa.py_buffer(good + bad + good))


TOO_LONG = f"expected at most {512 - LENGTH} tokens"
BAD = {
    "null": (pa.array(["good", None, "good"]), "got null"),
    "too long": (pa.array(["good", "ab" * 2000, "good"]), f"{TOO_LONG}, got"),
    "a megabyte": (pa.array(["good", "a" * 1_000_000, "good"]), TOO_LONG),
    "invalid UTF-8": (broken_utf8(), "text"),
    "empty": (pa.array(["good", "", "good"]), None),
    "NUL": (pa.array(["good", "a\0b", "good"]), None),
    "controls": (pa.array(["good", "\x01\x7f\u200b\ufeff", "good"]), None),
    "a list": (pa.array([[1], [], [1]]), None),
    "a date too far": (pa.array([0, 10**8, 0], pa.int32()).cast(pa.date32()), None),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_ends_alone(job: Faulty, run, kind: str) -> None:
    column, error = BAD[kind]
    table = pa.table({"id": [1, 2, 3], "text": column})
    (job.folder / "in.parquet").unlink()
    pq.write_table(table, job.folder / "in.parquet")
    code, out, err = run(job.flags("--num_shards=1", f"--errors={job.folder}/bad.parquet"))
    assert code == 0, err
    assert out.startswith("read 3 = ")
    (path,) = (job.folder / "out").glob("x-*.parquet")
    written = pq.read_table(path)
    assert written.column("text").combine_chunks().buffers()[-1] is not None
    assert written.column("id").to_pylist() == [1, 2, 3]
    first, second, third = written.column("error").to_pylist()
    assert (first, third) == (None, None)
    completions = written.column("completion").to_pylist()
    assert completions[0] == completions[2] != None  # noqa: E711
    (bad,) = job.folder.glob("bad-*.parquet")
    if error is None:
        assert second is None
        assert pq.read_table(bad).num_rows == 0
    else:
        assert error in second
        assert pq.read_table(bad).column("id").to_pylist() == [2]


def test_a_lone_surrogate_is_named_before_the_job(job: Faulty, run) -> None:
    lines = [json.dumps({"id": 1, "text": "good"}), r'{"id": 2, "text": "\ud800"}']
    (job.folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    flags = [f for f in job.flags("--num_shards=1") if not f.startswith(("--input", "--output"))]
    table = [f"--input={job.folder}/in.jsonl", f"--output={job.folder}/out/x.jsonl"]
    code, out, err = run([*flags, *table])
    assert (code, out) == (2, "")
    assert "in.jsonl, line 2: expected a JSON object" in err
    assert "surrogate pair of a character is not whole" in err
    assert not (job.folder / "out").exists()


def test_a_column_that_is_no_text_is_refused_before_the_job(job: Faulty, run) -> None:
    (job.folder / "in.parquet").unlink()
    pq.write_table(pa.table({"text": [b"good", b"\xff\x00"]}), job.folder / "in.parquet")
    code, out, err = run(job.flags())
    assert (code, out) == (2, "")
    assert "column 'text': expected a type that can be written as text, got binary" in err


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def without_its_end(content: bytes) -> bytes:
    return content[:-4] + b"XXXX"


def with_a_spoilt_page(content: bytes) -> bytes:
    """Return a file whose footer is right and some of whose rows are not."""
    place = len(content) // 3
    return (
        content[:place]
        + bytes(b ^ 0xFF for b in content[place : place + 400])
        + (content[place + 400 :])
    )


@pytest.mark.parametrize("damage", [cut, without_its_end, with_a_spoilt_page, lambda _: b""])
def test_a_malformed_file_is_the_error_of_the_job(
    job: Faulty, undisturbed: Faulty, run, damage: Callable[[bytes], bytes]
) -> None:
    path = job.folder / "in.parquet"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(content))
    code, out, err = run(job.flags())
    assert (code in (1, 2), out) == (True, "")
    assert re.fullmatch(r"error: .*in\.parquet: expected .*\n", err)
    assert job.outcome() == {}
    path.write_bytes(content)
    resumed(job, run)
    assert_whole(job, undisturbed)


@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_the_sentence_is_alone_with_any_number_of_workers(job: Faulty, mode: str) -> None:
    """Each worker logs and prints the traceback, and so does the runner."""
    path = job.folder / "in.parquet"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(with_a_spoilt_page(content))
    flags = [f"--direct_running_mode={mode}", "--direct_num_workers=2"]
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines.generate", *job.flags(*flags)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": WORKERS_PATH},
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"error: .*in\.parquet: expected rows .*--resume\n", ended.stderr)


def test_a_job_that_fails_wholesale_ends_early(job: Faulty, run) -> None:
    texts = [f"{'ab' * 2000}{i}" if i < 200 else str(i) for i in range(240)]
    (job.folder / "in.parquet").unlink()
    pq.write_table(pa.table({"id": range(240), "text": texts}), job.folder / "in.parquet")
    code, out, err = run(job.flags("--max_error_fraction=0.5"))
    assert (code, out) == (1, "")
    assert "expected at most 0.5 of them to fail" in err
    assert "x prompt: expected at most N tokens" in err
    assert job.outcome() == {}


def test_a_budget_that_is_spent_goes_on(job: Faulty, undisturbed: Faulty, run) -> None:
    spent = 0
    while not job.record.exists():
        resume = ["--resume"] if job.work.exists() else []
        before = job.durable()
        code, _, err = run(job.flags("--max_cost_tokens=400", *resume))
        if code:
            assert code == 3
            assert "expected to do with 400 tokens" in err
            assert job.outcome() == {}
            assert job.durable() > before
            spent += 1
    assert spent >= 2
    assert_whole(job, undisturbed)
