"""Function calls by command line with a tiny model: columns in files, resumption, every refusal."""

import json
import re
import shutil
import sys

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.cli import run as cli
from beam_gemma.tasks.tool_calls import CALL_TYPE
from export.__main__ import export
from pipelines.generate import main
from tests.doubles.once import exporter_digest, kept
from tests.doubles.tool_models import FAMILIES, save_tool_model

BOOK = {
    "name": "book",
    "description": "Book it.",
    "parameters": {
        "type": "object",
        "properties": {
            "to": {"type": "string", "maxLength": 4},
            "n": {"type": "integer", "minimum": 1, "maximum": 99},
            "at": {"type": ["string", "null"], "enum": ["noon", None]},
        },
        "required": ["to", "at"],
    },
}
END = {"type": "function", "function": {"name": "end", "description": "Stop."}}
TEXTS = ["the cat", None, "in the hat", "a tent", "the cat", "then"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """The folder of a tiny model of each family."""
    name = request.param

    def make(folder):
        export(save_tool_model(name, folder / "checkpoint"), folder / "model")

    folder = kept(f"tiny-tools-{name.replace(' ', '-')}-{exporter_digest()}", make)
    return folder / "model"


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Run the command line in this process; return exit code, output and errors."""
    tools, rows = tmp_path / "tools.json", tmp_path / "in.parquet"
    tools.write_text(json.dumps([BOOK, END]))
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), rows)

    def run_with(output, *flags, tools=tools, model=model):
        argv = ["generate", f"--model={model}", f"--input={rows}", f"--output={output}",
                "--prompt_column=text", f"--tools={tools}", *map(str, flags)]  # fmt: skip
        monkeypatch.setattr(sys, "argv", argv)
        code = cli.exit_code(main)
        return code, *capsys.readouterr()

    return run_with


REQUIRED = ("--tool_choice=required", "--max_tokens=90", "--temperature=1", "--key_column=id")


def table_of(folder):
    return pa.concat_tables(map(pq.read_table, sorted(folder.glob("x-*.parquet"))))


def test_every_row_calls_declared_functions_with_valid_arguments(run, tmp_path):
    code, stdout, _ = run(tmp_path / "out/x.parquet", *REQUIRED)
    assert code == 0
    assert stdout.startswith("read 6 = ok 5 + failed 1 = written 6 rows; ")
    table = table_of(tmp_path / "out")
    assert table.schema.names == [
        "id", "text", "completion", "finish_reason", "num_prompt_tokens", "num_completion_tokens",
        "tool_calls", "num_unreadable_calls", "error",
    ]  # fmt: skip
    assert table.schema.field("tool_calls").type == CALL_TYPE
    parameters = {"book": BOOK["parameters"], "end": {"maxProperties": 0}}
    for row in table.to_pylist():
        if row["text"] is None:
            assert row["tool_calls"] is row["completion"] is None
            continue
        assert (row["completion"], row["num_unreadable_calls"]) == ("", 0)
        assert row["finish_reason"] in ("tool_calls", "length")
        assert row["tool_calls"]
        for call in row["tool_calls"]:
            jsonschema.validate(json.loads(call["arguments"]), parameters[call["name"]])


def test_lines_of_json_hold_the_same_calls(run, tmp_path):
    for name in ("x.parquet", "x.jsonl"):
        assert run(tmp_path / "out" / name, *REQUIRED)[0] == 0
    (path,) = (tmp_path / "out").glob("x-*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["tool_calls"] for line in lines] == table_of(tmp_path / "out")[
        "tool_calls"
    ].to_pylist()


def test_a_row_is_worth_the_same_however_it_is_run(run, tmp_path):
    assert run(tmp_path / "plain/x.parquet", *REQUIRED)[0] == 0
    assert run(tmp_path / "alone/x.parquet", *REQUIRED, "--max_num_seqs=1")[0] == 0
    assert table_of(tmp_path / "plain").equals(table_of(tmp_path / "alone"))


def test_a_job_that_was_stopped_goes_on_with_the_same_functions_alone(run, tmp_path):
    assert run(tmp_path / "whole/x.parquet", *REQUIRED)[0] == 0
    code, _, stderr = run(tmp_path / "out/x.parquet", *REQUIRED, "--max_cost_tokens=60",
                          "--max_num_seqs=1")  # fmt: skip
    assert (code, "--resume" in stderr) == (3, True)
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(out, other)
    code, stdout, _ = run(out / "x.parquet", *REQUIRED, "--resume")
    assert (code, " rows resumed" in stdout) == (0, True)
    assert table_of(out).equals(table_of(tmp_path / "whole"))
    (record,) = out.glob("*.run.json")
    (task,) = json.loads(record.read_text())["tasks"]
    assert task["settings"]["tool_choice"] == "required"
    assert task["settings"]["tools"] == [{"type": "function", "function": BOOK}, END]
    more = tmp_path / "more.json"
    more.write_text(json.dumps([{**BOOK, "description": "Book this."}, END]))
    code, stdout, _ = run(other / "x.parquet", *REQUIRED, "--resume", tools=more)
    assert (code, " rows resumed" in stdout) == (0, False)


def test_text_is_the_completion_where_a_model_is_free(run, tmp_path):
    assert run(tmp_path / "out/x.parquet", "--max_tokens=8")[0] == 0
    for row in table_of(tmp_path / "out").to_pylist():
        if row["text"] is not None:
            assert row["tool_calls"] == []
            assert row["completion"]
            assert row["finish_reason"] in ("stop", "length")


def test_a_dry_run_shows_the_declarations(run, tmp_path):
    code, stdout, _ = run(tmp_path / "out/x.parquet", "--dry_run", "--max_tokens=8")
    assert code == 0
    assert "declaration:book{description:" in stdout


REFUSED = {
    "no file": (None, [], "--tools .*: expected a text file that can be read"),
    "no JSON": ("[", [], "--tools .*: expected a list of functions in JSON, got an error"),
    "a name twice": ('[{"name": "f", "name": "g"}]', [], "the name 'name' is twice in an object"),
    "no list": ("{}", [], "--tools .*: expected a list of at least one function"),
    "unknown key": ('[{"name": "f", "params": {}}]', [], "got 'params'; did you mean parameters?"),
    "no room": ([END], ["--tool_choice=required", "--max_tokens=3"], "max_tokens: expected at le"),
    "not known": (
        [{"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}],
        ["--tool_choice=required"],
        "tools: parameters of f: #/properties/a/not: expected a keyword",
    ),
    "structured": ([END], ["--choices=a,b"], "structured: expected none beside tools"),
    "raw": ([END], ["--prompt_format=raw"], "got a prompt without a chat template"),
    "other template": ([END], ["--chat_template=gemma"], "got one that ignores them"),
}


@pytest.mark.parametrize(("content", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_is_refused_before_the_job(run, tmp_path, content, flags, message):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    code, stdout, stderr = run(tmp_path / "out/x.parquet", *flags, tools=path)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert re.search(message, stderr), stderr
    assert not (tmp_path / "out").exists()


def test_a_model_without_calls_is_refused(run, tmp_path, tiny_gemma3):
    code, _, stderr = run(tmp_path / "out/x.parquet", model=tiny_gemma3.artifact.path)
    assert code == 2
    assert "tools: expected a chat with a model that calls functions" in stderr
