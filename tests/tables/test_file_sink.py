"""Files of a table: exact types, row groups of a good shape, all renamed or none."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.errors import OptionsError
from beam_gemma.tables import file_sink
from beam_gemma.tables.file_sink import check_writable, open_sink, stage
from beam_gemma.tables.open_table import open_source
from tests.doubles.leases import JOB, hold
from tests.doubles.tables import RICH, assert_same_schema, rich_table, text_of


def staged(sink, *tables):
    """Stage one shard for each table; return their names."""
    paths = []
    for shard, table in enumerate(tables):
        path, file = stage(sink, shard, table.schema)
        for batch in table.to_batches(max_chunksize=16):
            file.write(batch)
        file.close()
        paths.append(path)
    return paths


def publish(sink, *tables, job=JOB, **record):
    """Publish tables as a job does, from its lease to its end."""
    hold(sink, job)
    sink.publish(staged(sink, *tables), {"job": job, **record})
    sink.clear()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("num_shards", [1, 3])
def test_parquet_round_trip(tmp_path, num_shards):
    table = rich_table(range(200))
    sink = open_sink(f"{tmp_path}/new/out.parquet")
    hold(sink)
    step = -(-200 // num_shards)
    paths = staged(sink, *(table.slice(i, step) for i in range(0, 200, step)))
    assert names(tmp_path / "new") == ["_out.parquet.work"]
    sink.publish(paths, {"job": JOB, "rows": 200})
    sink.clear()
    shards = [f"out-{i:05}-of-{num_shards:05}.parquet" for i in range(num_shards)]
    assert names(tmp_path / "new") == ["_out.run.json", *shards]
    assert json.loads((tmp_path / "new/_out.run.json").read_text()) == {"job": JOB, "rows": 200}
    back = pa.concat_tables(map(pq.read_table, sink.earlier()))
    assert_same_schema(back.schema, RICH)
    assert text_of(back) == text_of(table)
    assert back["key"].to_pylist() == list(range(200))


def test_batches_become_row_groups(tmp_path, monkeypatch):
    table = rich_table(range(200)).select(["key", "raw"])
    sink = open_sink(f"{tmp_path}/out.parquet")
    (one,) = staged(sink, table)
    assert pq.ParquetFile(one).num_row_groups == 1
    monkeypatch.setattr(file_sink, "ROW_GROUP_BYTES", table.nbytes // 4)
    (many,) = staged(sink, table)
    assert 3 <= pq.ParquetFile(many).num_row_groups <= 5
    assert pq.read_table(many)["key"].to_pylist() == list(range(200))


def test_dictionaries_of_batches_may_differ(tmp_path):
    kind = pa.dictionary(pa.int8(), pa.string())
    batches = [pa.array([word]).dictionary_encode().cast(kind) for word in ("a", "b", "c")]
    (path,) = staged(
        open_sink(f"{tmp_path}/out.parquet"), pa.table({"label": pa.chunked_array(batches)})
    )
    back = pq.read_table(path)
    assert back.schema.field("label").type == kind
    assert back["label"].to_pylist() == ["a", "b", "c"]


def test_json_lines(tmp_path):
    sink = open_sink(f"{tmp_path}/out.jsonl")
    publish(sink, rich_table(range(50)))
    lines = (tmp_path / "out-00000-of-00001.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    assert [row["key"] for row in rows] == list(range(50))
    assert list(rows[0]) == RICH.names
    assert rows[8]["money"] == "0.5000"
    assert rows[8]["at"] == "2020-01-01T09:00:00+01:00"
    assert rows[8]["vector"] == [8.0, None]
    assert rows[8]["large"] == "ü"
    assert open_source(f"{tmp_path}/out-00000-of-00001.jsonl").num_rows == 50


def test_a_new_output_takes_the_place_of_the_old(tmp_path):
    table = rich_table(range(4))
    sink = open_sink(f"{tmp_path}/out.parquet")
    others = ["out-00000-of-00002.jsonl", "out-more-00000-of-00001.parquet", "out-0-of-1.parquet"]
    for name in others:
        (tmp_path / name).touch()
    assert sink.earlier() == []
    publish(sink, table, table, run=1)
    assert sink.earlier()[0] == f"{tmp_path}/out-00000-of-00002.parquet"
    publish(sink, table.slice(1), job="k", run=2)
    assert names(tmp_path) == sorted([*others, "out-00000-of-00001.parquet", "_out.run.json"])
    assert json.loads((tmp_path / "_out.run.json").read_text()) == {"job": "k", "run": 2}
    assert pq.read_table(sink.earlier()[0]).num_rows == 3
    sink.clear()


def test_a_second_call_finds_what_the_first_has_done(tmp_path):
    table = rich_table(range(4))
    sink = open_sink(f"{tmp_path}/out.parquet")
    hold(sink)
    paths = staged(sink, table, table)
    sink.publish(paths, {"job": JOB})
    sink.publish(paths, {"job": JOB})
    assert len(sink.earlier()) == 2
    sink.clear()
    sink.publish(paths, {"job": JOB})  # after a call whose end Beam has not heard of
    assert names(tmp_path) == ["_out.run.json", *(f"out-{i:05}-of-00002.parquet" for i in (0, 1))]


def test_output_names():
    sink = open_sink("gs://b/dir/x.y.jsonl")
    assert (sink.prefix, sink.format) == ("gs://b/dir/x.y", "jsonl")
    assert sink.work == "gs://b/dir/_x.y.jsonl.work"
    for name in ("out", "out.csv", "dir/.parquet", "dir/", ".parquet"):
        with pytest.raises(OptionsError, match=r"ends in \.parquet or \.jsonl"):
            open_sink(name)


def test_a_folder_that_another_thread_makes_first_is_as_good(tmp_path, monkeypatch):
    exists = iter([False, True])
    monkeypatch.setattr(file_sink.FileSystems, "exists", lambda _: next(exists))
    (tmp_path / "staged").mkdir()

    file_sink.create(f"{tmp_path}/staged/file").close()

    assert (tmp_path / "staged/file").is_file()


def test_names_that_no_file_can_have(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.html").mkdir()
    for name in ("file/page.html", "folder.html"):
        with pytest.raises(OptionsError, match=r"^--report: expected a file .* got .*\.html"):
            check_writable("--report", f"{tmp_path}/{name}")
    with pytest.raises(OptionsError, match=r"--report: .*nowhere://page\.html"):
        check_writable("--report", "nowhere://page.html")
    assert not Path("nowhere:").exists()
    (tmp_path / "page.html").write_text("an earlier one")
    check_writable("--report", f"{tmp_path}/page.html")
    check_writable("--report", f"{tmp_path}/new/page.html")
    assert (tmp_path / "page.html").read_text() == "an earlier one"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "file", "folder.html", "new", "page.html"
    ]  # fmt: skip
