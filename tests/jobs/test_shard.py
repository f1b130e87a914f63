"""A shard: each row once, in order, with its results; anything else stops the job."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.errors import BalanceError
from beam_gemma.jobs.shards import assembled
from beam_gemma.tasks.row_keys import POSITION

TWICE = "^rows: expected each row once, got some twice; run the job again$"


def rows_at(first, number):
    return first, pa.record_batch({"key": list(range(first, first + number))})


def results_at(*positions, name="made"):
    return pa.record_batch({POSITION: pa.array(positions, pa.int64()), name: list(positions)})


def shard(rows, *results, wanted=None):
    """Return keys and results of a shard, task by task."""
    tagged = dict(enumerate(results))
    found = list(assembled(rows, tagged, len(results), wanted))
    keys = [key for batch, _ in found for key in batch["key"].to_pylist()]
    made = [[v for _, r in found for v in r[i].column(0).to_pylist()] for i in range(len(results))]
    return [keys, *made]


@given(st.permutations(range(5)), st.permutations(range(20)), st.permutations(range(20)))
def test_any_order_comes_out_in_order(batches, first, second):
    rows = [rows_at(100 + 4 * i, 4) for i in batches]
    one = [results_at(*(100 + i for i in first[:7])), results_at(*(100 + i for i in first[7:]))]
    two = [results_at(*(100 + i for i in second), name="other")]
    keys = list(range(100, 120))
    assert shard(rows, one, two, wanted=range(100, 120)) == [keys, keys, keys]


def test_sparse_rows():
    rows = [rows_at(1 << 40, 2), rows_at(5, 1)]
    assert shard(rows, [results_at((1 << 40) + 1, 5, 1 << 40)])[0] == [5, 1 << 40, (1 << 40) + 1]


def test_a_shard_may_be_empty():
    assert shard([], [], wanted=range(7, 7)) == [[], []]
    assert shard([], []) == [[], []]


@pytest.mark.parametrize(
    ("rows", "results", "match"),
    [
        ([rows_at(0, 2), rows_at(1, 2)], [results_at(0, 1, 2)], TWICE),
        ([rows_at(0, 3), rows_at(0, 2)], [results_at(0, 1, 2)], TWICE),
        ([rows_at(0, 2)], [results_at(0, 1)], "expected all 3 rows from row 0 of the table on"),
        ([rows_at(0, 4)], [results_at(0, 1, 2, 3)], "expected all 3 rows"),
        ([], [], "expected all 3 rows .*got 0"),
        ([rows_at(0, 3)], [results_at(0, 2)], "one for each of 3 rows, got 2 for 2 of them"),
        ([rows_at(0, 3)], [results_at(0, 1, 1, 2)], "got 4 for 3 of them"),
        ([rows_at(0, 3)], [results_at(0, 1, 7)], "got 3 for 2 of them"),
        ([rows_at(0, 3)], [], "got 0 for 0 of them"),
    ],
)
def test_lost_and_doubled_rows_and_results_stop_the_job(rows, results, match):
    with pytest.raises(BalanceError, match=match):
        shard(rows, results, wanted=range(3))
