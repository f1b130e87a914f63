"""Places of outputs: free, apart from each other and from the input, and writable, or refused."""

import json
import os
import stat
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.cli import run as cli
from beam_gemma.tables.file_sink import open_sink
from beam_gemma.tables.lease import Lease, Standing, take
from pipelines.generate import main


@pytest.fixture
def run(tiny_gemma3, tmp_path, monkeypatch, capsys):
    """Run a command line over `in.parquet`, in a folder; return exit code, output and errors."""
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "in.parquet")
    monkeypatch.chdir(tmp_path)

    def run_with(*flags):
        fixed = [f"--model={tiny_gemma3.artifact.path}", "--prompt={text}", "--max_tokens=1"]
        given = [] if any(f.startswith("--input") for f in flags) else ["--input=in.parquet"]
        monkeypatch.setattr(sys, "argv", ["generate", *fixed, *given, *flags])
        return cli.exit_code(main), *capsys.readouterr()

    return run_with


def refused(run, tmp_path, *flags):
    """Run a command line that is refused and writes nothing; return its sentence."""
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*flags)
    assert (code, out) == (cli.USAGE, "")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return err


@pytest.mark.parametrize(
    "errors",
    [
        "out/x.parquet",
        "./out/x.parquet",
        "out/../out//x.parquet",
        "link/x.parquet",
        "out/x.jsonl",
        "out/x.parquet/bad.parquet",
        "out/x-00000-of-00001.parquet",
    ],
)
def test_failed_rows_are_not_written_into_the_output(run, tmp_path, errors):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    err = refused(run, tmp_path, "--output=out/x.parquet", f"--errors={errors}")
    assert f"--errors: expected another place than that of --output, got {errors} beside" in err


def test_failed_rows_beside_the_output_are_fine(run, tmp_path):
    code, out, _ = run("--output=out/x.parquet", "--errors=out/x_failed.parquet")
    assert code == 0
    assert "= ok 2 + failed 1 = written 3 rows" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_x.run.json",
        "_x_failed.run.json",
        "x-00000-of-00001.parquet",
        "x_failed-00000-of-00001.parquet",
    ]


@pytest.mark.parametrize(
    ("table", "place"),
    [
        ("table", "table/x.parquet"),
        ("table/", "./table/x.parquet"),
        ("table", "table/day=2/x.parquet"),
        ("table/day=*/*.parquet", "table/day=3/x.parquet"),
        ("table/day=1/*.parquet", "table/day=1/x.parquet"),
    ],
)
@pytest.mark.parametrize("flags", [["--output={}"], ["--output=out/y.parquet", "--errors={}"]])
def test_an_output_that_the_next_job_would_read_is_refused(run, tmp_path, table, place, flags):
    (tmp_path / "table/day=1").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "table/day=1/a.parquet")
    err = refused(run, tmp_path, f"--input={table}", *(flag.format(place) for flag in flags))
    assert f": expected a place that is not read, got {place}, whose files would be rows" in err


def test_outputs_near_the_input_are_fine(run, tmp_path):
    assert run(f"--input={tmp_path}/in*.parquet", "--output=x.parquet")[0] == 0
    assert run("--output=in.parquet")[0] == 0


def test_a_place_that_cannot_be_written_is_found_before_the_job(run, tmp_path):
    (tmp_path / "file").touch()
    for flags in (
        ["--output=file/x.parquet"],
        ["--output=/proc/x.parquet"],
        ["--output=out.parquet", "--errors=file/x.parquet"],
    ):
        err = refused(run, tmp_path, *flags)
        assert "expected a file that can be written, got " in err
    work = tmp_path / "_out.parquet.work"
    work.touch()
    err = refused(run, tmp_path, "--output=out.parquet", "--overwrite")
    assert "--output: expected a folder that can be written, got FileExistsError" in err


def job_elsewhere(work):
    """Leave the lease of a job that runs on another machine, perhaps."""
    lease = Lease.of_this_process("a", is_remote=True)
    assert take(str(work), lease, up_to=Standing.ENDED) is None
    return lease


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
@pytest.mark.parametrize("place", ["out", "bad"])
def test_a_job_elsewhere_gives_its_place_by_a_flag_alone(run, tmp_path, flag, place):
    lease = job_elsewhere(tmp_path / f"_{place}.parquet.work")
    flags = ["--output=out.parquet", "--errors=bad.parquet"]
    err = refused(run, tmp_path, *flags)
    assert f": expected no other job that writes it, got a job that {lease.host} submitted" in err
    assert err.endswith("go on with it by --resume or begin anew by --overwrite\n")
    assert run(*flags, flag)[0] == 0
    record = json.loads((tmp_path / "_out.run.json").read_text())
    assert record["job"] == json.loads((tmp_path / "_bad.run.json").read_text())["job"]
    assert not list(tmp_path.glob("*.work"))


def test_what_is_unfinished_is_private(run, tmp_path, monkeypatch):
    """Also in a work folder of version 0.7.0; the output has the modes of any file."""
    work = tmp_path / "_out.parquet.work"
    (work / "pieces").mkdir(parents=True)
    work.chmod(0o755)
    modes = []
    sink = type(open_sink("out.parquet"))
    publish = sink.publish

    def spy(self, staged, record):
        modes.extend(stat.filemode(path.stat().st_mode) for path in tmp_path.glob("*.work"))
        publish(self, staged, record)

    monkeypatch.setattr(sink, "publish", spy)
    umask = os.umask(0o022)
    try:
        assert run("--output=out.parquet", "--errors=bad.parquet")[0] == 0
    finally:
        os.umask(umask)
    assert modes == ["drwx------"] * 4
    files = [*tmp_path.glob("out-*"), *tmp_path.glob("_*.run.json")]
    assert {stat.filemode(file.stat().st_mode) for file in files} == {"-rw-r--r--"}


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--prompt=say {text}"], "prompt '{text}' there and 'say {text}' here"),
        (["--max_tokens=2"], "max_tokens 1 there and 2 here"),
        (["--limit=2"], "rows 3 there and 2 here"),
    ],
    ids=["prompt", "parameter", "limit"],
)
def test_resume_of_a_whole_output_by_another_job_is_refused(run, tmp_path, flags, difference):
    output = "--output=out.parquet"
    assert run(output)[0] == cli.SUCCESS
    before = {path: path.read_bytes() for path in tmp_path.glob("*out*")}
    code, out, err = run(output, "--resume", *flags)
    assert (code, out) == (cli.USAGE, "")
    assert err == (
        f"error: --resume: expected the job that wrote out.parquet, got {difference}; choose "
        "another --output or begin anew by --overwrite\n"
    )
    assert {path: path.read_bytes() for path in tmp_path.glob("*out*")} == before
    code, out, _ = run(output, "--resume")
    assert (code, out) == (
        cli.SUCCESS, "out.parquet: the output is whole, so there is nothing to go on with\n",
    )  # fmt: skip


def test_resume_of_files_without_a_record_is_refused(run, tmp_path):
    assert run("--output=out.parquet")[0] == cli.SUCCESS
    (tmp_path / "_out.run.json").unlink()
    code, _, err = run("--output=out.parquet", "--resume")
    assert code == cli.USAGE
    assert "expected the job that wrote out.parquet, got files without a record; " in err


def test_output_beside_the_shell_is_not_replaced_without_a_flag(run, tmp_path):
    """A name without a folder."""
    assert run("--output=out.parquet")[0] == cli.SUCCESS
    err = refused(run, tmp_path, "--output=out.parquet")
    assert "expected no earlier output, got out-00000-of-00001.parquet" in err
