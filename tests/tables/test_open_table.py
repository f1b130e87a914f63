"""Reading tables: what is there is found before the job, and every row of it is read once."""

import itertools
import json

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystems import FileSystems
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.batches import RecordBatchCoder
from beam_gemma.errors import OptionsError
from beam_gemma.tables import json_lines, jsonl_source
from beam_gemma.tables import source as table_source
from beam_gemma.tables.open_table import ReadTable, open_source
from tests.doubles.fake_models import local_pipeline
from tests.doubles.tables import (
    RICH,
    assert_same_schema,
    keys_of,
    rich_table,
    text_of,
    write_parquet,
)

FOUND = []


@pytest.fixture
def folder(tmp_path):
    """Three Parquet files of 250, 0 and 130 rows."""
    write_parquet(tmp_path / "a.parquet", rich_table(range(250)))
    write_parquet(tmp_path / "b.parquet", rich_table([]))
    write_parquet(tmp_path / "c.parquet", rich_table(range(250, 380)))
    return tmp_path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(source, *flags):
    """Return all batches that a pipeline reads, in the order of their positions."""
    FOUND.clear()
    with local_pipeline(*flags) as pipeline:
        _ = pipeline | ReadTable(source) | beam.Map(keep)
    located = sorted(FOUND, key=lambda found: found[0])
    sizes = [batch.num_rows for _, batch in located]
    assert [first for first, _ in located] == list(itertools.accumulate(sizes, initial=0))[:-1]
    return [batch for _, batch in located]


def keep(located):
    FOUND.append(located)


@pytest.mark.parametrize("name", ["", "/", "/*.parquet", "/[a-c].parquet"])
def test_parquet_uris(folder, name):
    source = open_source(f"{folder}{name}")
    assert [path.rpartition("/")[2] for path in source.files] == [
        "a.parquet",
        "b.parquet",
        "c.parquet",
    ]
    assert source.num_rows == 380
    assert source.schema.equals(RICH, check_metadata=False)


def test_parquet_rows_and_types_are_read_as_they_are(folder):
    source = open_source(str(folder))
    assert_same_schema(source.schema, RICH)
    batches = read(source)
    assert keys_of(batches) == list(range(380))
    table = pa.Table.from_batches(batches)
    assert_same_schema(table.schema, RICH.remove_metadata())
    assert text_of(table) == text_of(rich_table(range(380)))


def test_wide_rows_are_read_a_few_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(table_source, "BATCH_BYTES", 2000)
    batches = read(open_source(str(folder)))
    assert keys_of(batches) == list(range(380))
    assert max(batch.num_rows for batch in batches) < 40
    monkeypatch.setattr(table_source, "BATCH_ROWS", 1)
    assert len(read(open_source(str(folder), limit=101))) == 101


def test_columns_that_are_not_asked_for_are_not_read(folder):
    source = open_source(str(folder), columns=("nested", "key"))
    assert source.schema.names == ["nested", "key"]
    assert keys_of(read(source)) == list(range(380))
    assert keys_of(source.head(7)) == list(range(7))
    write_lines(folder / "a.jsonl", [{"a": i, "key": i} for i in range(5)])
    source = open_source(f"{folder}/a.jsonl", columns=("key",))
    assert source.schema == pa.schema([("key", pa.int64())])
    assert keys_of(read(source)) == list(range(5))
    with pytest.raises(OptionsError, match="'kye'; did you mean key"):
        open_source(str(folder), columns=("kye",))


def test_json_lines_are_read_in_chunks_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", 100)
    write_lines(tmp_path / "a.jsonl", [{"key": i, "text": "ü" * (i % 50)} for i in range(100)])
    write_lines(tmp_path / "b.jsonl", [{"key": i, "text": ""} for i in range(100, 120)])
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("\n" * 150 + '{"key": 120, "text": "end"}')
    source = open_source(f"{tmp_path}/*.jsonl")
    assert len(source.parts()) > 20
    assert keys_of(read(source)) == list(range(121))
    assert keys_of(read(open_source(f"{tmp_path}/*.jsonl", limit=105))) == list(range(105))


