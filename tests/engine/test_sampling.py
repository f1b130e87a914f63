"""Sampling: greedy choice, exact sets and distribution, draws that depend on the row alone."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.engine import sampling
from beam_gemma.engine.sampling import (
    FIRST_NUCLEUS,
    SamplingParams,
    needs_logits,
    sample,
)
from beam_gemma.errors import OptionsError

SAMPLED = SamplingParams(temperature=1.0)


def draw(params, logits, ids=None, *, key="row", position=0):
    logits = np.asarray(logits, np.float32)
    ids = np.arange(len(logits)) if ids is None else np.asarray(ids, np.int64)
    return sample(params, logits, ids, key=key, position=position)


def kept_by_definition(params, logits, ids):
    """Return [(id, probability)] of the candidates that a draw may give, most likely first."""
    pairs = sorted(zip(logits, ids, strict=True), key=lambda p: (-p[0], p[1]))
    pairs = pairs[: params.top_k or len(pairs)]
    mass = [
        math.exp((float(logit) - float(pairs[0][0])) / params.temperature) for logit, _ in pairs
    ]
    total = math.fsum(mass)
    sums = [math.fsum(mass[: i + 1]) / total for i in range(len(mass))]
    # Within 1e-6, the rounding of float32, a sum may fall on either side: keep what both would.
    count = next((i + 1 for i, s in enumerate(sums) if s >= params.top_p + 1e-6), len(sums))
    kept = math.fsum(mass[:count])
    return [(int(i), m / kept) for (_, i), m in zip(pairs[:count], mass[:count], strict=True)]


logits_strategy = st.lists(st.integers(-6, 6).map(lambda i: i / 2), min_size=1, max_size=40)
settings_strategy = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 2.5]),
        "top_k": st.integers(0, 45),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]),
        "seed": st.integers(-5, 2**70),
    }
)


def test_greedy_takes_the_highest_logit_and_the_lowest_id_among_equals():
    greedy = SamplingParams()
    assert draw(greedy, [1, 3, 2]) == 1
    assert draw(greedy, [1, 3, 3]) == 1
    assert draw(greedy, [3, 3, 1], ids=[9, 4, 2]) == 4


@given(settings_strategy, logits_strategy, st.text(), st.integers(0, 10**6))
def test_only_kept_candidates_are_drawn(settings, logits, key, position):
    params = SamplingParams(**settings)
    kept = kept_by_definition(params, logits, range(len(logits)))
    assert draw(params, logits, key=key, position=position) in dict(kept)


@pytest.mark.parametrize("top_k", [0, 1, 3, 40])
@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
def test_every_kept_candidate_is_drawn_in_proportion(top_k, top_p):
    logits = np.array([0.0, 2.0, 1.0, 2.0, -1.0, 0.5, 1.0, -40.0])
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p)
    kept = dict(kept_by_definition(params, logits, range(8)))
    num_draws = 2000
    counts = np.bincount([draw(params, logits, position=i) for i in range(num_draws)], minlength=8)
    assert {i for i in kept if kept[i] > 0.01} <= set(np.flatnonzero(counts)) <= set(kept)
    for i, probability in kept.items():
        deviation = math.sqrt(num_draws * probability * (1 - probability))
        assert abs(counts[i] - num_draws * probability) <= 4.5 * deviation + 1e-9


def test_equal_logits_at_the_edge_of_top_k_go_by_id():
    params = SamplingParams(temperature=1.0, top_k=2)
    drawn = {draw(params, [1, 1, 1, 1], ids=[7, 3, 5, 1], position=i) for i in range(100)}
    assert drawn == {1, 3}


def test_a_nucleus_wider_than_the_first_guess_is_found():
    size = 4 * FIRST_NUCLEUS
    params = SamplingParams(temperature=1.0, top_p=0.75)
    drawn = [draw(params, np.zeros(size), position=i) for i in range(1000)]
    assert max(drawn) < 0.75 * size
    assert max(drawn) > 0.74 * size


@given(settings_strategy, logits_strategy, st.integers(0, 1000))
def test_the_top_candidates_give_what_the_whole_row_gives(settings, logits, position):
    top_k = 1 + settings["top_k"] % len(logits)
    params = SamplingParams(**settings | {"top_k": top_k})
    logits = np.asarray(logits, np.float32)
    order = np.argsort(-logits, kind="stable")[: max(top_k, len(logits) // 2)]
    few = draw(params, logits[order], order, position=position)
    assert few == draw(params, logits, position=position)


def test_draws_of_a_key_are_those_of_every_release():
    """The same row must get the same text from every release."""
    drawn = [draw(SAMPLED, np.zeros(100_000), key="a", position=i) for i in range(4)]
    assert drawn == [36394, 66288, 84925, 47824]


def test_keys_may_hold_surrogates_which_no_encoding_has():
    drawn = {draw(SAMPLED, np.zeros(100_000), key=key) for key in ("\ud800", "\ud801", "?", "")}
    assert len(drawn) == 4


def sums_of(logits):
    """Return each token's probability before it is normalized, in float64, and the running sum."""
    mass = np.exp(logits - logits.max()).astype(np.float64)
    return mass, np.cumsum(mass)


