"""What version 0.7.0 left on disk is read: its models, saved results and records of runs."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.cli import run as cli
from beam_gemma.inference import saved_results
from pipelines.generate import main

DATA = Path(__file__).parents[1] / "data/version_0_7_0"
FLAGS = ["--prompt=say {text}", "--max_tokens=6", "--max_num_seqs=4", "--resume"]


@pytest.fixture
def resume(tmp_path, monkeypatch):
    """Go on with a job of 0.7.0, in a copy of its folder."""
    shutil.copytree(DATA, tmp_path / "job")
    monkeypatch.chdir(tmp_path / "job")
    # Results are not shared between builds of ONNX Runtime; these were made with this one.
    monkeypatch.setattr(saved_results, "numerics", lambda: "1, onnxruntime 1.31.1")

    def run(folder):
        argv = ["generate", "--model=model", "--input=in.parquet", f"--output={folder}/x.parquet"]
        monkeypatch.setattr(sys, "argv", [*argv, *FLAGS])
        assert cli.exit_code(main) == cli.SUCCESS
        return tmp_path / "job" / folder

    return run


def test_an_unfinished_job_of_0_7_0_goes_on_with_its_saved_results(resume):
    (piece,) = DATA.rglob("*.arrow")
    saved = pa.ipc.open_file(piece).read_all()
    folder = resume("unfinished")
    record = json.loads((folder / "_x.run.json").read_text())
    assert record["tasks"][0]["resumed_rows"] == saved.num_rows == 12
    (file,) = folder.glob("x-*.parquet")
    completions = pq.read_table(file)["completion"].to_pylist()
    assert len(completions) == 40
    assert set(saved["completion"].to_pylist()) <= set(completions)


def test_a_whole_output_of_0_7_0_is_left_alone(resume, capsys):
    folder = resume("whole")
    assert "the output is whole" in capsys.readouterr().out
    for file in folder.iterdir():
        assert file.read_bytes() == (DATA / "whole" / file.name).read_bytes()
