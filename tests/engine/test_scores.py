"""The score head: log-probabilities of given tokens, whatever the cache and the batch are like."""

import random
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.errors import OptionsError
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig
from tests.conftest import TinyModel
from tests.doubles.fakes import RAREST, STATES, FakeSession, fake_signature, logits_of, logsumexp
from tests.doubles.ragged import Feeder
from tests.doubles.reference import VOCAB

SIGNATURE = fake_signature(states=STATES[:2], optional_inputs=(), head="score")


def score(ids: list[int], targets: list[tuple[int, int]], *, normalized: bool = True) -> Request:
    return Request(
        request_id=f"{len(ids)} tokens",
        prompt_token_ids=tuple(ids),
        params=SamplingParams(max_tokens=1),
        targets=tuple(targets),
        normalized=normalized,
    )


def fake_scores(request: Request) -> list[float]:
    """Return what a fake session says of the targets, from the definition alone."""
    scores = []
    for position, token_id in request.targets:
        ids = request.prompt_token_ids[: position + 1]
        histories = [
            np.array(ids if s.sliding_window is None else ids[-s.sliding_window :], np.float64)
            for s in SIGNATURE.paged_states
        ]
        logits = logits_of(histories, 0, SIGNATURE.vocab_size, None)
        log_normalizer = logsumexp(logits[None])[0] if request.normalized else 0.0
        scores.append(float(logits[token_id] - log_normalizer))
    return scores


def run(session: FakeSession, requests: list[Request], **config) -> list[Completion]:
    with closing(Engine(session, EngineConfig(**config))) as engine:
        completions = engine.generate(requests)
    assert session.faults == []
    return completions


@st.composite
def rows(draw: st.DrawFn) -> list[Request]:
    """Draw prompts that begin alike or not, each with targets up to its last position."""
    shared = list(range(draw(st.integers(0, 70))))
    requests = []
    for i in range(draw(st.integers(1, 8))):
        ids = shared + [draw(st.integers(0, 3)) for _ in range(draw(st.integers(1, 30)))]
        places = sorted(draw(st.lists(st.integers(0, len(ids) - 1), max_size=6)))
        targets = [(place, draw(st.integers(0, RAREST - 1))) for place in places]
        targets.append((len(ids) - 1, i))
        requests.append(score(ids, targets, normalized=draw(st.booleans())))
    return requests


@settings(max_examples=60, deadline=None)
@given(rows(), st.integers(1, 8), st.integers(8, 64), st.integers(12, 40))
def test_scores_follow_from_the_request_alone(requests, seqs, tokens, blocks):
    session = FakeSession(SIGNATURE, num_blocks=blocks)
    done = run(session, requests, max_num_seqs=seqs, max_num_batched_tokens=max(seqs, tokens))
    for request, completion in zip(requests, done, strict=True):
        assert completion.error is None
        assert completion.token_ids == ()
        # One rounding to float32 of a number near 4.
        assert completion.scores == pytest.approx(fake_scores(request), abs=1e-6)


def test_what_requests_share_is_computed_once():
    prompt = list(range(64))
    requests = [score([*prompt, 70 + i], [(63, 70 + i), (64, 5)]) for i in range(6)]
    session = FakeSession(SIGNATURE)
    run(session, requests)
    # The first target needs the outputs of position 63, so of four blocks three are shared.
    assert sum(n for step in session.steps for _, n in step) == 48 + 6 * 17


def test_no_row_of_the_vocabulary_is_normalized_unless_asked():
    session = FakeSession(SIGNATURE)
    feeds = []
    session.run = lambda f, **k: feeds.append(f) or FakeSession.run(session, f, **k)
    run(session, [score([1, 2, 3], [(2, 4), (2, 5)], normalized=False), score([1, 2], [(1, 9)])])
    assert [len(f["target_ids"]) for f in feeds] == [3]
    assert [len(f["logit_rows"]) for f in feeds] == [2]
    assert [len(f["probability_rows"]) for f in feeds] == [1]


def test_row_that_is_not_finite_ends_alone():
    session = FakeSession(SIGNATURE, poison=("full", 9))
    requests = [score([1, 2, i], [(1, 4), (2, 5)]) for i in (3, 9, 4)]
    done = run(session, requests)
    assert [c.error is None for c in done] == [True, False, True]
    assert "expected finite logits" in done[1].error
    assert list(done[2].scores) == pytest.approx(fake_scores(requests[2]), abs=1e-6)