@pytest.mark.parametrize("size", [500, 5000])
def test_a_draw_from_a_whole_vocabulary_follows_sums_in_float64(monkeypatch, size):
    """A millionth of a token's share before its end and after it; sums in float32 lose that."""
    logits = np.random.default_rng(0).normal(0, 1, size).astype(np.float32)
    mass, sums = sums_of(logits)
    for token in range(0, size - 1, size // 500):
        before, after = sums[token] - 1e-6 * mass[token], sums[token] + 1e-6 * mass[token + 1]
        for place, drawn in ((before, token), (after, token + 1)):
            monkeypatch.setattr(sampling, "uniform_at", lambda *_, p=place: p / sums[-1])
            assert draw(SAMPLED, logits) == drawn


def test_a_nucleus_ends_where_sums_in_float64_reach_its_probability(monkeypatch):
    """Also where it ends with the first guess, or one token after it."""
    # With these, a sum in float32 over the first guess is rounded up.
    logits = np.sort(np.random.default_rng(2).normal(0, 1, 5000).astype(np.float32))[::-1]
    mass, sums = sums_of(logits)
    monkeypatch.setattr(sampling, "uniform_at", lambda *_: 1 - 2.0**-53)
    for last in (9, 500, FIRST_NUCLEUS - 1, 2000):
        within, beyond = sums[last] - 1e-6 * mass[last], sums[last] + 1e-6 * mass[last + 1]
        for wanted, drawn in ((within, last), (beyond, last + 1)):
            params = SamplingParams(temperature=1.0, top_p=wanted / sums[-1])
            assert draw(params, logits) == drawn


@pytest.mark.parametrize(
    "other",
    [{"key": "b"}, {"position": 1}, {"params": SamplingParams(temperature=1.0, seed=1)}],
)
def test_draws_differ_by_key_position_and_seed(other):
    given_ = {"params": SAMPLED, "key": "a", "position": 0}
    logits = np.zeros(100_000)
    assert draw(logits=logits, **given_) != draw(logits=logits, **(given_ | other))


def test_a_candidate_without_mass_is_never_drawn(monkeypatch):
    logits = [-np.inf, 0.0, -np.inf, 0.0, -np.inf]
    assert {draw(SAMPLED, logits, position=i) for i in range(200)} == {1, 3}
    for uniform, drawn in ((0.0, 1), (0.5, 3), (1 - 2.0**-53, 3)):
        monkeypatch.setattr(sampling, "uniform_at", lambda *_, u=uniform: u)
        assert draw(SAMPLED, logits) == drawn


@pytest.mark.parametrize("top_p", [0.99, 1.0])
def test_draws_depend_on_differences_of_logits_alone(top_p):
    """Powers of large logits would be infinite."""
    params = SamplingParams(temperature=1.0, top_p=top_p)
    for position in range(50):
        drawn = [draw(params, [a, a + 1], position=position) for a in (-1000, 0, 1000)]
        assert len(set(drawn)) == 1


@pytest.mark.parametrize(
    ("params", "answer"),
    [
        (SamplingParams(), False),
        (SamplingParams(temperature=1.0), True),
        (SamplingParams(temperature=1.0, top_k=1), False),
        (SamplingParams(temperature=1.0, top_k=64), False),
        (SamplingParams(temperature=1.0, top_k=65), True),
        (SamplingParams(temperature=0.0, top_k=65), False),
    ],
)
def test_the_whole_distribution_is_asked_for_only_if_needed(params, answer):
    assert needs_logits(params, 64) is answer


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(OptionsError, match=field):
        SamplingParams(**{field: value})
