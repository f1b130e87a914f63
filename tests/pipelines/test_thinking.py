"""The generate pipeline with a model that thinks: columns, dry run, resume and refusals."""

import json
import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.cli import run as cli
from export.__main__ import export
from pipelines.generate import main
from tests.doubles.once import exporter_digest, kept
from tests.doubles.thinking import thinking_checkpoint

SCHEMA = {
    "type": "object",
    "properties": {"is_ok": {"type": "boolean"}, "count": {"type": "integer", "maximum": 99}},
    "required": ["is_ok", "count"],
}


@pytest.fixture(scope="module")
def model():
    def make(folder):
        export(thinking_checkpoint(folder / "checkpoint"), folder / "model", tasks=["generate"])

    return str(kept(f"tiny-thinking-{exporter_digest()}", make) / "model")


@pytest.fixture
def flags(model, tmp_path):
    """All flags but that of the output."""
    texts = ["the cat", "a <|channel>hat<channel|>", None, "a cat", "in the hat", "then"]
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), tmp_path / "in.parquet")
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    return [
        f"--model={model}", f"--input={tmp_path}/in.parquet", "--prompt=say {text}",
        "--max_tokens=40", f"--json_schema={schema}", "--flatten",
    ]  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; return exit code, output and errors."""

    def run_with(output, *flags):
        argv = ["generate", f"--output={output}/x.parquet", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", argv)
        code = cli.exit_code(main)
        return code, *capsys.readouterr()

    return run_with


def table_of(folder):
    return pq.read_table(folder).sort_by("id")


THINKING = ["--thinking=on", "--thinking_tokens=7"]


@pytest.mark.parametrize("sampling", [[], ["--temperature=1.5"]], ids=["greedy", "drawn"])
def test_each_row_has_its_thought_and_valid_values(run, flags, tmp_path, sampling):
    out = tmp_path / "out"
    code, stdout, _ = run(out, *flags, *THINKING, *sampling)
    assert code == 0
    assert "read 6 = ok 5 + failed 1 = written 6 rows" in stdout
    table = table_of(out)
    names = "id text is_ok count thoughts finish_reason num_prompt_tokens num_thinking_tokens"
    assert table.column_names == [*names.split(), "num_completion_tokens", "error"]
    failed, *good = sorted(table.to_pylist(), key=lambda row: row["error"] is None)
    assert failed["thoughts"] is failed["num_thinking_tokens"] is None
    for row in good:
        assert row["is_ok"] in (True, False)
        assert row["count"] <= 99
        assert row["thoughts"] is not None
        assert row["num_thinking_tokens"] <= 7
        assert row["finish_reason"] == "stop"
    assert max(row["num_thinking_tokens"] for row in good) == 7
    thought, answer = (
        sum(row[f"num_{name}_tokens"] for row in good) for name in ("thinking", "completion")
    )
    assert f" + {thought} thinking + {answer} completion tokens in " in stdout
    (record,) = out.glob("*.run.json")
    (task,) = json.loads(record.read_text())["tasks"]
    assert task["results"]["thinking_tokens"] == thought
    assert (task["settings"]["thinking"], task["settings"]["thinking_tokens"]) == (True, 7)


def test_a_row_is_worth_the_same_however_it_is_run(run, flags, tmp_path):
    same = [*flags, *THINKING, "--temperature=20", "--key_column=id", "--token_ids", "--logprob"]
    assert run(tmp_path / "plain", *same)[0] == 0
    assert run(tmp_path / "alone", *same, "--max_num_seqs=1", "--max_num_batched_tokens=64")[0] == 0
    assert table_of(tmp_path / "plain").equals(table_of(tmp_path / "alone"))


def test_a_job_that_was_stopped_goes_on_with_the_same_limit_alone(run, flags, tmp_path):
    assert run(tmp_path / "whole", *flags, *THINKING)[0] == 0
    out, other = tmp_path / "out", tmp_path / "other"
    stop = ["--max_cost_tokens=60", "--max_num_seqs=1"]
    code, _, stderr = run(out, *flags, *THINKING, *stop)
    assert (code, "--resume" in stderr) == (3, True)
    shutil.copytree(out, other)
    code, stdout, _ = run(out, *flags, *THINKING, "--resume")
    assert (code, " rows resumed" in stdout) == (0, True)
    assert table_of(out).equals(table_of(tmp_path / "whole"))
    longer = ["--thinking=on", "--thinking_tokens=8"]
    code, stdout, _ = run(other, *flags, *longer, "--resume")
    assert (code, " rows resumed" in stdout) == (0, False)


def test_a_dry_run_shows_the_prompt_that_has_the_model_think(run, flags, tmp_path):
    code, stdout, _ = run(tmp_path / "out", *flags, *THINKING, "--dry_run")
    assert code == 0
    assert "<|turn>system\n<|think|>\n<turn|>\n<|turn>user\nsay the cat<turn|>" in stdout
    assert "thoughts string" in stdout
    code, stdout, _ = run(tmp_path / "out", *flags, "--thinking=off", "--dry_run")
    assert code == 0
    assert "<|think|>" not in stdout
    assert "thoughts" not in stdout


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--chat_template=gemma", *THINKING], "got one that ignores it"),
        (["--thinking_tokens=9"], "expected thinking beside it"),
        (["--thinking=on", "--prompt_format=raw"], "got prompt_format raw"),
        (["--thinking=on", "--thinking_tokens=480"], "max_tokens and thinking_tokens: expected"),
        ([*THINKING, "--dry_run", "--expected_tokens=48"], "--max_tokens and --thinking_tokens 47"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence_before_the_job(
    run, flags, tmp_path, wrong, sentence
):
    code, stdout, stderr = run(tmp_path / "out", *flags, *wrong)
    assert (code, stdout) == (2, "")
    assert sentence in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_thoughts_is_refused(run, flags, tiny_gemma3, tmp_path):
    own = [f"--model={tiny_gemma3.artifact.path}", *flags[1:]]
    code, stdout, stderr = run(tmp_path / "out", *own, "--thinking=on", "--chat_template=gemma")
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: thinking: expected a model such as Gemma 4, with <|channel>")
    assert not (tmp_path / "out").exists()
