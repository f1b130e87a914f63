"""The engine over a fake session: every completion is the row's own, whatever runs beside it."""

import functools
import gc
import itertools
import random
import threading
import time
import weakref
from concurrent.futures import CancelledError
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import pytest

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.errors import EngineError, OptionsError
from beam_gemma.runtime.limits import EngineConfig
from tests.doubles.fakes import RAREST, STATES, FakeSession, expected, fake_signature

EOS = (5, 6)


def make_request(num_prompt_tokens, seed=0, *, spans=(), should_stop=None, **params):
    """Return a request whose prompt and row key follow from its length and seed."""
    prompt = np.random.default_rng((num_prompt_tokens, seed)).integers(0, RAREST, num_prompt_tokens)
    return Request(
        request_id=f"{num_prompt_tokens}-{seed}",
        prompt_token_ids=tuple(prompt.tolist()),
        params=SamplingParams(**{"max_tokens": 8} | params),
        sampling_key=f"row {seed}",
        should_stop=should_stop,
        logprob=seed != 1,
        spans=spans,
    )


def run(session, requests, **config):
    with closing(Engine(session, EngineConfig(eos_token_ids=EOS, **config))) as engine:
        completions = engine.generate(requests)
    assert session.faults == []
    return completions


@functools.cache
def right_completion(states, request):
    """Return what a request completes to over these states, with any cache and on any device."""
    return expected(fake_signature(states=states), request, eos_token_ids=EOS)


def assert_as_expected(completions, requests, signature):
    for completion, request in zip(completions, requests, strict=True):
        right = right_completion(tuple(signature.states), request)
        assert replace(completion, logprob=None) == replace(right, logprob=None)
        # Sums of at most 400 terms near -4, each rounded to float32 once on either side.
        assert completion.logprob == pytest.approx(right.logprob, abs=400 * 1e-6)


MIXED = [
    make_request(1),
    make_request(300, max_tokens=70),
    make_request(300, 1, temperature=1.0, top_k=5, top_p=0.9, max_tokens=30),
    make_request(129, spans=((3, 40), (60, 128)), temperature=0.5, ignore_eos=True),
    make_request(40, max_tokens=200, ignore_eos=True),
    make_request(41, temperature=1.0, max_tokens=20),
    make_request(12, temperature=2.0, top_p=0.5, seed=9),
    make_request(12, 2, stop_token_ids=tuple(range(40)), max_tokens=50),
    make_request(77, max_tokens=1),
    make_request(200, 3, max_tokens=150, temperature=1.0, top_k=3),
]
# Rows that begin as others do: a part of one, all of one and more, all of one.
MIXED += [
    replace(MIXED[5], prompt_token_ids=MIXED[1].prompt_token_ids[:280]),
    replace(MIXED[4], prompt_token_ids=MIXED[9].prompt_token_ids + MIXED[8].prompt_token_ids),
    replace(MIXED[1], sampling_key="twin"),
]
PAGED = STATES[:2]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("states", [STATES, STATES[:1], STATES[1:2], STATES[2:]])
def test_completions_are_those_of_the_definition(device, states):
    signature = fake_signature(device=device, states=states)
    completions = run(FakeSession(signature), MIXED, max_num_seqs=4, max_num_batched_tokens=100)
    assert_as_expected(completions, MIXED, signature)
    assert {c.finish_reason for c in completions} == {"stop", "length"}


@functools.cache
def mixed_alone(states):
    """Return each completion of a row that runs alone and in one chunk."""
    session = FakeSession(fake_signature(states=states))
    config = {"max_num_seqs": 1, "max_num_batched_tokens": 500, "enable_prefix_caching": False}
    return run(session, MIXED, **config)


