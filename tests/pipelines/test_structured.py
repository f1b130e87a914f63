"""Typed extraction by command line with a tiny model: types in files, every way, every refusal."""

import datetime
import json
import sys

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.cli import run as cli
from pipelines.generate import main

SCHEMA = {
    "type": "object",
    "properties": {
        "day": {"type": "string", "format": "date"},
        "size": {"type": ["number", "null"], "minimum": 0, "maximum": 9},
        "by": {"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "boolean"}},
        "tags": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"enum": ["a", "b"]}, "sure": {"type": "boolean"}},
                "required": ["name"],
            },
            "minItems": 1,
            "maxItems": 2,
        },
    },
    "required": ["day", "size", "tags", "by"],
}
TYPES = {
    "day": pa.date32(),
    "size": pa.float64(),
    "by": pa.map_(pa.string(), pa.bool_()),
    "tags": pa.list_(pa.struct({"name": pa.string(), "sure": pa.bool_()})),
}
TEXTS = ["the cat", None, "in the hat", "a tent", "the cat", "then"]


@pytest.fixture
def run(tiny_gemma3, tmp_path, monkeypatch, capsys):
    """Run the command line in this process; return exit code, output and errors."""
    schema, rows = tmp_path / "schema.json", tmp_path / "in.parquet"
    schema.write_text(json.dumps(SCHEMA))
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), rows)

    def run_with(output, *flags):
        argv = ["generate", f"--model={tiny_gemma3.artifact.path}", f"--input={rows}",
                f"--output={output}", "--prompt_column=text", *map(str, flags)]  # fmt: skip
        monkeypatch.setattr(sys, "argv", argv)
        code = cli.exit_code(main)
        return code, *capsys.readouterr()

    return run_with


@pytest.fixture
def schema(tmp_path):
    return [f"--json_schema={tmp_path / 'schema.json'}", "--max_tokens=90"]


def table_of(folder):
    return pa.concat_tables(map(pq.read_table, sorted(folder.glob("x-*.parquet"))))


def test_values_are_typed_and_each_text_is_valid(run, schema, tmp_path):
    code, stdout, _ = run(tmp_path / "out/x.parquet", *schema, "--completion")
    assert code == 0
    assert stdout.startswith("read 6 = ok 5 + failed 1 = written 6 rows; ")
    table = table_of(tmp_path / "out")
    assert table.schema.names == [
        "id", "text", "extracted", "completion", "finish_reason", "num_prompt_tokens",
        "num_completion_tokens", "error",
    ]  # fmt: skip
    assert table.schema.field("extracted").type == pa.struct(TYPES.items())
    for row in table.to_pylist():
        if row["text"] is None:
            assert row["extracted"] is row["completion"] is None
            assert "text" in row["error"]
            continue
        assert (row["finish_reason"], row["error"]) == ("stop", None)
        values = json.loads(row["completion"])
        jsonschema.validate(values, SCHEMA)
        extracted = row["extracted"]
        assert extracted["day"] == datetime.date.fromisoformat(values["day"])
        assert extracted["size"] == values["size"]
        assert extracted["tags"] == [{"sure": None, **tag} for tag in values["tags"]]
    assert table["extracted"][0] == table["extracted"][4]


def test_properties_may_be_columns(run, schema, tmp_path):
    for name in ("x.parquet", "x.jsonl"):
        assert run(tmp_path / "flat" / name, *schema, "--flatten")[0] == 0
    assert run(tmp_path / "whole" / "x.parquet", *schema)[0] == 0
    flat, whole = table_of(tmp_path / "flat"), table_of(tmp_path / "whole")
    assert flat.schema.names[2:6] == list(TYPES)
    for name, kind in TYPES.items():
        assert flat.schema.field(name).type == kind
        assert flat[name].to_pylist() == [
            None if row is None else row[name] for row in whole["extracted"].to_pylist()
        ]
    (lines,) = (tmp_path / "flat").glob("x-*.jsonl")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["tags"] for row in rows] == flat["tags"].to_pylist()
    assert rows[0]["day"] == flat["day"][0].as_py().isoformat()


