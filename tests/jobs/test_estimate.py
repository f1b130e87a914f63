"""Estimate: figures by hand, and nothing is known that does not follow from what is."""

import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.engine.snapshots import MIN_SHARERS
from beam_gemma.jobs.dry_run import MIN_SNAPSHOT_SHARERS
from beam_gemma.jobs.estimate import Estimate, Means, Sample, Throughput, distribution

RATES = Throughput(
    prompt_tokens_per_sec=100.0, completion_tokens_per_sec=10.0, origin="as somebody measured"
)
MEANS = Means(
    throughput=RATES,
    num_workers=2,
    worker_price=0.5,
    completion_tokens=5.0,
    completion_origin="by a flag",
)
UNKNOWN = Throughput(prompt_tokens_per_sec=None, completion_tokens_per_sec=None, origin="not known")


def sample_of(*prompts, **settings):
    """Return a sample of rows with one sequence each."""
    return Sample(lengths=[len(p) for p in prompts], sequences=[(p,) for p in prompts], **settings)


def estimate_of(sample, num_rows, means=MEANS, *, is_counted=True):
    return Estimate(sample=sample, means=means, num_rows=num_rows, is_counted=is_counted)


def test_a_table_is_its_sample_many_times_over():
    sample = sample_of((1, 2, 3), (4, 5), (6,) * 5, reasons=Counter({"no prompt": 1}))
    estimate = estimate_of(sample, 4000)
    assert sample.num_rows == 4
    assert estimate.prompt_tokens == estimate.computed_prompt_tokens == 10_000
    assert estimate.completion_tokens == 3 * 5 * 1000  # a row that fails completes nothing
    assert estimate.worker_hours == (10_000 / 100 + 15_000 / 10) / 3600
    assert estimate.hours == estimate.worker_hours / 2
    assert estimate.cost == estimate.worker_hours * 0.5
    assert estimate.cost_per_million_rows == pytest.approx(estimate.cost * 250, rel=1e-12)


def test_rows_that_ask_the_same_are_asked_once_unless_results_are_drawn():
    rows = (1, 2, 3), (1, 2, 3), (4,)
    sample = sample_of(*rows)
    assert (sample.num_duplicates, sample.num_computed_tokens) == (1, 4)
    assert estimate_of(sample, 30).completion_tokens == 10 * 2 * 5
    drawn = sample_of(*rows, is_drawn=True)
    assert (drawn.num_duplicates, drawn.num_computed_tokens) == (0, 7)
    assert estimate_of(drawn, 30).completion_tokens == 10 * 3 * 5


def test_blocks_that_prompts_begin_with_are_computed_once():
    begin = tuple(range(100, 108))
    rows = [(*begin, 1, 2, 3), (*begin, 1, 9), (*begin[:4], 7, 7)]
    assert sample_of(*rows).num_computed_tokens == 11 + 10 + 6
    assert sample_of(*rows, block_tokens=4).num_computed_tokens == 11 + (10 - 8) + (6 - 4)
    # The last token gives the next one, so it is computed although its block is known.
    assert sample_of(begin, (*begin, 1), block_tokens=4).num_computed_tokens == 8 + (9 - 8)
    assert sample_of((*begin, 1), begin, block_tokens=4).num_computed_tokens == 9 + (8 - 4)


def test_a_prefix_that_few_share_may_be_computed_each_time():
    rows = [(1, 2, 3, 4, 9), (1, 2, 3, 4, 8), (1, 2, 7, 7), (1, 2, 6, 6)]
    reused = sample_of(*rows, block_tokens=2).num_computed_tokens
    assert reused == 5 + 1 + 2 + 2
    kept = sample_of(*rows, block_tokens=2, min_sharers=4).num_computed_tokens
    assert kept == 5 + 3 + 2 + 2  # (1, 2) is shared by four, (3, 4) by two
    assert MIN_SNAPSHOT_SHARERS == MIN_SHARERS