@dataclass(frozen=True)
class Way:
    """One arrival order, engine and cache; all but the device and the states is drawn."""

    device: str
    states: tuple[object, ...]
    order: tuple[int, ...]
    cuts: tuple[int, ...]
    num_blocks: int
    config: EngineConfig

    @classmethod
    def drawn(cls, device, states, seed):
        rng = random.Random(seed)
        return cls(
            device=device,
            states=states,
            order=tuple(rng.sample(range(len(MIXED)), len(MIXED))),
            cuts=tuple(sorted(rng.choices(range(len(MIXED) + 1), k=seed % 4))),
            # A small pool every other time; the longest row needs 30 blocks.
            num_blocks=rng.randint(31, 45) if seed % 2 else rng.randint(46, 200),
            config=EngineConfig(
                max_num_seqs=rng.randint(1, 8) if seed else 1,
                max_num_batched_tokens=rng.randint(70, 400),
                eos_token_ids=EOS,
                enable_prefix_caching=seed % 3 > 0,
            ),
        )

    def run(self):
        """Return the completions in the order of `MIXED`, and the engine's stats."""
        signature = fake_signature(device=self.device, states=self.states)
        session = FakeSession(signature, num_blocks=self.num_blocks)
        borders = [0, *self.cuts, len(self.order)]
        with closing(Engine(session, self.config)) as engine:
            futures = []
            for start, end in itertools.pairwise(borders):
                futures += engine.submit([MIXED[i] for i in self.order[start:end]])
            completions = dict(zip(self.order, (f.result() for f in futures), strict=True))
        assert session.faults == []
        return [completions[i] for i in range(len(MIXED))], engine.stats


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("states", [PAGED, STATES], ids=["paged", "recurrent too"])
def test_results_depend_on_the_row_alone(device, states):
    """Any arrival order, pools and chunks give the same tokens and the same bits of logprob."""
    num_preemptions, num_cached_tokens = 0, 0
    for seed in range(4):
        way = Way.drawn(device, states, seed)
        completions, stats = way.run()
        assert completions == mixed_alone(states), way
        num_preemptions += stats.num_preemptions
        num_cached_tokens += stats.num_cached_tokens
    assert num_preemptions > 0
    # With recurrent state, a prefix is shared by four rows or more, which here none is.
    assert (num_cached_tokens > 0) == (states == PAGED)


def test_a_small_cache_preempts_and_changes_nothing():
    """Six rows that need 19 blocks each, in 40."""
    requests = [make_request(160, seed, max_tokens=140, ignore_eos=True) for seed in range(6)]
    for states in (PAGED, STATES):
        signature = fake_signature(states=states)
        session = FakeSession(signature, num_blocks=41)
        engine = Engine(session, EngineConfig(max_num_seqs=8))
        completions = engine.generate(requests)
        engine.close()
        assert engine.stats.num_preemptions > 0
        assert_as_expected(completions, requests, signature)
        assert session.faults == []


def test_a_common_prefix_is_computed_once():
    """One row computes 500 tokens and its own 40; the other 31 the four left over and their own."""
    common = make_request(500, 99).prompt_token_ids
    rows = [make_request(40, seed, ignore_eos=True) for seed in range(32)]
    requests = [replace(r, prompt_token_ids=common + r.prompt_token_ids) for r in rows]
    prompt_tokens = {}
    for enabled in (True, False):
        session = FakeSession(fake_signature(states=PAGED), num_blocks=2000)
        config = EngineConfig(max_num_seqs=8, enable_prefix_caching=enabled)
        engine = Engine(session, config)
        completions = engine.generate(requests)
        engine.close()
        assert_as_expected(completions, requests, session.signature)
        stats = engine.stats
        assert stats.num_prompt_tokens + stats.num_cached_tokens == 32 * 540
        prompt_tokens[enabled] = stats.num_prompt_tokens
    assert prompt_tokens == {True: 540 + 31 * 44, False: 32 * 540}


def test_the_first_step_is_full():
    session = FakeSession()
    run(session, [make_request(4, seed, ignore_eos=True) for seed in range(8)], max_num_seqs=8)
    assert session.steps[0] == [(0, 4)] * 8
    assert session.steps[1] == [(4, 1)] * 8


def test_threads_share_steps():
    """Eight callers of eight requests each take little more than the steps of one caller."""
    session = FakeSession()
    session.go.clear()
    requests = [make_request(20, seed, max_tokens=30, ignore_eos=True) for seed in range(64)]
    results = {}
    engine = Engine(session, EngineConfig(max_num_seqs=64, max_num_batched_tokens=2000))

    def call(caller):
        results[caller] = engine.generate(requests[8 * caller : 8 * caller + 8])

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
    for thread in threads:
        thread.start()
    while engine.stats.num_requests < 64:
        time.sleep(0.001)
    session.go.set()
    for thread in threads:
        thread.join()
    stats = engine.stats
    engine.close()
    for caller in range(8):
        mine = requests[8 * caller : 8 * caller + 8]
        for completion, request in zip(results[caller], mine, strict=True):
            assert completion.token_ids == expected(session.signature, request).token_ids
    # The first caller's prompts may run alone, and its first tokens beside the others' prompts.
    assert stats.num_decode_steps == 29
    assert stats.num_prefill_steps <= 2
    assert stats.occupancy > 0.99


