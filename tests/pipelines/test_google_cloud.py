"""From BigQuery to BigQuery, and from gs:// to gs:// with the model there too, by command line."""

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystems import FileSystems
from google.cloud import bigquery

from beam_gemma.cli import run as cli
from beam_gemma.storage import match_files
from pipelines import classify, embed, generate
from tests.doubles.workers_path import NO_TORCH

pytestmark = pytest.mark.timeout(600)
NUM_ROWS = 50
PROCESSES = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
NAMES = (f"job_{i}" for i in itertools.count())


@pytest.fixture(scope="module")
def table(gcp):
    """A table of short texts; one row has none, and two have the same."""
    name = "reviews"
    gcp.fill(
        name,
        "x AS id, "
        "CASE WHEN x = 7 THEN NULL WHEN x = 8 THEN 'text 9' ELSE CONCAT('text ', x) END AS text, "
        "[x, 2 * x] AS numbers, STRUCT(x AS a, DATE '2024-02-29' AS day) AS nested, "
        "TIMESTAMP '2024-02-29T01:02:03Z' AS at",
        NUM_ROWS,
    )
    return name


@pytest.fixture
def cloud_model(gcp, all_tasks_model, tmp_path, monkeypatch):
    """The model's folder on Cloud Storage; jobs find no copy that another test has fetched."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = f"{gcp.bucket}/{next(NAMES)}"
    gcp.upload(Path(all_tasks_model), folder)
    return folder


@pytest.fixture
def without_torch(monkeypatch):
    """Workers find no torch, as in their images; Beam takes seconds to import it where it is."""
    monkeypatch.setenv("PYTHONPATH", str(NO_TORCH), prepend=os.pathsep)


@pytest.fixture
def run(gcp, monkeypatch, capsys):
    """Run a command line in this process; return exit code, output and errors."""

    def run_with(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__name__, *gcp.flags, *map(str, flags)])
        code = cli.exit_code(module.main)
        return code, *capsys.readouterr()

    return run_with


def rows_of(name):
    rows = bigquery.Client().query_and_wait(f"SELECT * FROM dataset.{name} ORDER BY id")
    return [dict(row) for row in rows]


TASKS = {
    "generate": (generate, "completion", ["--prompt=say {text}", "--max_tokens=4", "--ignore_eos"]),
    "classify": (classify, "label", ["--prompt={text}: ", "--labels=a,b"]),
    "embed": (embed, "embedding", ["--text_column=text"]),
}


def check_rows(before, after, column):
    """Check that each row came out once, as it was, with its result or an error."""
    assert [{name: row[name] for name in before[0]} for row in after] == before
    for row in after:
        assert (row["error"] is None) == (row["text"] is not None)
        assert (row[column] not in (None, [])) == (row["text"] is not None)


def check_table(gcp, before, name, column, label):
    """Check what a job left: a table, its description and label, and no file."""
    check_rows(rows_of(before), rows_of(name), column)
    written = bigquery.Client().get_table(f"dataset.{name}")
    assert json.loads(written.description)["rows"] == NUM_ROWS
    assert written.labels[label]
    assert match_files(f"{gcp.bucket}/tmp/beam-gemma/*{name}*/**") == []
    assert {f.name: f.mode for f in written.schema}["numbers"] == "REPEATED"


@pytest.mark.parametrize("task", TASKS)
def test_a_table_becomes_a_table(run, gcp, table, all_tasks_model, task):
    module, column, flags = TASKS[task]
    name = next(NAMES)
    code, stdout, stderr = run(
        module, *flags, f"--model={all_tasks_model}", f"--input={gcp.table(table)}",
        f"--output={gcp.table(name)}",
    )  # fmt: skip
    assert (code, stderr) == (0, ""), stderr
    assert "= ok 49 + failed 1 = written 50 rows" in stdout
    check_table(gcp, table, name, column, f"beam_gemma_{task}")


@pytest.mark.usefixtures("without_torch")
def test_processes_fetch_the_model_and_write_a_table(run, gcp, table, cloud_model):
    name = next(NAMES)
    code, stdout, stderr = run(
        generate, *TASKS["generate"][2], *PROCESSES, f"--model={cloud_model}",
        f"--input={gcp.table(table)}", f"--output={gcp.table(name)}",
    )  # fmt: skip
    assert (code, stderr) == (0, ""), stderr
    assert "= ok 49 + failed 1 = written 50 rows" in stdout
    check_table(gcp, table, name, "completion", "beam_gemma_generate")


def test_extracted_values_are_records(run, gcp, table, all_tasks_model):
    """By a schema that lies on Cloud Storage."""
    schema = {
        "type": "object",
        "properties": {
            "day": {"type": "string", "format": "date"},
            "parts": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"name": {"enum": ["a", "b"]}, "size": {"type": "integer"}},
                    "required": ["name"],
                },
                "minItems": 1,
                "maxItems": 2,
            },
        },
        "required": ["day", "parts"],
    }
    name = next(NAMES)
    with FileSystems.create(f"{gcp.bucket}/{name}.json") as stream:
        stream.write(json.dumps(schema).encode())
    code, stdout, stderr = run(
        generate, f"--model={all_tasks_model}", f"--input={gcp.table(table)}",
        f"--output={gcp.table(name)}", "--prompt_column=text", "--limit=9", "--completion",
        f"--json_schema={gcp.bucket}/{name}.json", "--max_tokens=100", "--temperature=3",
    )  # fmt: skip
    assert (code, stderr) == (0, ""), stderr
    assert "= ok 8 + failed 1 = written 9 rows" in stdout
    columns = {f.name: f for f in bigquery.Client().get_table(f"dataset.{name}").schema}
    parts = columns["extracted"].fields[1]
    assert [columns["extracted"].field_type, parts.field_type, parts.mode] == [
        "RECORD", "RECORD", "REPEATED"
    ]  # fmt: skip
    assert [field.field_type for field in parts.fields] == ["STRING", "INTEGER"]
    without_size = set()
    for row in rows_of(name):
        if row["text"] is None:
            assert row["extracted"] is None
            continue
        values = json.loads(row["completion"])
        assert row["extracted"]["day"].isoformat() == values["day"]
        assert row["extracted"]["parts"] == [{"size": None, **part} for part in values["parts"]]
        without_size |= {"size" not in part for part in values["parts"]}
    assert without_size == {True, False}


def test_files_and_the_model_are_on_cloud_storage(run, gcp, cloud_model):
    folder = f"{gcp.bucket}/{next(NAMES)}"
    rows = pa.table({"id": range(NUM_ROWS), "text": [f"text {i}" for i in range(NUM_ROWS)]})
    with FileSystems.create(f"{folder}/in.parquet") as stream:
        pq.write_table(rows, stream)
    code, stdout, stderr = run(
        generate, *TASKS["generate"][2], f"--model={cloud_model}",
        f"--input={folder}/in.parquet", f"--output={folder}/out/x.parquet", "--num_shards=3",
    )  # fmt: skip
    assert (code, stderr) == (0, ""), stderr
    assert "= ok 50 + failed 0 = written 50 rows" in stdout
    shards = [path for path in match_files(f"{folder}/out/**") if path.endswith(".parquet")]
    assert [path.rpartition("/")[2] for path in shards] == [
        f"x-{i:05}-of-00003.parquet" for i in range(3)
    ]
    written = pa.concat_tables(pq.read_table(FileSystems.open(path)) for path in shards)
    assert written.select(["id", "text"]).equals(rows)
    assert written["completion"].null_count == 0
    assert len(match_files(f"{folder}/out/**")) == 4  # with the record of the run


def test_dry_runs_and_limits_read_little(run, gcp, table, all_tasks_model):
    shared = [*TASKS["generate"][2], f"--model={all_tasks_model}"]
    name = gcp.table(next(NAMES))
    sql = f"SELECT id, text FROM dataset.{table}"
    before = bigquery.Client().get_table(f"dataset.{table}").num_rows
    code, stdout, _ = run(
        generate, *shared, f"--input={gcp.table(table)}", f"--output={name}", "--dry_run"
    )
    assert code == 0
    assert stdout.startswith(f"rows: {before}, of which {before} sampled\n")
    code, stdout, _ = run(generate, *shared, f"--query={sql}", f"--output={name}", "--dry_run")
    assert code == 0
    assert "bytes to scan, with columns id int64, text string, of which 0 sampled" in stdout
    code, stdout, _ = run(
        generate, *shared, f"--query={sql} WHERE id < 30", f"--output={name}", "--limit=3"
    )
    assert (code, stdout.partition(";")[0]) == (0, "read 3 = ok 3 + failed 0 = written 3 rows")


def test_exported_rows_are_appended_or_replace_others(run, gcp, table, all_tasks_model):
    name = next(NAMES)
    flags = [
        *TASKS["generate"][2], f"--model={all_tasks_model}",
        f"--output={gcp.table(name)}",
        f"--input={gcp.table(table)}", "--read_method=EXPORT", "--columns=id,text",
    ]  # fmt: skip
    before = match_files(f"{gcp.bucket}/tmp/**")
    assert run(generate, *flags)[0] == 0
    assert match_files(f"{gcp.bucket}/tmp/**") == before  # the export is gone
    first = rows_of(name)
    code, _, stderr = run(generate, *flags)
    assert code == cli.USAGE
    assert stderr.endswith("choose another name or pass --append or --overwrite\n")
    assert run(generate, *flags, "--append")[0] == 0
    assert len(rows_of(name)) == 2 * NUM_ROWS
    assert run(generate, *flags, "--overwrite")[0] == 0
    assert rows_of(name) == first


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--output=/tmp/x.parquet", "--append"], "--append: expected a table of BigQuery"),
        (["--output={table}", "--append", "--overwrite"], "--append: expected no --overwrite"),
        (["--output={table}", "--temp_location=/tmp"], "--temp_location: expected a folder on gs"),
        (["--output={table}", "--query=SELECT 1"], "not allowed with argument --input"),
        (["--output=/tmp/x.parquet", "--read_method=EXPORT", "--input=x"], "a table of BigQuery"),
        (["--output={input}", "--overwrite"], "expected another table than that of --input"),
    ],
)
def test_flags_that_do_not_fit_are_one_sentence(run, gcp, table, all_tasks_model, flags, sentence):
    names = {"table": gcp.table(next(NAMES)), "input": gcp.table(table)}
    code, _, stderr = run(
        generate, f"--model={all_tasks_model}", "--prompt={text}",
        f"--input={gcp.table(table)}", *(flag.format(**names) for flag in flags),
    )  # fmt: skip
    assert code == cli.USAGE
    assert sentence in stderr


@pytest.mark.parametrize("source", ["--input={table}", "--query=SELECT 1"])
def test_examples_for_prompts_come_from_files(run, gcp, table, all_tasks_model, source):
    code, _, stderr = run(
        classify, f"--model={all_tasks_model}", *TASKS["classify"][2],
        source.format(table=gcp.table(table)), f"--output={gcp.table(next(NAMES))}",
        "--num_fewshot=2", "--label_column=text",
    )  # fmt: skip
    assert code == cli.USAGE
    assert "--fewshot_file: expected a file of examples" in stderr
