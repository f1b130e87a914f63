"""Shards: every position has one, whole ranges in order where positions are dense, else spread."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.jobs import shards
from beam_gemma.jobs.shards import Layout
from beam_gemma.tables.source import Source


@given(st.integers(1, 40), st.integers(0, 200))
def test_dense_positions_make_even_ranges(num_shards, num_rows):
    plan = Layout(num_shards=num_shards, num_rows=num_rows)
    ranges = [plan.rows_of(shard) for shard in range(num_shards)]
    assert [position for rows in ranges for position in rows] == list(range(num_rows))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
    shards = plan.shards_of(np.arange(num_rows))
    assert [int(shard) for shard in shards] == [
        shard for shard, rows in enumerate(ranges) for _ in rows
    ]


def test_tables_of_billions_of_rows_have_shards():
    plan = Layout(num_shards=9999, num_rows=10**12)
    last = np.array([10**12 - 1])
    assert plan.shards_of(last).tolist() == [9998]
    assert plan.rows_of(9998)[-1] == 10**12 - 1


def test_sparse_positions_are_spread_in_runs():
    plan = Layout(num_shards=7, num_rows=None)
    positions = np.concatenate([(stream << 40) + np.arange(50_000) for stream in range(20)])
    shards = plan.shards_of(positions)
    counts = np.bincount(shards, minlength=7)
    assert counts.min() > 0.75 * counts.mean()
    assert np.count_nonzero(np.diff(shards)) <= 20 * 50
    assert plan.rows_of(3) is None


@given(
    st.one_of(
        st.builds(lambda n: Layout(num_shards=n, num_rows=1000), st.integers(1, 60)),
        st.builds(lambda n: Layout(num_shards=n, num_rows=None), st.integers(1, 60)),
    ),
    st.integers(0, 900),
    st.integers(0, 100),
)
def test_located_rows_are_cut_where_shards_end(plan, position, num_rows):
    batch = pa.record_batch({"at": np.arange(position, position + num_rows)})
    slices = list(plan.split(position, batch))
    assert [at for _, _, rows in slices for at in rows["at"].to_pylist()] == batch["at"].to_pylist()
    for shard, first, rows in slices:
        assert first == rows["at"][0].as_py()
        assert set(plan.shards_of(rows["at"].to_numpy()).tolist()) == {shard}


class Table(Source):
    def __init__(self, num_rows, num_bytes) -> None:
        self.num_rows, self.num_bytes, self.is_dense = num_rows, num_bytes, True

    parts = read = head = sample = None


def test_no_shard_is_too_large(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    text, vector = pa.schema([("t", pa.string())]), pa.schema([("v", pa.list_(pa.float32(), 25))])
    assert Layout.of(Table(10, 300), text).num_shards == 1
    assert Layout.of(Table(10, 3000), text).num_shards == 4
    # A vector of 100 bytes for each row.
    assert Layout.of(Table(10, 1000), vector).num_shards == 2
    assert Layout.of(Table(10, 10**9), vector, num_shards=3).num_shards == 3
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    assert Layout.of(Table(10, 0), text).num_shards == 3
    assert Layout.of(Table(0, 0), text) == Layout(num_shards=1, num_rows=0)