def test_requests_join_a_running_batch():
    session = FakeSession()
    first_token = threading.Event()
    engine = Engine(session, EngineConfig(max_num_seqs=4))
    long = make_request(
        10, max_tokens=400, ignore_eos=True, should_stop=lambda _: first_token.set() or False
    )
    (future,) = engine.submit([long])
    assert first_token.wait(60)
    late = engine.generate([make_request(5, seed) for seed in range(3)])
    assert not future.done(), "the late ones did not wait for the early one"
    for seed, completion in enumerate(late):
        right = expected(session.signature, make_request(5, seed))
        assert completion.token_ids == right.token_ids
    assert future.result().token_ids == expected(session.signature, long).token_ids
    engine.close()


def test_should_stop_sees_each_token_in_order_and_keeps_the_last():
    seen = []

    def stop_after_three(token_id):
        seen.append(token_id)
        return len(seen) == 3

    request = make_request(9, max_tokens=50, ignore_eos=True, should_stop=stop_after_three)
    (completion,) = run(FakeSession(), [request])
    assert completion.token_ids == tuple(seen)
    assert len(seen) == 3
    assert completion.finish_reason == "stop"


def test_end_tokens_stop_and_stay_out():
    request = make_request(9, max_tokens=50)
    script = FakeSession(next_token=lambda ids: EOS[0] if len(ids) == 12 else 30)
    (completion,) = run(script, [request])
    assert (completion.token_ids, completion.finish_reason) == ((30, 30, 30), "stop")
    script = FakeSession(next_token=lambda ids: EOS[0] if len(ids) == 12 else 30)
    ignoring = replace(request, params=replace(request.params, ignore_eos=True, max_tokens=5))
    (completion,) = run(script, [ignoring])
    assert (completion.token_ids, completion.finish_reason) == ((30, 30, 30, 5, 30), "length")


def test_a_request_that_cannot_run_is_an_error_of_its_own():
    session = FakeSession()
    good = make_request(10)
    bad = [make_request(993, max_tokens=8), make_request(0), replace(good, prompt_token_ids=(97,))]
    completions = run(session, [bad[0], good, *bad[1:]])
    assert_as_expected([completions[1]], [good], session.signature)
    for completion in (completions[0], *completions[2:]):
        assert completion.finish_reason == "error"
        assert completion.token_ids == ()
    assert "at most 1,000" in completions[0].error
    assert "at least one token" in completions[2].error
    assert "from 0 to 96" in completions[3].error


def test_should_stop_that_raises_ends_its_row_only():
    def broken(_):
        raise KeyError("decoder")

    requests = [make_request(10), make_request(11, should_stop=broken), make_request(12)]
    session = FakeSession()
    completions = run(session, requests)
    assert completions[1].finish_reason == "error"
    assert completions[1].error == "should_stop: KeyError: 'decoder'"
    assert_as_expected(completions[::2], requests[::2], session.signature)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("group", ["full", "sliding"])
@pytest.mark.parametrize("place", [0, 50, 299])
def test_a_nan_stays_in_its_row(device, group, place):
    """Neighbours and the next users of every block it touched complete as if it had not run."""
    signature = fake_signature(device=device)
    # Pools hold just two of these sequences, so that blocks go from hand to hand.
    session = FakeSession(signature, num_blocks=2 * 24 + 1, poison=(group, RAREST))
    poisoned = make_request(300, 1, max_tokens=60, ignore_eos=True)
    ids = list(poisoned.prompt_token_ids)
    ids[place] = RAREST
    poisoned = replace(poisoned, prompt_token_ids=tuple(ids))
    others = [make_request(290, seed, max_tokens=60, ignore_eos=True) for seed in range(6)]
    completions = run(session, [poisoned, *others], max_num_seqs=3, max_num_batched_tokens=100)
    assert_as_expected(completions[1:], others, signature)
    assert completions[0].finish_reason == "error"
    assert "NaN" in completions[0].error
    assert completions[0].token_ids == ()