def test_json_lines_are_read_with_types_of_all_files(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"key": i, "day": "2020-01-01"} for i in range(40)])
    write_lines(tmp_path / "b.jsonl", [{"key": 40, "extra": [1]}, {"key": 41}])
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('\n  \n{"key": 42}')
    source = open_source(f"{tmp_path}/*.jsonl")
    assert source.num_rows == 43
    assert source.schema == pa.schema(
        [("key", pa.int64()), ("day", pa.string()), ("extra", pa.list_(pa.int64()))]
    )
    batches = read(source)
    assert all(batch.schema.equals(source.schema) for batch in batches)
    assert sorted(keys_of(batches)) == [*range(43)]


def test_empty_inputs(tmp_path):
    write_parquet(tmp_path / "none.parquet", rich_table([]))
    (tmp_path / "none.jsonl").write_text("")
    for name in ("none.parquet", "none.jsonl"):
        source = open_source(str(tmp_path / name))
        assert source.num_rows == 0
        assert read(source) == []


@pytest.mark.parametrize("limit", [1, 16, 100, 101, 250, 251, 380, 1000])
def test_limit_reads_the_first_rows_in_order(folder, limit):
    source = open_source(str(folder), limit=limit)
    assert source.num_rows == min(limit, 380)
    assert keys_of(source.head(10**6)) == list(range(min(limit, 380)))
    assert sorted(keys_of(read(source))) == list(range(min(limit, 380)))


def test_limit_of_json_lines(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"key": i} for i in range(5)])
    write_lines(tmp_path / "b.jsonl", [{"key": i} for i in range(5, 50)])
    source = open_source(f"{tmp_path}/*.jsonl", limit=30)
    assert keys_of(source.head(7)) == list(range(7))
    assert sorted(keys_of(read(source))) == list(range(30))


def test_a_dry_run_looks_at_lines_from_all_over_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl_source, "SAMPLE_ROWS", 20)
    for i in range(4):
        write_lines(tmp_path / f"{i}.jsonl", [{"key": 25 * i + n + 100} for n in range(25)])
    uri = f"{tmp_path}/*.jsonl"
    source = open_source(uri, dry_run=True)
    assert source.num_rows is None
    assert source.expected_rows == 100
    assert source.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    pairs = [key + i for key in range(100, 200, 10) for i in range(2)]
    assert keys_of(source.sample(100)) == pairs
    # What is asked for is looked at, and what is known is said.
    assert open_source(uri, limit=21, dry_run=True).num_rows == 21
    with (tmp_path / "1.jsonl").open("a") as file:
        file.write("no JSON\n")
    open_source(uri, dry_run=True)
    with pytest.raises(OptionsError, match=r"1\.jsonl, line 26"):
        open_source(uri)


@given(
    lengths=st.lists(st.lists(st.integers(0, 40), max_size=12), min_size=1, max_size=4),
    sample_rows=st.integers(1, 60),
)
@settings(max_examples=50)
def test_a_dry_run_looks_at_no_line_twice_and_at_all_of_a_short_table(
    lengths, sample_rows, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("lines")
    keys = itertools.count()
    for i, texts in enumerate(lengths):
        write_lines(folder / f"{i}.jsonl", [{"key": next(keys), "x": "ü" * n} for n in texts])
    num_rows = next(keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl_source, "SAMPLE_ROWS", sample_rows)
        source = open_source(f"{folder}/*.jsonl", dry_run=True)
    found = keys_of(source.sample(1000)) if num_rows else []
    assert found == sorted(set(found))
    if source.num_rows is not None:
        assert found == list(range(num_rows))
        assert (source.num_rows, source.expected_rows) == (num_rows, num_rows)
    assert len(found) >= min(num_rows, sample_rows // 10)


def test_a_malformed_line_is_named_where_a_dry_run_meets_it(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"key": n} for n in range(10)])
    path.write_text(path.read_text() + "no JSON\n")
    with pytest.raises(OptionsError, match=r"a\.jsonl, line 11: expected a JSON object"):
        open_source(str(path), dry_run=True)