@pytest.mark.parametrize("flags", [["--choices=yes,no,not sure"], ["--regex=(yes|no){2}[1-9]?"]])
def test_choices_and_patterns(run, tmp_path, flags):
    assert run(tmp_path / "out/x.parquet", *flags, "--max_tokens=9")[0] == 0
    allowed = {"yes", "no", "not sure"}
    if flags[0].startswith("--regex"):
        pairs = [a + b for a in ("yes", "no") for b in ("yes", "no")]
        allowed = {pair + digit for pair in pairs for digit in ("", *"123456789")}
    completions = table_of(tmp_path / "out")["completion"].to_pylist()
    assert completions[1] is None
    assert {text for text in completions if text is not None} <= allowed


def test_a_row_is_worth_the_same_however_it_is_run(run, schema, tmp_path):
    flags = [*schema, "--temperature=20", "--seed=3", "--key_column=id", "--token_ids", "--logprob"]
    ways = {
        "plain": [],
        "alone": ["--max_num_seqs=1", "--max_num_batched_tokens=64"],
        "processes": ["--direct_running_mode=multi_processing", "--direct_num_workers=1"],
    }
    for name, more in ways.items():
        assert run(tmp_path / name / "x.parquet", *flags, *more)[0] == 0
    plain = table_of(tmp_path / "plain")
    assert plain["extracted"][0] != plain["extracted"][4]
    for name in ways:
        assert table_of(tmp_path / name).equals(plain)


def test_a_job_that_was_stopped_goes_on(run, schema, tmp_path):
    assert run(tmp_path / "whole/x.parquet", *schema)[0] == 0
    code, _, stderr = run(tmp_path / "out/x.parquet", *schema, "--max_cost_tokens=60",
                          "--max_num_seqs=1")  # fmt: skip
    assert (code, "--resume" in stderr) == (3, True)
    code, stdout, _ = run(tmp_path / "out/x.parquet", *schema, "--resume")
    assert code == 0
    assert " rows resumed" in stdout
    assert table_of(tmp_path / "out").equals(table_of(tmp_path / "whole"))


def test_the_record_tells_the_schema(run, schema, tmp_path):
    assert run(tmp_path / "out/x.parquet", *schema, "--flatten")[0] == 0
    (record,) = (tmp_path / "out").glob("*.run.json")
    (task,) = json.loads(record.read_text())["tasks"]
    assert task["settings"]["structured"] == {
        "json_schema": SCHEMA, "choices": [], "regex": None, "flatten": True, "completion": False
    }  # fmt: skip


BAD = {
    "bad schema": (
        {"properties": {"a": {"type": "integer", "minimun": 1}}, "type": "object"},
        [],
        "#/properties/a/minimun: expected",
    ),
    "column of the input": (
        {"properties": {"text": {"type": "string"}}, "type": "object"},
        ["--flatten"],
        "column 'text': expected a table without it, because a result has that name",
    ),
    "column of the results": (
        {"properties": {"error": {"type": "string"}}, "type": "object"},
        ["--flatten"],
        "flatten: expected properties that are not named as other results are, got 'error'",
    ),
    "no room": (
        SCHEMA, ["--max_tokens=20"], "the tokens of the shortest text that is valid, got 20"
    ),
    "no room to show": (
        SCHEMA, ["--max_tokens=20", "--dry_run"], "max_tokens: expected at least "
    ),
    "stop text": (SCHEMA, ["--stop=x"], "stop: expected none beside structured output"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "flags", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_asked_is_refused_before_the_job(run, tmp_path, content, flags, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    code, stdout, stderr = run(tmp_path / "out/x.parquet", f"--json_schema={path}", *flags)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert message in stderr
    assert not (tmp_path / "out").exists()