def test_a_source_that_rows_share_is_read_once():
    sources = [((1, 2, 3, 4),), ((1, 2, 3, 4),), ((5, 6),), ((5, 6),)]
    starts = [((0, 7),), ((0, 8),), ((0, 7),), ((0, 7),)]
    sample = Sample(lengths=[4, 4, 2, 2], sequences=starts, sources=sources)
    # Rows with one decoder prompt and two sources are two requests.
    assert sample.num_duplicates == 1
    assert sample.num_computed_tokens == (4 + 2) + 3 * 2
    assert sample.has_work_in_common
    assert estimate_of(sample, 4).prompt_tokens == 12
    alone = Sample(lengths=[4, 2], sequences=starts[:2], sources=sources[1:3])
    assert (alone.num_duplicates, alone.num_computed_tokens) == (0, 6 + 4)
    assert not alone.has_work_in_common


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple), max_size=12),
    st.integers(1, 5),
)
def test_reuse_is_of_the_longest_beginning_before(rows, block):
    """Compared with a search over all sequences before."""
    computed, before = 0, []
    for row in dict.fromkeys(rows):
        starts = [n for n in range(0, len(row), block) if any(row[:n] == b[:n] for b in before)]
        computed += len(row) - max(starts, default=0)
        before.append(row[: len(row) // block * block])
    assert sample_of(*rows, block_tokens=block).num_computed_tokens == computed


@pytest.mark.parametrize(
    ("num_rows", "means", "known"),
    [
        (10, {}, {"prompt_tokens", "worker_hours", "hours", "cost", "cost_per_million_rows"}),
        (10, {"num_workers": None},
         {"prompt_tokens", "worker_hours", "cost", "cost_per_million_rows"}),
        (10, {"worker_price": None}, {"prompt_tokens", "worker_hours", "hours"}),
        (10, {"throughput": UNKNOWN}, {"prompt_tokens"}),
        (None, {}, set()),
    ],
)  # fmt: skip
def test_what_is_not_known_stays_unknown(num_rows, means, known):
    estimate = estimate_of(sample_of((1, 2)), num_rows, dataclasses.replace(MEANS, **means))
    names = {"prompt_tokens", "worker_hours", "hours", "cost", "cost_per_million_rows"}
    assert {name for name in names if getattr(estimate, name) is not None} == known


def test_tokens_that_there_are_none_of_take_no_time():
    means = Means(
        throughput=Throughput(
            prompt_tokens_per_sec=4.0, completion_tokens_per_sec=None, origin="measured"
        ),
        num_workers=1,
        worker_price=None,
    )
    assert estimate_of(sample_of((1,)), 3600 * 8, means).hours == 2.0


def test_an_empty_table_takes_nothing_and_an_unseen_one_is_unknown():
    assert estimate_of(sample_of(), 0).cost == 0
    assert estimate_of(sample_of(), 0).cost_per_million_rows is None
    assert estimate_of(sample_of(), 5).prompt_tokens is None


def test_assumptions_are_said_where_they_are_made():
    def said(sample, num_rows, **more):
        return " ".join(estimate_of(sample, num_rows, **more).assumptions)

    plain = said(sample_of((1, 2), (3,)), 2)
    assert "without the start of workers" in plain
    assert "5 tokens a completion: by a flag" in plain
    assert plain.endswith("as somebody measured")
    for words in ("outside the sample", "in common", "size of the table"):
        assert words not in plain
    assert "2 workers have work all the time" in plain
    alone = dataclasses.replace(MEANS, num_workers=1)
    assert "all the time" not in said(sample_of((1, 2)), 2, means=alone)
    assert "outside the sample" in said(sample_of((1, 2)), 2)
    assert "in common" in said(sample_of((1, 2), (1, 2)), 2)
    assert "size of the table" in said(sample_of((1, 2)), 2, is_counted=False)


def test_json_has_the_figures():
    sample = sample_of((1, 2, 3), (1, 2, 3), reasons=Counter({"why": 2}), num_truncated=1)
    found = json.loads(json.dumps(estimate_of(sample, 40).as_json()))
    assert found.pop("assumptions")
    hours = (30 / 100 + 50 / 10) / 3600
    assert found == {
        "rows": 40,
        "rows_counted": True,
        "sample": {
            "rows": 4,
            "failed": 2,
            "reasons": {"why": 2},
            "truncated": 1,
            "duplicates": 1,
            "prompt_tokens": {"mean": 3.0, "p95": 3, "most": 3},
        },
        "prompt_tokens": 60,
        "computed_prompt_tokens": 30,
        "completion_tokens": 50,
        "prompt_tokens_per_sec": 100.0,
        "completion_tokens_per_sec": 10.0,
        "workers": 2,
        "worker_hours": pytest.approx(hours, rel=1e-12),
        "hours": pytest.approx(hours / 2, rel=1e-12),
        "worker_price_usd": 0.5,
        "cost_usd": pytest.approx(hours / 2, rel=1e-12),
        "cost_per_million_rows_usd": pytest.approx(hours / 2 / 40 * 1e6, rel=1e-12),
    }


def test_percentile_is_exact():
    assert distribution(range(100, 0, -1)) == (50.5, 95, 100)
    assert distribution([]) is None
