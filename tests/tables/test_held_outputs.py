"""Outputs hold what was read: columns that cannot be are refused, JSON text has its type."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.errors import OptionsError
from beam_gemma.tables.file_sink import open_sink, stage
from beam_gemma.tables.open_table import open_source

ROWS = [
    {"n": 5, "o": {"k": 1}, "l": [1, 2.5], "big": 2**64, "e": {}},
    {"n": 2.5, "o": {"k": 1, "z": None}, "l": [], "big": -1, "e": None},
]


def written(source, uri):
    """Write a table as one staged file and return its path."""
    sink = open_sink(str(uri))
    sink.check(source.schema)
    path, file = stage(sink, 0, source.schema)
    for batch in source.head(100):
        file.write(batch)
    file.close()
    return path


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return open_source(str(path))


def test_json_lines_are_written_as_they_were_read(source, tmp_path):
    path = Path(written(source, tmp_path / "x.jsonl"))
    assert path.read_text() == (tmp_path / "in.jsonl").read_text()


def test_parquet_of_json_lines_has_types(source, tmp_path):
    table = pq.read_table(written(source, tmp_path / "x.parquet"), partitioning=None)
    assert table.schema == pa.schema(
        {
            "n": pa.float64(),
            "o": pa.string(),
            "l": pa.list_(pa.float64()),
            "big": pa.string(),
            "e": pa.string(),
        }
    )
    assert table.to_pylist() == [
        {"n": 5.0, "o": '{"k": 1}', "l": [1.0, 2.5], "big": str(2**64), "e": "{}"},
        {"n": 2.5, "o": '{"k": 1, "z": null}', "l": [], "big": "-1", "e": None},
    ]


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_a_type_that_no_file_holds_is_refused_before_the_job(name):
    schema = pa.schema({"c": pa.month_day_nano_interval()})
    with pytest.raises(OptionsError, match="column 'c': expected a type that"):
        open_sink(name).check(schema)


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?"])
def test_names_with_signs_of_patterns(name, source, tmp_path):
    sink = open_sink(f"{tmp_path}/{name}/{name}.parquet")
    path = written(source, sink.uri)
    assert sink.is_unfinished()
    final = f"{sink.prefix}-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path, partitioning=None), final)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a1-00000-of-00001.parquet")
    assert sink.earlier() == [final]
    sink.clear()
    assert not sink.is_unfinished()
    assert sink.earlier() == [final]


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_sink("~/x.parquet").uri == f"{tmp_path}/x.parquet"
