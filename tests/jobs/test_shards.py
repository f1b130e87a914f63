"""Shards: every position has one, whole ranges in order where positions are dense, else spread."""

import numpy as np
import pyarrow as pa
import pytest
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


def test_runs_of_sparse_positions_are_hashed_by_splitmix64():
    """The numbers are those of its reference implementation, from seed 0 on."""
    plan = Layout(num_shards=1 << 62, num_rows=None)
    runs = np.arange(5) << 10
    expected = [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
        0xF88BB8A8724C81EC,
        0x1B39896A51A8749B,
    ]
    assert plan.shards_of(runs).tolist() == [number % (1 << 62) for number in expected]
    assert plan.shards_of(runs + 1023).tolist() == plan.shards_of(runs).tolist()


class Table(Source):
    def __init__(self, num_rows, num_bytes, *, is_dense=True) -> None:
        self.num_rows, self.num_bytes, self.is_dense = num_rows, num_bytes, is_dense

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


@pytest.mark.parametrize(
    ("column", "num_bytes"),
    [(pa.float32(), 4), (pa.int64(), 8), (pa.list_(pa.float32(), 25), 100), (pa.string(), 64)],
)
def test_result_columns_count_by_the_width_of_their_type(monkeypatch, column, num_bytes):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10 * num_bytes)
    results = pa.schema([("made", column)])
    sizes = [len(range(Layout.of(Table(n, 0), results).num_shards)) for n in (10, 11, 20, 21)]
    assert sizes == [1, 2, 2, 3]


def test_layout_knows_the_number_of_rows_only_of_dense_positions():
    results = pa.schema([("t", pa.string())])
    assert Layout.of(Table(10, 0), results).num_rows == 10
    assert Layout.of(Table(10, 0, is_dense=False), results).num_rows is None
    assert Layout.of(Table(None, 0, is_dense=False), results) == Layout(num_shards=1, num_rows=None)
