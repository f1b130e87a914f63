"""Summary: sums that do not depend on how a table was cut, and hold nothing of its rows."""

import json
import pickle
import time
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.monitoring.result_summary import (
    MAX_REASON_CHARS,
    MAX_REASONS,
    Summary,
    length_bin,
    reason_of,
)

GENERATED = pa.schema(
    {
        "completion": pa.string(),
        "finish_reason": pa.string(),
        "num_prompt_tokens": pa.int64(),
        "num_completion_tokens": pa.int64(),
        "truncated": pa.bool_(),
        "error": pa.string(),
    }
)
NULL = {"column": "column 'text': expected a value for the prompt, got null; fill them"}
LONG = "prompt: expected at most 50 tokens, got {:,}; shorten it"
ROWS = [
    {"finish_reason": "stop", "num_prompt_tokens": 10, "num_completion_tokens": 3},
    {"finish_reason": "length", "num_prompt_tokens": 100, "num_completion_tokens": 16},
    {"finish_reason": "stop", "num_prompt_tokens": 101, "num_completion_tokens": 0},
    {"error": LONG.format(1234), "num_prompt_tokens": None},
    {"error": LONG.format(99), "truncated": True},
]


def generated(rows):
    return pa.RecordBatch.from_pylist(rows, schema=GENERATED)


def test_summary_counts_rows_tokens_and_reasons_of_a_batch():
    assert Summary.of(generated(ROWS)) == Summary(
        rows=5,
        failed=2,
        truncated=1,
        prompt_tokens=211,
        completion_tokens=19,
        prompt_lengths=Counter({10: 1, 100: 1, 101: 1}),
        completion_lengths=Counter({3: 1, 16: 1, 0: 1}),
        finish_reasons=Counter(stop=2, length=1),
        reasons=Counter({"prompt: expected at most N tokens, got N; shorten it": 2}),
    )


def test_labels_are_counted_by_index():
    """Their texts may come from a row."""
    batch = pa.RecordBatch.from_pydict(
        {"label": ["a", "b", None], "label_index": [0, 1, None], "error": ["x", None, None]}
    )
    assert Summary.of(batch).labels == Counter({"0": 1, "1": 1})


def test_violations_are_counted_by_policy():
    batch = pa.RecordBatch.from_pydict(
        {"violations": [["a", "b"], [], ["b"], None], "error": pa.nulls(4, pa.string())}
    )
    assert Summary.of(batch).labels == Counter(a=1, b=2)


def test_tokens_of_embedded_texts_count_as_prompt_tokens():
    batch = pa.RecordBatch.from_pydict({"num_tokens": [5, 7], "error": pa.nulls(2, pa.string())})
    assert Summary.of(batch).prompt_tokens == 12


def test_summary_of_no_rows_is_empty():
    assert Summary.of(generated([])) == Summary()


@given(st.integers(0, 1 << 40))
def test_bin_of_any_length_is_narrow(length):
    least = length_bin(length)
    assert least <= length
    assert length - least <= (length / 64 if length >= 128 else 0)
    assert length_bin(least) == least


ROW = st.fixed_dictionaries(
    {},
    optional={
        "finish_reason": st.sampled_from(["stop", "length"]),
        "num_prompt_tokens": st.integers(0, 5000),
        "num_completion_tokens": st.integers(0, 5000),
        "truncated": st.booleans(),
        "error": st.sampled_from([LONG.format(7), "text: expected Unicode", "x, got 'y'"]),
    },
)


@given(st.lists(st.lists(ROW, max_size=5), max_size=4))
def test_sum_of_the_summaries_of_parts_is_that_of_the_whole(parts):
    summed = sum((Summary.of(generated(part)) for part in parts), Summary())
    assert summed == Summary.of(generated([row for part in parts for row in part]))
    assert Summary.from_dict(json.loads(json.dumps(summed.as_dict()))) == summed
    assert pickle.loads(pickle.dumps(summed)) == summed


def test_the_commonest_reasons_are_kept():
    def of(first, last):
        errors = [chr(0x4E00 + i) for i in range(first, last) for _ in range(1 + i % 3)]
        return Summary.of(generated([{"error": error} for error in errors]))

    both = of(0, 90) + of(60, 180)
    assert len(both.reasons) == MAX_REASONS
    assert both.failed == of(0, 90).failed + of(60, 180).failed
    assert both.reasons == (of(60, 180) + of(0, 90)).reasons
    assert both.reasons[chr(0x4E00 + 89)] == 6
    assert min(both.reasons.values()) >= 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("prompt: expected at most 50 tokens, got 1,234; cut it", "prompt: expected at most N "
         "tokens, got N; cut it"),
        ("column 'a': expected a value, got null; fill it", "column 'a': expected a value, got "
         "null; fill it"),
        ("labels: expected each once, got 'my secret' twice", "labels: expected each once, got …"),
        ("messages: expected a list, got [{'role': 'user'}]", "messages: expected a list, got …"),
        ("row: expected a prompt, got KeyError: secret", "row: expected a prompt, got KeyError…"),
        ("messages: expected one that fits, got: secret;\nx", "messages: expected one that fits, "
         "got…"),
        ("x" * 300, "x" * MAX_REASON_CHARS),
    ],
)  # fmt: skip
def test_a_reason_quotes_no_value(error, reason):
    assert reason_of(error) == reason
    assert list(Summary.of(generated([{"error": error}])).reasons) == [reason]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(TEXT, TEXT)
def test_a_reason_is_the_same_one_by_one_and_in_a_batch(head, tail):
    error = f"{head}, got{tail}"
    assert list(Summary.of(generated([{"error": error}])).reasons) == [reason_of(error)]


def test_summary_of_a_million_rows_takes_about_a_second():
    number = pa.array([i % 8192 for i in range(1_000_000)])
    batch = pa.RecordBatch.from_pydict(
        {
            "finish_reason": pa.array(["stop"] * 1_000_000),
            "num_prompt_tokens": number,
            "num_completion_tokens": number,
            "error": pa.array([LONG.format(i) for i in range(1_000_000)]),
        }
    )
    start = time.process_time()
    assert Summary.of(batch).failed == 1_000_000
    assert time.process_time() - start < 5  # seconds; 1.1 where nothing else runs
