"""One pass, several jobs: each row has the results that every job by itself would give it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.errors import OptionsError
from beam_gemma.inference.handlers import (
    GemmaClassifyModelHandler,
    GemmaEmbedModelHandler,
    GemmaGenerateModelHandler,
)
from beam_gemma.tables.open_table import ReadTable
from examples.one_pass import BODY, GIST, SUBJECT, main

ROWS = [
    {"id": i, "title": f"t{i % 3}", "body": None if i == 4 else "cat " * (i % 4 + 1)}
    for i in range(12)
]


@pytest.fixture
def model(all_tasks_model):
    return all_tasks_model


def alone(handler):
    """Return what a job by itself says of each row."""
    found = [p.inference for p in handler.run_inference(ROWS, handler.load_model())]
    return pa.Table.from_pylist(found, schema=handler.settings.result_schema)


def test_three_jobs_in_one_pass(model, tmp_path, monkeypatch):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "in.parquet", row_group_size=5)
    reads = []
    expand = ReadTable.expand
    monkeypatch.setattr(ReadTable, "expand", lambda *args: reads.append(1) or expand(*args))
    flags = [f"--model={model}", f"--input={tmp_path}/in.parquet"]
    main([*flags, f"--output={tmp_path}/out.parquet"])
    assert reads == [1]
    (file,) = tmp_path.glob("out-*.parquet")
    table = pq.read_table(file)
    assert table.select(["id", "title", "body"]).to_pylist() == ROWS
    for name, handler in {
        "gist": GemmaGenerateModelHandler(model, GIST, large_model=False),
        "subject": GemmaClassifyModelHandler(model, SUBJECT, large_model=False),
        "embedding": GemmaEmbedModelHandler(model, BODY, large_model=False),
    }.items():
        wanted = alone(handler)
        for column in wanted.schema.names:
            found = table.column(f"{name}_{column}").to_pylist()
            assert found == wanted.column(column).to_pylist(), (name, column)
    record = json.loads(next(tmp_path.glob("*out*.run.json")).read_text())
    assert [task["task"] for task in record["tasks"]] == ["generate", "classify", "embed"]
    assert [task["results"]["failed"] for task in record["tasks"]] == [1, 1, 1]
    assert [task["prefix"] for task in record["tasks"]] == ["gist_", "subject_", "embedding_"]
    # Each title is with each body once; some bodies are alike, and one row has none.
    assert [task["duplicate_rows"] for task in record["tasks"]] == [0, 7, 7]
    assert all(line["prompt_tokens"][-1] > 0 for line in record["timelines"])
    with pytest.raises(OptionsError, match="expected no earlier output"):
        main([*flags, f"--output={tmp_path}/out.parquet"])


def test_a_table_without_the_columns_is_refused(model, tmp_path):
    pq.write_table(pa.table({"title": ["a"]}), tmp_path / "in.parquet")
    with pytest.raises(OptionsError, match="'body': expected in the table"):
        main(
            [f"--model={model}", f"--input={tmp_path}/in.parquet", f"--output={tmp_path}/o.parquet"]
        )