def test_an_exception_of_the_session_fails_all_and_closes_the_engine():
    session = FakeSession()
    session.fails = lambda step, _: step > 3
    engine = Engine(session, EngineConfig(max_num_seqs=2))
    futures = engine.submit([make_request(10, s, ignore_eos=True) for s in range(5)])
    for future in futures:
        with pytest.raises(EngineError, match="RuntimeError: the device is gone") as caught:
            future.result(timeout=200)
        assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(EngineError, match="the device is gone"):
        engine.generate([make_request(3)])
    engine.close()


def test_close_finishes_what_was_submitted_and_refuses_more():
    session = FakeSession()
    session.go.clear()
    engine = Engine(session, EngineConfig(max_num_seqs=2))
    futures = engine.submit([make_request(10, s) for s in range(5)])
    closer = threading.Thread(target=engine.close)
    closer.start()
    session.go.set()
    closer.join()
    assert all(future.done() for future in futures)
    with pytest.raises(EngineError, match="closed"):
        engine.submit([make_request(3)])


def test_a_closed_engine_lets_go_of_its_session():
    """At once: the next one may need the memory."""
    session = FakeSession()
    gone = weakref.ref(session)
    engine = Engine(session, EngineConfig(max_num_seqs=2))
    engine.generate([make_request(9)])
    del session
    gc.disable()
    try:
        engine.close()
        assert gone() is None
    finally:
        gc.enable()


def test_drain_finishes_what_runs_and_gives_up_what_waits():
    session = FakeSession()
    session.go.clear()
    engine = Engine(session, EngineConfig(max_num_seqs=2))
    requests = [make_request(10, s, max_tokens=4, ignore_eos=True) for s in range(5)]
    futures = engine.submit(requests)
    while not engine._scheduler._running:
        time.sleep(0.001)
    engine.drain()
    with pytest.raises(EngineError, match="closed"):
        engine.submit([make_request(3)])
    session.go.set()
    engine.close()
    assert [isinstance(f.exception(), CancelledError) for f in futures] == [False] * 2 + [True] * 3
    assert_as_expected([f.result() for f in futures[:2]], requests[:2], session.signature)
    assert engine.stats.num_tokens == 2 * (10 + 4)


def test_stats_count_what_ran():
    requests = [make_request(n, max_tokens=4, ignore_eos=True) for n in (30, 25)]
    engine = Engine(FakeSession(), EngineConfig(max_num_seqs=4))
    engine.generate([*requests, make_request(0)])
    engine.close()
    stats = engine.stats
    assert (stats.num_requests, stats.num_finished, stats.num_failed) == (3, 3, 1)
    assert (stats.num_prefill_steps, stats.num_decode_steps) == (1, 3)
    assert (stats.num_prompt_tokens, stats.num_completion_tokens) == (55, 8)
    assert stats.occupancy == 0.5
    assert stats.backlog_occupancy == 0, "nobody waited"


def test_occupancy_under_backlog_leaves_out_the_end():
    requests = [make_request(9, seed, max_tokens=4, ignore_eos=True) for seed in range(5)]
    engine = Engine(FakeSession(), EngineConfig(max_num_seqs=2))
    engine.generate(requests)
    engine.close()
    stats = engine.stats
    assert (stats.num_decode_steps, stats.num_decode_rows) == (9, 15)
    assert (stats.num_backlog_decode_steps, stats.num_backlog_decode_rows) == (6, 12)
    assert stats.backlog_occupancy == 1


def test_no_requests_have_no_completions():
    assert run(FakeSession(), []) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 7}, "max_num_batched_tokens"),
    ],
)
def test_impossible_settings_are_refused(config, message):
    with pytest.raises(OptionsError, match=message):
        EngineConfig(**config)


def test_too_few_state_slots_are_refused():
    with pytest.raises(OptionsError, match="at most the session's 8 state slots, got 9"):
        Engine(FakeSession(num_state_slots=8), EngineConfig(max_num_seqs=9))
