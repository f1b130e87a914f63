"""Writing tables: every row, its exact types, and files of a good shape."""

import json

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma import sinks
from beam_gemma.errors import OptionsError
from beam_gemma.records import open_source
from beam_gemma.sinks import Sink, WriteRecords, open_sink
from tests.fake_models import local_pipeline
from tests.tables import RICH, assert_same_schema, rich_table, text_of

pytestmark = pytest.mark.timeout(60)


def write(sink, table, *, rows_per_batch=16):
    batches = table.to_batches(max_chunksize=rows_per_batch)
    with local_pipeline() as pipeline:
        rows = pipeline | beam.Create(batches).with_output_types(pa.RecordBatch)
        _ = rows | beam.Reshuffle() | WriteRecords(sink, table.schema)


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_parquet_round_trip(tmp_path, num_shards):
    table = rich_table(range(200))
    sink = open_sink(f"{tmp_path}/new/out.parquet", num_shards=num_shards)
    write(sink, table)
    names = [path.rpartition("/")[2] for path in sink.shards()]
    count = num_shards or 1
    assert names == [f"out-{i:05}-of-{count:05}.parquet" for i in range(count)]
    assert [p.name for p in (tmp_path / "new").iterdir() if "temp" in p.name] == []
    back = pq.read_table(tmp_path / "new")
    assert_same_schema(back.schema, RICH)
    assert text_of(back) == text_of(table)


def test_batches_become_row_groups(tmp_path, monkeypatch):
    table = rich_table(range(200)).select(["key", "raw"])
    write(open_sink(f"{tmp_path}/one.parquet"), table)
    assert pq.ParquetFile(tmp_path / "one-00000-of-00001.parquet").num_row_groups == 1
    monkeypatch.setattr(sinks, "ROW_GROUP_BYTES", table.nbytes // 4)
    write(open_sink(f"{tmp_path}/many.parquet"), table)
    file = pq.ParquetFile(tmp_path / "many-00000-of-00001.parquet")
    assert 3 <= file.num_row_groups <= 5
    assert sorted(file.read()["key"].to_pylist()) == list(range(200))


def test_dictionaries_of_batches_may_differ(tmp_path):
    kind = pa.dictionary(pa.int8(), pa.string())
    batches = [pa.array([word]).dictionary_encode().cast(kind) for word in ("a", "b", "c")]
    table = pa.table({"label": pa.chunked_array(batches)})
    write(open_sink(f"{tmp_path}/out.parquet"), table)
    back = pq.read_table(tmp_path)
    assert back.schema.field("label").type == kind
    assert sorted(back["label"].to_pylist()) == ["a", "b", "c"]


@pytest.mark.parametrize("num_shards", [0, 2])
def test_empty_table_has_files_with_its_schema(tmp_path, num_shards):
    write(open_sink(f"{tmp_path}/out.parquet", num_shards=num_shards), rich_table([]))
    back = pq.read_table(tmp_path)
    assert back.num_rows == 0
    assert_same_schema(back.schema, RICH)
    write(open_sink(f"{tmp_path}/out.jsonl", num_shards=num_shards), rich_table([]))
    assert [p.read_text() for p in tmp_path.glob("*.jsonl")] == [""] * (num_shards or 1)


def test_json_lines(tmp_path):
    write(open_sink(f"{tmp_path}/out.jsonl"), rich_table(range(50)))
    lines = (tmp_path / "out-00000-of-00001.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: row["key"])
    assert [row["key"] for row in rows] == list(range(50))
    assert list(rows[0]) == RICH.names
    assert rows[8]["money"] == "0.5000"
    assert rows[8]["at"] == "2020-01-01T09:00:00+01:00"
    assert rows[8]["vector"] == [8.0, None]
    assert rows[8]["large"] == "ü"
    assert open_source(f"{tmp_path}/out-00000-of-00001.jsonl").num_rows == 50


def test_rows_written_are_counted(tmp_path):
    pipeline = local_pipeline()
    batches = rich_table(range(50)).to_batches(max_chunksize=16)
    rows = pipeline | beam.Create(batches).with_output_types(pa.RecordBatch)
    _ = rows | WriteRecords(open_sink(f"{tmp_path}/out.parquet"), RICH)
    metrics = pipeline.run().metrics().query(beam.metrics.MetricsFilter().with_name("rows_written"))
    assert [metric.result for metric in metrics["counters"]] == [50]


def test_only_shards_of_this_output_are_found_and_deleted(tmp_path):
    mine = ["out-00000-of-00002.parquet", "out-00001-of-00002.parquet"]
    others = [
        "out-00000-of-00002.jsonl",
        "out-more-00000-of-00001.parquet",
        "out-0-of-1.parquet",
        "out.parquet",
    ]
    for name in (*mine, *others):
        (tmp_path / name).touch()
    sink = open_sink(f"{tmp_path}/out.parquet")
    assert [path.rpartition("/")[2] for path in sink.shards()] == mine
    sink.delete()
    assert sink.shards() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    sink.delete()


def test_output_names():
    assert open_sink("gs://b/dir/x.y.jsonl") == Sink(prefix="gs://b/dir/x.y", format="jsonl")
    for name in ("out", "out.csv", "dir/.parquet", "dir/", ".parquet"):
        with pytest.raises(OptionsError, match=r"ends in \.parquet or \.jsonl"):
            open_sink(name)
