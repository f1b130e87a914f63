"""What a job logs, in full: something of each step, and nothing that a row holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from beam_gemma.cli import run as cli
from pipelines import classify, embed, generate

ROOT = Path(__file__).parent.parent.parent
SECRET = "zebra"
"""Part of every row's text, of columns that are carried along, and of what makes rows fail."""
TASKS = {
    generate: ["--prompt=say {text}", "--max_tokens=3", "--max_prompt_tokens=30"],
    classify: ["--prompt={text} is", "--label={other}", "--label= b", "--max_prompt_tokens=30"],
    embed: ["--text_column=text"],
}


@pytest.fixture
def files(tmp_path):
    """Flags of a job on rows of which some fail: a null, one too long, one with an empty label."""
    texts = [f"the {SECRET} {i}" for i in range(4)] + [None, f"{SECRET} " * 200]
    path = tmp_path / "in.jsonl"
    lines = [
        {"text": text, "other": f" {SECRET}{i % 3}" * (i != 2)} for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [f"--input={path}", f"--output={tmp_path}/out.parquet", "--verbose"]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_a_verbose_log_has_nothing_of_any_row(
    task, files, monkeypatch, capsys, caplog, tiny_gemma3, two_sided
):
    model = two_sided[1].path if task is embed else tiny_gemma3.artifact.path
    monkeypatch.setattr(sys, "argv", ["job", f"--model={model}", *files, *TASKS[task]])
    assert cli.exit_code(task.main) == cli.SUCCESS
    stdout, stderr = capsys.readouterr()
    assert "read 6 = ok " in stdout
    assert "failed 0" not in stdout  # so there was something to complain of
    assert "beam_gemma" in {record.name.partition(".")[0] for record in caplog.records}
    assert SECRET not in stdout + stderr + caplog.text


def test_nor_do_the_logs_of_worker_processes(files, tiny_gemma3):
    model = f"--model={tiny_gemma3.artifact.path}"
    processes = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    job = subprocess.run(
        [sys.executable, "-m", "pipelines.generate", model, *files, *TASKS[generate], *processes],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    said = job.stdout + job.stderr
    assert "read 6 = ok 4 + failed 2" in said
    assert len(job.stderr.splitlines()) > 5
    assert SECRET not in said
