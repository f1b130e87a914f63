"""The generate pipeline, end to end with a tiny model, and every way to ask it wrongly."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import beam_gemma
from beam_gemma.cli import run as cli
from beam_gemma.model.artifact import Artifact
from beam_gemma.runtime.cpu_session import Session
from pipelines.generate import main
from tests.doubles.tables import RICH, assert_same_schema, rich_table, text_of, write_parquet

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model(tiny_gemma3):
    return str(tiny_gemma3.artifact.path)


@pytest.fixture
def rows(tmp_path):
    """A table of JSON lines; the second row is bad."""
    texts = ["the cat", None, "in the hat", "a tent"]
    lines = [
        {"id": i, "text": t, "chat": [{"role": "user", "content": t}]} for i, t in enumerate(texts)
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; return exit code, output and errors."""

    def run_with(*flags):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, flags)])
        code = cli.exit_code(main)
        return code, *capsys.readouterr()

    return run_with


def results_of(folder):
    lines = [
        line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()
    ]
    return {row["id"]: row for row in map(json.loads, lines)}


def test_rows_in_rows_out(run, model, rows, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = run(
        f"--model={model}", f"--input={rows}", f"--output={out}/x.jsonl",
        "--prompt=say {text}", "--max_tokens=5", "--ignore_eos", "--logprob", "--token_ids",
    )  # fmt: skip
    assert code == 0
    assert stdout.startswith("read 4 = ok 3 + failed 1 = written 4 rows; ")
    assert " + 15 completion tokens in " in stdout
    assert stdout.count("\n") == 1
    results = results_of(out)
    assert sorted(results) == [0, 1, 2, 3]
    assert [results[i]["error"] is None for i in range(4)] == [True, False, True, True]
    assert list(results[0]) == [
        "id", "text", "chat", "completion", "finish_reason", "num_prompt_tokens",
        "num_completion_tokens", "logprob", "completion_token_ids", "error",
    ]  # fmt: skip
    assert results[2]["text"] == "in the hat"
    assert results[2]["num_completion_tokens"] == len(results[2]["completion_token_ids"]) == 5


def test_the_report_and_the_record_tell_no_row_unless_asked(run, model, rows, tmp_path):
    flags = [
        f"--model={model}", f"--input={rows}", "--prompt=say {text}", "--max_tokens=5",
        "--ignore_eos",
    ]  # fmt: skip
    plain, shown = tmp_path / "a" / "plain.html", tmp_path / "shown.html"
    assert run(*flags, f"--output={tmp_path}/a/x.jsonl", f"--report={plain}")[0] == 0
    code, _, _ = run(
        *flags, f"--output={tmp_path}/b/x.jsonl", f"--report={shown}", "--report_rows=3"
    )
    assert code == 0
    record = json.loads(next((tmp_path / "a").glob("*.run.json")).read_text())
    assert record["command"][-2:] == [f"--output={tmp_path}/a/x.jsonl", f"--report={plain}"]
    assert record["timelines"][0]["completion_tokens"][-1] == 15
    for text in (plain.read_text(), json.dumps(record)):
        assert "say {text}" in text
        assert "the cat" not in text
        assert "in the hat" not in text
    page = shown.read_text()
    assert "the cat" in page
    assert "in the hat" in page
    assert "a tent" not in page


def test_a_row_is_worth_the_same_however_it_is_run(run, model, rows, tmp_path):
    flags = [
        f"--model={model}", f"--input={rows}", "--prompt_column=text", "--max_tokens=6",
        "--temperature=30", "--seed=3", "--key_column=id",
    ]  # fmt: skip
    ways = {
        "plain": [],
        "alone": ["--max_num_seqs=1", "--max_num_batched_tokens=64"],
        "threads": ["--direct_running_mode=multi_threading", "--direct_num_workers=3"],
        "processes": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
        "shards": ["--num_shards=3"],
    }
    for name, more in ways.items():
        code, _, _ = run(*flags, f"--output={tmp_path}/{name}/x.jsonl", *more)
        assert code == 0
    plain = results_of(tmp_path / "plain")
    assert len(plain) == 4
    assert plain[0]["completion"] != plain[2]["completion"]
    for name in ways:
        assert results_of(tmp_path / name) == plain


def test_parquet_keeps_every_type(run, model, tmp_path):
    table = rich_table(range(100))
    write_parquet(tmp_path / "in.parquet", table, rows_per_group=40)
    code, stdout, _ = run(
        f"--model={model}", f"--input={tmp_path}/in.parquet", f"--output={tmp_path}/out/x.parquet",
        "--prompt={text} {label} {day}", "--max_tokens=1", "--num_shards=2",
    )  # fmt: skip
    assert code == 0
    assert "read 100 = ok 80 + failed 20 = written 100 rows" in stdout
    assert len(list((tmp_path / "out").glob("x-*"))) == 2
    back = pq.read_table(tmp_path / "out")
    assert text_of(back.select(RICH.names)) == text_of(table)
    assert_same_schema(back.select(RICH.names).schema, RICH)
    assert back.schema.field("num_prompt_tokens").type == pa.int64()
    marks = {key.decode(): value.decode() for key, value in back.schema.metadata.items()}
    assert marks["beam_gemma.version"] == beam_gemma.__version__
    assert marks["beam_gemma.models"] == f"{model} {Artifact.open(model).digest}"
    assert len(marks["beam_gemma.settings_sha256"]) == 64


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_limit_and_empty_input(run, model, tmp_path, limit):
    source = tmp_path / "in.parquet"
    write_parquet(source, rich_table(range(10 if limit else 0)), rows_per_group=4)
    code, stdout, _ = run(
        f"--model={model}", f"--input={source}", f"--output={tmp_path}/out/x.parquet",
        "--prompt=x", "--max_tokens=1", f"--limit={limit or 5}",
    )  # fmt: skip
    assert code == 0
    assert f"written {limit} rows" in stdout
    back = pq.read_table(tmp_path / "out")
    assert sorted(back["key"].to_pylist()) == list(range(limit))
    assert_same_schema(back.select(RICH.names).schema, RICH)


def test_chat(run, model, rows, tmp_path):
    flags = [f"--model={model}", f"--input={rows}", f"--output={tmp_path}/out/x.jsonl"]
    chat = ["--messages_column=chat", "--chat_template=gemma", "--system=be kind", "--max_tokens=2"]
    code, stdout, _ = run(*flags, *chat, "--dry_run")
    assert code == 0
    assert "<start_of_turn>user\nbe kind\n\nthe cat<end_of_turn>\n<start_of_turn>model" in stdout
    code, stdout, _ = run(*flags, *chat)
    assert code == 0
    assert "ok 3 + failed 1" in stdout


def test_dry_run_loads_no_weights_and_writes_nothing(run, model, rows, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Session, "of", refuse)
    code, stdout, _ = run(
        f"--model={model}", f"--input={rows}", f"--output={tmp_path}/out/x.jsonl",
        "--prompt=say {text}", "--dry_run",
    )  # fmt: skip
    assert code == 0
    assert stdout.startswith("rows: 4, of which 4 sampled\ncolumns to add: completion string, ")
    assert "\nprompt tokens: mean " in stdout
    assert "rows that would fail: 1 of the sample\n  1 column 'text'" in stdout
    assert stdout.endswith("tokens:\nsay a tent\n")
    assert not (tmp_path / "out").exists()


def test_earlier_output_is_kept_unless_it_may_go(run, model, rows, tmp_path):
    flags = [
        f"--model={model}", f"--input={rows}", f"--output={tmp_path}/out/x.jsonl",
        "--prompt=x", "--max_tokens=1",
    ]  # fmt: skip
    assert run(*flags, "--num_shards=3")[0] == 0
    before = results_of(tmp_path / "out")
    code, stdout, stderr = run(*flags, "--limit=1")
    assert (code, stdout) == (2, "")
    assert "x-00000-of-00003.jsonl" in stderr
    assert "--overwrite" in stderr
    assert results_of(tmp_path / "out") == before
    assert run(*flags, "--limit=1", "--overwrite")[0] == 0
    assert [p.name for p in (tmp_path / "out").glob("x-*")] == ["x-00000-of-00001.jsonl"]


def test_output_over_its_own_input_is_refused(run, model, tmp_path):
    write_parquet(tmp_path / "x-00000-of-00001.parquet", rich_table(range(3)))
    code, _, stderr = run(
        f"--model={model}", f"--input={tmp_path}/*.parquet", f"--output={tmp_path}/x.parquet",
        "--prompt=x", "--overwrite",
    )  # fmt: skip
    assert code == 2
    assert "another table than that of --input" in stderr
    assert (tmp_path / "x-00000-of-00001.parquet").exists()


def test_engine_that_stops_fails_the_job_in_one_sentence(run, model, rows, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Session, "start", fail)
    code, stdout, stderr = run(
        f"--model={model}", f"--input={rows}", f"--output={tmp_path}/out/x.jsonl",
        "--prompt_column=text", "--max_tokens=1",
    )  # fmt: skip
    assert (code, stdout) == (1, "")
    assert re.search(r"^error: .*the device is gone", stderr, re.MULTILINE)
    assert not results_of(tmp_path / "out")


def test_job_that_loses_rows_fails(run, model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "counters", lambda _: {"rows_read": 4, "written_ok": 3})
    code, _, stderr = run(
        f"--model={model}", f"--input={rows}", f"--output={tmp_path}/out/x.jsonl",
        "--prompt=x", "--max_tokens=1",
    )  # fmt: skip
    assert code == 1
    assert "rows were lost" in stderr


GOOD = {"--model": "MODEL", "--input": "ROWS", "--output": "OUT", "--prompt": "say {text}"}
BAD = {
    "unknown flag": ({"--max_tokenz": "5"}, "unknown flag --max_tokenz; did you mean --max_tokens"),
    "misspelt Beam flag": ({"--runer": "x"}, "unknown flag --runer; did you mean --runner"),
    "missing input": ({"--input": "none.parquet"}, "none.parquet: expected at least one file"),
    "unknown input format": ({"--input": "x.csv"}, "x.csv: expected files that end in"),
    "unknown output format": ({"--output": "x.csv"}, "x.csv: expected a name that ends in"),
    "unknown template field": ({"--prompt": "{txt}"}, "'txt': expected in the table"),
    "malformed template": ({"--prompt": "{text"}, "template: expected each brace closed"),
    "missing prompt column": ({"--prompt": None, "--prompt_column": "x"}, "'x': expected in the"),
    "prompt column of numbers": ({"--prompt": None, "--prompt_column": "id"}, "got int64"),
    "messages of text": (
        {"--prompt": None, "--messages_column": "text", "--chat_template": "gemma"},
        "expected list<struct",
    ),
    "missing key column": ({"--key_column": "idd"}, "'idd': expected in the table"),
    "no prompt": ({"--prompt": None}, "expected one of --prompt"),
    "missing model": ({"--model": "none"}, "none: expected a model folder"),
    "damaged model": ({"--model": "DAMAGED"}, "damaged, copy or export it again"),
    "model of another format": ({"--model": "OTHER"}, "format 99, this version reads"),
    "no GPU graph": (
        {"--device": "cuda"},
        "export the model again with --tasks generate --device cuda",
    ),
    "empty stop": ({"--stop": ""}, "stop: expected texts that are not empty"),
    "no tokens": ({"--max_tokens": "0"}, "max_tokens: expected at least 1"),
    "too many tokens": ({"--max_tokens": "9999999"}, "max_tokens: expected less than the"),
    "temperature below 0": ({"--temperature": "-1"}, "temperature: expected"),
    "no sequences": ({"--max_num_seqs": "0"}, "max_num_seqs: expected at least 1"),
    "system without chat": ({"--system": "x"}, "pass --chat_template gemma"),
    "malformed chat template": ({"--chat_template": "BROKEN"}, "chat template: expected"),
    "rows of no report": ({"--report_rows": "3"}, "expected a --report to show them in"),
    "report in no folder": ({"--report": "PAGE"}, "--report: expected a file that can be"),
    "clash": ({"--input": "CLASH"}, "'error': expected a table without it"),
    "malformed rows": ({"--input": "MALFORMED"}, "malformed.jsonl, line 2: expected a JSON object"),
}


@pytest.fixture(scope="module")
def spoiled(model, tmp_path_factory):
    """A folder with a damaged model and one of another format."""
    folder = tmp_path_factory.mktemp("spoiled")
    for name in ("damaged", "other"):
        shutil.copytree(model, folder / name)
    with (folder / "damaged" / "tokenizer.model").open("r+b") as file:
        file.write(b"damage")
    manifest = folder / "other" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    return folder


@pytest.fixture
def places(model, spoiled, rows, tmp_path):
    """Names of files in the flags above."""
    (tmp_path / "clash.jsonl").write_text('{"text": "a", "error": "b"}\n')
    (tmp_path / "malformed.jsonl").write_text('{"text": "a"}\n{"text":\n')
    (tmp_path / "broken.jinja").write_text("{% for %}")
    return {
        "MODEL": model,
        "ROWS": rows,
        "PAGE": f"{rows}/x.html",
        "OUT": f"{tmp_path}/out/x.jsonl",
        "CLASH": f"{tmp_path}/clash.jsonl",
        "MALFORMED": f"{tmp_path}/malformed.jsonl",
        "BROKEN": f"{tmp_path}/broken.jinja",
        "DAMAGED": f"{spoiled}/damaged",
        "OTHER": f"{spoiled}/other",
    }


def flags_of(changes, places):
    flags = {name: value for name, value in (GOOD | changes).items() if value is not None}
    return [f"{name}={places.get(value, value)}" for name, value in flags.items()]


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_setting_ends_before_the_job_in_one_sentence(run, places, changes, message, tmp_path):
    code, stdout, stderr = run(*flags_of(changes, places))
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
    assert not (tmp_path / "out").exists()


def test_exit_code_of_the_process(places):
    changes, message = BAD["damaged model"]
    command = [sys.executable, "-m", "pipelines.generate", *flags_of(changes, places)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_process_that_succeeds(places, tmp_path):
    command = [sys.executable, "-m", "pipelines.generate", *flags_of({"--max_tokens": "1"}, places)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("read 4 = ok 3 + failed 1 = written 4 rows; ")
    assert len(results_of(tmp_path / "out")) == 4
