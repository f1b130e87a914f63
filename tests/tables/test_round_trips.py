"""Round trips: any table, through every sink and source of files, comes back as it was."""

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.batches import RecordBatchCoder
from beam_gemma.tables.file_sink import open_sink, stage
from beam_gemma.tables.open_table import open_source
from tests.doubles.arrow_tables import JSON_LEAVES, tables


def written(table, uri, sizes):
    """Write a table as a shard, in batches of some sizes, and name it as a whole table."""
    path, file = stage(open_sink(uri), 0, table.schema)
    start = 0
    for size in [*sizes, table.num_rows]:
        for batch in table.slice(start, size).combine_chunks().to_batches():
            file.write(RecordBatchCoder().decode(RecordBatchCoder().encode(batch)))
        start += size
    file.close()
    Path(path).rename(uri)
    return uri


def read(uri, **options):
    """Return a table as workers read it."""
    source = open_source(uri, **options)
    parts = [part for whole in source.parts() for part in source.split(whole)]
    located = [each for part in parts for each in source.read(part)]
    position = 0
    for first, batch in located:
        assert first == position
        position += batch.num_rows
    assert position == source.num_rows
    batches = [batch for _, batch in located]
    return pa.Table.from_batches(batches, source.schema.remove_metadata())


SIZES = st.lists(st.integers(1, 5), max_size=3)


@settings(max_examples=60)
@given(tables(), SIZES)
def test_parquet(table, sizes):
    with tempfile.TemporaryDirectory() as folder:
        back = read(written(table, f"{folder}/t.parquet", sizes))
    assert back.schema == table.schema
    assert back.unify_dictionaries().equals(table.unify_dictionaries())


@settings(max_examples=60)
@given(tables(), st.integers(1, 4), st.data())
def test_parquet_of_others(table, rows_per_group, data):
    """Some columns of the first rows, from a file whose row groups are not ours."""
    columns = tuple(data.draw(st.permutations(table.schema.names)))[:2]
    limit = data.draw(st.integers(1, 15))
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, f"{folder}/t.parquet", row_group_size=rows_per_group)
        back = read(f"{folder}/t.parquet", columns=columns, limit=limit)
    wanted = table.select(columns).slice(0, limit)
    assert back.unify_dictionaries().equals(wanted.unify_dictionaries())


@settings(max_examples=60)
@given(tables(JSON_LEAVES, min_rows=1), SIZES)
def test_json_lines(table, sizes):
    """A column without a value has no type there; all others have their own."""
    with tempfile.TemporaryDirectory() as folder:
        back = read(written(table, f"{folder}/t.jsonl", sizes))
    assert back.schema.names == table.schema.names
    assert back.to_pylist() == table.to_pylist()


@settings(max_examples=60)
@given(tables(min_rows=1), SIZES)
def test_json_lines_of_any_type(table, sizes):
    """What JSON has no form for is written as something that it has, which then stays."""
    with tempfile.TemporaryDirectory() as folder:
        once = read(written(table, f"{folder}/a.jsonl", sizes))
        twice = read(written(once, f"{folder}/b.jsonl", []))
        assert Path(f"{folder}/a.jsonl").read_bytes() == Path(f"{folder}/b.jsonl").read_bytes()
    assert once.num_rows == table.num_rows
    assert twice.equals(once)
