"""Requests: rows that ask the same meet, rows that draw do not, and results find all their rows."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.batches import RecordBatchCoder
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.jobs.deduplicate import (
    distinct,
    key_ranges,
    keyed,
    split_durable,
    spread,
    with_their_files,
    without_files,
)
from beam_gemma.jobs.fetch_media import FILE_LIST
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.row_keys import ENCODED, FILES, POSITION, POSITIONS, REQUEST_KEY, ROW_KEY

GREEDY = GenerateSettings(prompt_column="text", sampling=SamplingParams(max_tokens=4))
DRAWN = GenerateSettings(
    prompt_column="text", sampling=SamplingParams(max_tokens=4, temperature=1.0)
)
KEYED = GenerateSettings(
    prompt_column="text", key_column="id", sampling=SamplingParams(max_tokens=4, temperature=1.0)
)


def encode(row):
    return row["text"].encode()


def key(text):
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def text_of(request):
    return request[ENCODED].decode()


def requests_of(rows, settings=GREEDY, *, batches=1, order=None):
    """Return the distinct requests of rows that come in some batches, in some order."""
    table = pa.Table.from_pylist(rows)
    size = -(-table.num_rows // batches)
    parts = [(i, table.slice(i, size)) for i in range(0, table.num_rows, size)]
    found = [
        keyed(start, part.combine_chunks().to_batches()[0], settings, encode)
        for start, part in parts
    ]
    return distinct([found[i] for i in order or range(len(found))])


def test_a_request_holds_what_its_row_was_encoded_to_and_no_column():
    rows = pa.RecordBatch.from_pylist([{"id": 1, "text": "a", "wide": "x" * 1000}])
    (found,) = keyed(7, rows, GREEDY, encode).to_pylist()
    assert found == {REQUEST_KEY: key("a"), POSITION: 7, ENCODED: found[ENCODED]}
    assert text_of(found) == "a"


def test_a_row_is_encoded_from_the_columns_of_its_task_alone():
    rows = pa.RecordBatch.from_pylist([{"id": 1, "text": "a", "wide": "x" * 1000}])
    seen = []
    keyed(7, rows, GREEDY, lambda row: seen.append(dict(row)) or b"")
    assert seen == [{"text": "a"}]


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=60), st.integers(1, 5), st.randoms())
def test_every_row_is_in_one_request_with_all_that_ask_the_same(texts, batches, random):
    rows = [{"text": text, "unused": i} for i, text in enumerate(texts)]
    size = -(-len(rows) // batches)
    order = list(range(-(-len(rows) // size)))
    random.shuffle(order)
    found = requests_of(rows, batches=batches, order=order).to_pylist()
    wanted = {text: [i for i, t in enumerate(texts) if t == text] for text in texts}
    assert {text_of(row): row[POSITIONS] for row in found} == wanted
    assert len(found) == len(wanted)


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=50), st.integers(1, 1024))
def test_ranges_are_of_keys_alone_and_in_their_order(keys, num_ranges):
    batch = pa.record_batch({REQUEST_KEY: pa.array(sorted(keys), pa.binary(16))})
    ranges = key_ranges(batch, num_ranges)
    assert (np.diff(ranges) >= 0).all()
    assert ranges.min() >= 0
    assert ranges.max() < num_ranges
    last = pa.record_batch({REQUEST_KEY: pa.array([b"\xff" * 16], pa.binary(16))})
    assert key_ranges(last, num_ranges).tolist() == [num_ranges - 1]


def test_results_reach_all_rows_that_ask():
    requests = requests_of([{"text": text} for text in "abacab"])
    results = pa.record_batch({"completion": [text_of(row) * 2 for row in requests.to_pylist()]})
    found = sorted(spread(requests, results).to_pylist(), key=lambda row: row[POSITION])
    assert [row["completion"] for row in found] == ["aa", "bb", "aa", "cc", "aa", "bb"]
    assert [row[POSITION] for row in found] == list(range(6))


@pytest.mark.parametrize(("settings", "extra"), [(GREEDY, {}), (DRAWN, {ROW_KEY: pa.string()})])
@pytest.mark.parametrize("num_rows", [0, 1])
def test_batches_of_requests_have_one_schema_whether_or_not_they_hold_rows(
    settings, extra, num_rows
):
    rows = pa.RecordBatch.from_pylist([{"id": 1, "text": "a"}]).slice(0, num_rows)
    columns = {REQUEST_KEY: pa.binary(16), POSITION: pa.int64(), ENCODED: pa.binary()}
    assert keyed(7, rows, settings, encode).schema == pa.schema(columns | extra)


def test_no_rows_make_no_requests():
    none = requests_of([{"text": "a"}]).slice(0, 0)
    assert key_ranges(none, 9).tolist() == []
    assert [part.num_rows for part in split_durable(none, {key("a"): {}})] == [0, 0]


def test_what_is_durable_is_not_asked():
    requests = requests_of([{"text": text} for text in "abacab"])
    durable = {key("a"): {}, key("z"): {}}
    known, left = split_durable(requests, durable)
    assert [text_of(row) for row in known.to_pylist()] == ["a"]
    assert sorted(text_of(row) for row in left.to_pylist()) == ["b", "c"]


@pytest.mark.parametrize("settings", [DRAWN, KEYED])
def test_rows_that_draw_ask_for_themselves(settings):
    rows = [{"id": 1, "text": "a"}, {"id": 1, "text": "a"}, {"id": 2, "text": "a"}] * 2
    found = requests_of(rows, settings).to_pylist()
    assert len(found) == 6
    assert [row[POSITIONS] for row in found] == [[i] for i in range(6)]
    assert len({row[REQUEST_KEY] for row in found}) == 6
    assert len({row[ROW_KEY] for row in found}) == 6


def test_keys_of_rows_that_draw_hang_on_the_rows_and_not_on_their_batches():
    rows = [{"id": i % 4, "text": "ab"[i % 2], "other": i % 3} for i in range(40)]

    def named(found):
        keys = ((row[POSITIONS][0], row[REQUEST_KEY], row[ROW_KEY]) for row in found.to_pylist())
        return sorted(keys)

    wanted = named(requests_of(rows, DRAWN))
    assert named(requests_of(rows, DRAWN, batches=7, order=[3, 1, 0, 6, 5, 2, 4])) == wanted
    changed = [row | {"other": 9} for row in rows]
    assert {key for _, key, _ in named(requests_of(changed, DRAWN))}.isdisjoint(
        key for _, key, _ in wanted
    )
    # A key of their own makes draws the same whatever else is in a row.
    assert named(requests_of(changed, KEYED)) == named(requests_of(rows, KEYED))


def test_key_of_a_row_is_that_of_its_column():
    rows = [{"id": "k1", "text": "a"}, {"id": None, "text": "a"}]
    one, two = sorted(requests_of(rows, KEYED).to_pylist(), key=lambda row: row[POSITIONS])
    assert one[ROW_KEY] == "k1"
    assert len(two[ROW_KEY]) == 32


def test_rows_that_draw_differ_by_values_that_python_cannot_hold():
    long = pa.array([1 << 47, 1 << 48], pa.int64()).cast(pa.duration("s"))
    rows = pa.record_batch({"text": ["a", "a"], "wait": long})
    one, two = keyed(0, rows, DRAWN, encode).to_pylist()
    assert one[ROW_KEY] != two[ROW_KEY]
    assert one[REQUEST_KEY] != two[REQUEST_KEY]


def test_of_identical_rows_that_draw_the_later_ones_get_a_number():
    """Saved results are found again by these keys, so they are those of every release."""
    rows = [{"id": "k", "text": "a"}] * 3
    own = hashlib.blake2b(key("a") + b"k", digest_size=16).digest()
    numbered = [hashlib.blake2b(own + bytes([*[0] * 7, i]), digest_size=16) for i in (1, 2)]
    found = requests_of(rows, KEYED)
    assert found.schema.field(REQUEST_KEY).type == pa.binary(16)
    assert [(row[REQUEST_KEY], row[ROW_KEY]) for row in found.to_pylist()] == [
        (own, "k"),
        (numbered[0].digest(), "k-1"),
        (numbered[1].digest(), "k-2"),
    ]


def seen(images, *, start=0, **sampling):
    """Return the keyed requests of rows with pictures; None stands for one that is missing."""
    settings = GenerateSettings(
        prompt="so", image_columns=("photo",), sampling=SamplingParams(max_tokens=4, **sampling)
    )
    rows = [[{"bytes": i, "error": None if i else "none"} for i in row] for row in images]
    batch = pa.record_batch({"photo": pa.array(rows, FILE_LIST), "id": range(len(rows))})
    return keyed(start, batch, settings, lambda row: repr(row["photo"])[:40].encode())


def test_requests_have_the_files_of_their_pictures_each_once():
    found = seen([[b"a", b"b", b"a"], [], [b"c"], [b"d", None]])
    assert found[FILES].to_pylist() == [[b"a", b"b"], [], [b"c"], []]
    text = keyed(0, pa.record_batch({"text": ["a"]}), GREEDY, encode)
    assert FILES not in text.schema.names


def test_merged_requests_get_their_files_back_in_small_batches():
    batches = [seen([[b"a"], [b"b"]]), seen([[b"c"]], start=2), seen([[b"b"], [b"d"]], start=3)]
    requests = distinct(map(without_files, batches))
    assert FILES not in requests.schema.names
    _, left = split_durable(requests, [requests[REQUEST_KEY][1].as_py()])
    found = list(with_their_files(left, batches))
    assert [batch.num_rows for batch in found] == [1, 1, 1]
    rows = [row for batch in found for row in batch.to_pylist()]
    assert [(row[POSITIONS], row[FILES]) for row in rows] == [
        ([0], [b"a"]),
        ([2], [b"c"]),
        ([4], [b"d"]),
    ]
    merged = [row for batch in with_their_files(requests, batches) for row in batch.to_pylist()]
    assert [row[POSITIONS] for row in merged] == [[0], [1, 3], [2], [4]]
    assert merged[1][FILES] == [b"b"]


def test_requests_without_files_do_not_hold_them_in_memory():
    coder = RecordBatchCoder()
    encoded = coder.encode(seen([[bytes(1 << 20)]]))
    before = pa.total_allocated_bytes()
    left = without_files(coder.decode(encoded))
    assert left.num_rows == 1
    assert pa.total_allocated_bytes() - before < 1 << 18


def test_drawn_rows_are_told_apart_by_their_pictures():
    same, other = ([seen([row], temperature=1.0) for row in rows] for rows in
                   ([[b"a"], [b"a"]], [[b"a"], [b"b"]]))  # fmt: skip
    assert same[0][ROW_KEY] == same[1][ROW_KEY]
    assert other[0][ROW_KEY] != other[1][ROW_KEY]