def test_step_that_fails_costs_the_rows_at_fault():
    session = FakeSession(SIGNATURE)
    session.fails = lambda _, ids: 50 in ids
    requests = [score([1, 2, i], [(2, 5)]) for i in (3, 50, 4)]
    done = run(session, requests)
    assert [c.error is None for c in done] == [True, False, True]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (replace(score([1, 2], [(1, 3)]), targets=()), "targets: expected some for the head score"),
        (score([1, 2], [(1, 97)]), "targets: expected token ids from 0 to 96, got 97"),
    ],
)
def test_bad_targets_are_errors_of_their_row(request_, message):
    [done] = run(FakeSession(SIGNATURE), [request_])
    assert message in done.error


@pytest.mark.parametrize("targets", [[(0, 1)], [(1, 1), (0, 1)], [(-1, 1), (1, 1)], [(2, 1)]])
def test_targets_out_of_order_are_refused(targets):
    with pytest.raises(OptionsError, match="targets in order up to position 1"):
        score([1, 2], targets)


def session_of(tiny: TinyModel, *, num_blocks: int = 400, num_threads: int = 2) -> Session:
    signature = tiny.artifact.signature("score", "cpu")
    sizes = {state.group: num_blocks for state in signature.paged_states}
    path = str(tiny.artifact.graph_path("score", "cpu"))
    return Session(
        path, signature, Capacity(num_blocks=sizes, num_state_slots=0), num_threads=num_threads
    )


def test_graph_scores_as_the_reference_does(tiny: TinyModel) -> None:
    """Every position of every sequence, against a step of all of them."""
    signature = tiny.artifact.signature("score", "cpu")
    feeder = Feeder(signature, len(tiny.sequences), max(map(len, tiny.sequences)))
    feeds = feeder.feeds(list(enumerate(tiny.sequences)))
    rng = np.random.default_rng(3)
    num_rows = len(feeds["logit_rows"])
    feeds["target_rows"] = np.repeat(np.arange(num_rows), 3)
    feeds["target_ids"] = rng.integers(0, VOCAB, 3 * num_rows)
    output = session_of(tiny, num_blocks=feeder.num_blocks).run(feeds)
    logits = np.concatenate(tiny.exact_logits)
    targets = logits[feeds["target_rows"], feeds["target_ids"]]
    # float32 against float64, logits up to about 30.
    np.testing.assert_allclose(output.target_logits, targets, rtol=0, atol=1e-4)
    normalizers = output.top_logits - np.log(output.top_probability.astype(np.float64))
    np.testing.assert_allclose(normalizers, logsumexp(logits), rtol=0, atol=1e-4)


def tiny_requests() -> list[Request]:
    rng = np.random.default_rng(5)
    shared = rng.integers(3, VOCAB, 70).tolist()
    requests = []
    for i in range(24):
        ids = rng.integers(3, VOCAB, rng.integers(1, 120)).tolist()
        ids = shared + ids if i % 2 else ids
        first = int(rng.integers(max(0, len(ids) - 6), len(ids)))
        targets = [(p, int(rng.integers(0, VOCAB))) for p in range(first, len(ids))]
        requests.append(score(ids, targets, normalized=i % 5 > 0))
    return requests


@pytest.fixture(scope="module")
def base(tiny: TinyModel) -> list[Completion]:
    """Return the scores of all requests in one batch that shares prefixes."""
    with closing(Engine(session_of(tiny), EngineConfig())) as engine:
        completions = engine.generate(tiny_requests())
    assert engine.stats.num_cached_tokens > 0
    assert {completion.error for completion in completions} == {None}
    return completions


@pytest.mark.parametrize(
    "condition",
    ["alone", "shuffled", "small cache", "small steps", "no reuse", "1 thread", "16 threads"],
)
def test_scores_are_the_same_bits_in_any_company(
    tiny: TinyModel, base: list[Completion], condition: str
) -> None:
    requests = tiny_requests()
    order = list(range(len(requests)))
    if condition == "shuffled":
        random.Random(1).shuffle(order)
    config = EngineConfig(
        max_num_seqs=16 if condition == "small steps" else 64,
        max_num_batched_tokens=16 if condition == "small steps" else 1024,
        enable_prefix_caching=condition != "no reuse",
    )
    session = session_of(
        tiny,
        num_blocks=24 if condition == "small cache" else 400,
        num_threads={"1 thread": 1, "16 threads": 16}.get(condition, 2),
    )
    batches = [[i] for i in order] if condition == "alone" else [order]
    done = {}
    with closing(Engine(session, config)) as engine:
        for batch in batches:
            done |= zip(batch, engine.generate([requests[i] for i in batch]), strict=True)
    assert (engine.stats.num_cached_tokens == 0) == (condition == "no reuse")
    assert [i for i in order if done[i] != base[i]] == []