def test_a_sample_of_parquet_is_from_row_groups_all_over(tmp_path):
    for i, rows in enumerate((range(300), range(300, 320), range(320, 1000))):
        write_parquet(tmp_path / f"{i}.parquet", rich_table(rows), rows_per_group=20)
    source = open_source(str(tmp_path))
    found = keys_of(source.sample(50))
    assert [key // 100 for key in found[::5]] == list(range(10))
    assert len(set(found)) == 50
    assert keys_of(source.sample(2000)) == list(range(1000))
    assert keys_of(open_source(str(tmp_path), limit=30).sample(10)) == [*range(5), *range(20, 25)]


def test_head_and_limit_read_only_what_they_need(folder, monkeypatch):
    opened, groups = [], []
    open_file, iter_batches = FileSystems.open, pq.ParquetFile.iter_batches

    def watch_open(path, *args, **kwargs):
        opened.append(path.rpartition("/")[2])
        return open_file(path, *args, **kwargs)

    def watch_groups(self, *args, row_groups, **kwargs):
        groups.append(row_groups)
        return iter_batches(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(FileSystems, "open", watch_open)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watch_groups)
    source = open_source(str(folder), limit=101)
    assert opened == ["a.parquet"]
    list(source.head(100))
    list(source.head(101))
    assert opened == ["a.parquet"] * 3
    assert groups == [[0], [0, 1]]
    read(source)
    assert groups[2:] == [[0, 1]]


def test_files_that_are_no_table_are_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", rich_table(range(3)))
    write_parquet(tmp_path / "b.parquet", rich_table(range(3)).drop_columns(["text"]))
    with pytest.raises(OptionsError, match=r"b\.parquet: .*another set of columns: text"):
        open_source(str(tmp_path))
    write_parquet(
        tmp_path / "b.parquet",
        rich_table(range(3)).set_column(1, "text", pa.array([1, 2, 3])),
    )
    with pytest.raises(OptionsError, match=r"b\.parquet: .*'text': int64 for string"):
        open_source(str(tmp_path))
    (tmp_path / "b.parquet").write_bytes(b"no table")
    with pytest.raises(OptionsError, match=r"b\.parquet: expected a Parquet file"):
        open_source(str(tmp_path))


def test_json_files_that_are_no_table_are_named(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"a": 1}])
    write_lines(tmp_path / "b.jsonl", [{"a": "x"}])
    match = r"b\.jsonl, line 1: column 'a': expected a number, as in the rows before it, got a text"
    with pytest.raises(OptionsError, match=match):
        open_source(f"{tmp_path}/*.jsonl")
    (tmp_path / "b.jsonl").write_text('{"a": 2}\n{"a":\n')
    with pytest.raises(OptionsError, match=r"b\.jsonl, line 2: expected a JSON object"):
        open_source(f"{tmp_path}/*.jsonl")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("none.parquet", "at least one file, got none"),
        ("none/", "at least one file, got none"),
        ("table.csv", r"end in \.parquet or \.jsonl"),
        ("*", r"end in \.parquet or \.jsonl"),
        ("x.jsonl/", "at least one file, got none"),
    ],
)
def test_inputs_that_are_not_there(tmp_path, name, match):
    with pytest.raises(OptionsError, match=match):
        open_source(f"{tmp_path}/{name}")


def test_unknown_file_system():
    with pytest.raises(OptionsError, match=r"nowhere://x\.parquet"):
        open_source("nowhere://x.parquet")


def test_coder_carries_a_slice_and_no_more():
    batch = rich_table(range(4000)).combine_chunks().to_batches()[0]
    coder = beam.coders.registry.get_coder(pa.RecordBatch)
    assert isinstance(coder, RecordBatchCoder)
    encoded = coder.encode(batch.slice(100, 16))
    assert len(encoded) < 10_000
    assert text_of(coder.decode(encoded)) == text_of(batch.slice(100, 16))
    assert coder.decode(encoded).schema.equals(RICH, check_metadata=True)
    assert coder.decode(coder.encode(batch.slice(0, 0))).num_rows == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), max_size=4), min_size=1, max_size=3), st.integers(1, 200)
)
def test_any_layout_of_files_has_the_same_first_rows(tmp_path_factory, layout, limit):
    folder = tmp_path_factory.mktemp("layout")
    keys = iter(range(1000))
    schema = pa.schema([("key", pa.int64())])
    for number, groups in enumerate(layout):
        with pq.ParquetWriter(folder / f"{number}.parquet", schema) as writer:
            for size in groups:
                rows = [{"key": next(keys)} for _ in range(size)]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    total = next(keys)
    source = open_source(str(folder), limit=limit)
    assert source.num_rows == min(limit, total)
    assert keys_of(source.head(limit)) == list(range(min(limit, total)))
