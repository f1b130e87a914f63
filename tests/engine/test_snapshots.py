"""Snapshots of recurrent state: which prefixes get one, who makes it, and who starts from it.

The fake session's recurrent state is changed by every token, so a copy that is left out, is taken a
token too late, or belongs to another prefix gives other tokens.
"""

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.prefix import PrefixChain
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.scheduler import Scheduler
from beam_gemma.engine.sequence import Request, Sequence, Status
from beam_gemma.engine.snapshots import Snapshots
from beam_gemma.runtime.limits import EngineConfig
from tests.doubles.fakes import RAREST, RECURRENT, STATES, FakeSession, expected, fake_signature

SIZE = 16
"""Tokens of a block."""
BAD = RAREST
FIRST_SLOT = 8
"""First slot of a snapshot in tests of the scheduler."""


def tokens(count, seed):
    return tuple(np.random.default_rng((count, seed)).integers(1, RAREST, count).tolist())


def make_request(prompt, max_tokens=3, targets=()):
    params = SamplingParams(max_tokens=max_tokens)
    return Request(request_id="r", prompt_token_ids=tuple(prompt), params=params, targets=targets)


def planned(prompts):
    """Return the boundaries of sequences with these prompts."""
    sequences = [Sequence(make_request(prompt), frozenset()) for prompt in prompts]
    for sequence in sequences:
        sequence.begin(1)
        sequence.chain = PrefixChain(sequence.token_ids, SIZE)
    Snapshots([0]).plan(sequences)
    return [sequence.boundaries for sequence in sequences]


def make_scheduler(*, num_snapshots=4, budget=200, num_blocks=400, max_num_seqs=8, device="cpu"):
    signature = fake_signature(device=device, states=STATES)
    cache = KVCache(
        signature,
        num_blocks={"full": num_blocks, "sliding": num_blocks},
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )
    return Scheduler(
        cache,
        signature,
        max_num_batched_tokens=budget,
        enable_prefix_caching=True,
        snapshots=Snapshots(range(FIRST_SLOT, FIRST_SLOT + num_snapshots)),
    )


def add(scheduler, prompts, max_tokens=3):
    sequences = [Sequence(make_request(prompt, max_tokens), frozenset()) for prompt in prompts]
    scheduler.add(sequences)
    return sequences


def apply(scheduler, step):
    """Move on as an executor does; return the slots that states were copied to."""
    slots = []
    for sequence, num_new_tokens in step:
        sequence.snapshot_slot = -1
        gives_token = sequence.num_pending_tokens == num_new_tokens
        sequence.launch(num_new_tokens)
        sequence.settle(num_new_tokens)
        slots.append(scheduler.snapshot_to_take(sequence))
        if gives_token and sequence.accept(7, 0.0):
            scheduler.finish(sequence)
    return [slot for slot in slots if slot is not None]


def with_common(common, lengths, seed=0):
    """Return prompts that start alike and go on differently."""
    return [common + tokens(length, (seed, i)) for i, length in enumerate(lengths)]


def test_a_prefix_of_four_sequences_has_a_boundary_and_one_of_three_has_none():
    common = tokens(40, 1)
    assert planned(with_common(common, [9] * 4)) == [(32,)] * 4
    assert planned(with_common(common, [9] * 3)) == [()] * 3
    assert planned([*with_common(common, [20] * 3), tokens(50, 2)]) == [()] * 4


def test_a_boundary_lies_before_the_last_token():
    """The last token of a prompt is computed by each sequence, since it gives the next one."""
    assert planned([tokens(32, 1)] * 4) == [(16,)] * 4
    assert planned([tokens(33, 1)] * 4) == [(32,)] * 4
    assert planned([tokens(16, 1)] * 4) == [()] * 4


def test_a_prefix_with_four_longer_ones_has_a_boundary_too():
    """Four questions of four rows each, after one instruction; one row is on its own."""
    instruction = tokens(64, 1)
    prompts = []
    for question in range(4):
        prompts += with_common(instruction + tokens(32, (2, question)), [20] * 4, question)
    assert planned(prompts) == [(64, 96)] * 16
    alone = instruction + tokens(30, 3)
    # With three questions, only they and the row would start at the end of the instruction: four.
    assert planned([*prompts[:12], alone]) == [(64, 96)] * 12 + [(64,)]
    assert planned(prompts[:12]) == [(96,)] * 12


def test_a_boundary_lies_before_the_first_target():
    prompt = tokens(60, 1)
    sequences = [
        Sequence(
            make_request((*prompt, label), max_tokens=1, targets=((40, 5), (60, label))),
            frozenset(),
        )
        for label in range(4)
    ]
    for sequence in sequences:
        sequence.begin(1)
        sequence.chain = PrefixChain(sequence.token_ids, SIZE)
    Snapshots([0]).plan(sequences)
    assert {sequence.boundaries for sequence in sequences} == {(32,)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_sequence_makes_a_snapshot_and_the_others_wait_for_it(device):
    scheduler = make_scheduler(device=device)
    rows = add(scheduler, with_common(tokens(100, 1), [30, 29, 28, 27]))
    (other,) = add(scheduler, [tokens(60, 9)])
    maker = rows[0]
    step = scheduler.schedule()
    # The one that shares nothing passes those that wait.
    assert step == ((maker, 96), (other, 60))
    assert apply(scheduler, step) == [FIRST_SLOT]
    step = scheduler.schedule()
    prompts = [(s, s.num_computed_tokens, n) for s, n in step if s.is_prefilling]
    assert prompts == [(row, 96, 34 - i) for i, row in enumerate(rows)]
    assert [row.snapshot_slot for row in rows] == [-1, *[FIRST_SLOT] * 3]
    assert [row.num_cached_tokens for row in rows] == [0, 96, 96, 96]
    assert scheduler.num_cached_tokens == 3 * 96
    assert apply(scheduler, step) == []


def test_a_long_prefix_is_computed_in_chunks_up_to_its_end():
    scheduler = make_scheduler(budget=64)
    rows = add(scheduler, with_common(tokens(100, 1), [30] * 4))
    for past, new in ((0, 48), (48, 48)):
        step = scheduler.schedule()
        assert step == ((rows[0], new),)
        assert rows[0].num_computed_tokens == past
        slots = apply(scheduler, step)
    assert slots == [FIRST_SLOT]


def test_a_later_generation_starts_from_the_longest_snapshot():
    scheduler = make_scheduler(budget=1000)
    common = tokens(100, 1)
    rows = add(scheduler, with_common(common, [30] * 4, 1))
    rows += add(scheduler, with_common(common[:48], [9] * 4, 2))
    while scheduler.has_unfinished:
        apply(scheduler, scheduler.schedule())
    late = add(scheduler, [common + tokens(9, 5), common[:90] + tokens(9, 6), tokens(90, 7)])
    while scheduler.has_unfinished:
        apply(scheduler, scheduler.schedule())
    assert [row.num_cached_tokens for row in late] == [96, 48, 0]


def test_the_snapshot_used_the_longest_time_ago_is_replaced():
    scheduler = make_scheduler(num_snapshots=2)
    prefixes = [tokens(48, seed) for seed in range(3)]
    slots = []
    for prefix in (*prefixes[:2], prefixes[0], prefixes[2], prefixes[0], prefixes[1]):
        add(scheduler, with_common(prefix, [5] * 4))
        made = []
        while scheduler.has_unfinished:
            made += apply(scheduler, scheduler.schedule())
        slots.append(made)
    assert slots == [[8], [9], [], [9], [], [9]]


def test_at_most_half_of_the_slots_are_made_at_once():
    """The others would replace the first before the sequences that wait for it start."""
    scheduler = make_scheduler(num_snapshots=4)
    groups = [with_common(tokens(48, seed), [5] * 4) for seed in range(3)]
    add(scheduler, [prompt for prompts in groups for prompt in prompts])
    assert [n for _, n in scheduler.schedule()] == [48, 48]


@pytest.mark.parametrize("way", ["preempt", "finish"])
def test_another_sequence_makes_the_snapshot_if_the_first_is_put_back_or_ends(way):
    scheduler = make_scheduler(budget=80)
    rows = add(scheduler, with_common(tokens(100, 1), [30] * 4))
    apply(scheduler, scheduler.schedule())
    getattr(scheduler, way)(rows[0])
    maker = rows[0] if way == "preempt" else rows[1]
    made = []
    while not made:
        step = scheduler.schedule()
        assert [s for s, _ in step] == [maker]
        made = apply(scheduler, step)
    scheduler.schedule()
    assert {s.num_cached_tokens for s in rows if s.status is Status.RUNNING} == {0, 96}


def test_a_preempted_sequence_starts_again_from_a_snapshot():
    scheduler = make_scheduler(budget=200)
    rows = add(scheduler, with_common(tokens(100, 1), [30] * 4))
    for _ in range(3):
        apply(scheduler, scheduler.schedule())
    scheduler.preempt(rows[0])
    step = scheduler.schedule()
    assert (rows[0], rows[0].num_tokens - 96) in step
    assert rows[0].snapshot_slot == FIRST_SLOT
    scheduler.preempt(rows[0], clean=False, isolated=True)
    assert rows[0].snapshot_slot == -1


def test_a_snapshot_of_a_sequence_with_wrong_values_is_forgotten():
    scheduler = make_scheduler(budget=1000)
    rows = add(scheduler, with_common(tokens(100, 1), [30] * 4))
    apply(scheduler, scheduler.schedule())
    scheduler.preempt(rows[0], clean=False)
    assert scheduler.schedule() == ((rows[0], 96),)


def test_a_snapshot_is_of_no_use_without_the_blocks_before_it():
    scheduler = make_scheduler(budget=200, num_blocks=25)
    common = tokens(100, 1)
    add(scheduler, with_common(common, [30] * 4), max_tokens=1)
    while scheduler.has_unfinished:
        apply(scheduler, scheduler.schedule())
    add(scheduler, [tokens(380, 2)], max_tokens=1)  # takes all blocks
    while scheduler.has_unfinished:
        apply(scheduler, scheduler.schedule())
    add(scheduler, with_common(common, [30] * 4, 3))
    step = scheduler.schedule()
    # The others start in the very step that computes the blocks again.
    assert [(s.num_cached_tokens, n) for s, n in step] == [(0, 96), (96, 34), (96, 34), (96, 34)]
    assert apply(scheduler, step) == [FIRST_SLOT], "the same slot"


def test_an_isolated_sequence_neither_makes_nor_uses_nor_awaits_a_snapshot():
    scheduler = make_scheduler(budget=200)
    rows = add(scheduler, with_common(tokens(100, 1), [30] * 4))
    rows[0].isolated = True
    assert scheduler.schedule() == ((rows[0], 130),)
    apply(scheduler, scheduler.schedule())


def test_no_snapshot_is_made_without_prefix_caching():
    requests = [make_request(prompt) for prompt in with_common(tokens(100, 1), [30] * 5)]
    for enabled in (True, False):
        session = FakeSession()
        stats = run(session, requests, max_num_seqs=4, enable_prefix_caching=enabled)
        assert stats.num_cached_tokens == (4 * 96 if enabled else 0)
        assert bool(session.copied) == enabled


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("states", [STATES, STATES[1:], STATES[2:]])
def test_a_common_prefix_is_computed_once(device, states):
    """One row computes 500 tokens and its own 40; the other 31 the four left over and their own."""
    requests = [make_request(p) for p in with_common(tokens(500, 1), [40] * 32)]
    session = FakeSession(fake_signature(device=device, states=states), num_blocks=2000)
    stats = run(session, requests, max_num_seqs=8)
    assert stats.num_prompt_tokens == 540 + 31 * 44
    assert stats.num_cached_tokens == 31 * 496
    # One copy to the snapshot, in the first slot after the rows' or a later one, 31 back from it.
    slot = session.copied[0][1]
    assert slot >= 8
    assert [source for source, _ in session.copied[1:]] == [slot] * 31


def run(session, requests, **config):
    """Check each completion against the definition, and return the engine's counts."""
    with closing(Engine(session, EngineConfig(**config))) as engine:
        completions = engine.generate(requests)
        cache, snapshots = engine._scheduler._cache, engine._scheduler._snapshots
    assert session.faults == []
    for completion, request in zip(completions, requests, strict=True):
        assert completion == expected(session.signature, request)
    assert cache.num_free_slots == config["max_num_seqs"]
    assert not snapshots.is_making
    return engine.stats


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 60), st.integers(0, 2)),
        min_size=6,
        max_size=24,
    ),
    bad=st.sets(st.tuples(st.integers(0, 23), st.integers(0, 60)), max_size=2),
    failure=st.sampled_from(["none", "raises", "nan recurrent", "nan sliding", "now and then"]),
    device=st.sampled_from(["cpu", "cuda"]),
    max_num_seqs=st.integers(1, 5),
    num_snapshots=st.integers(0, 4),
    budget=st.integers(16, 200),
    num_blocks=st.integers(16, 40),
)
def test_rows_complete_as_if_alone_whatever_is_shared_and_whatever_fails(
    rows, bad, failure, device, max_num_seqs, num_snapshots, budget, num_blocks
):
    bad_at, requests = dict(bad), []
    for i, (prefix, own, long) in enumerate(rows):
        ids = list(tokens(56, 1) + tokens(40, (2, prefix)) * min(prefix, 1) + tokens(own, (3, i)))
        if i in bad_at and failure != "none":
            ids[min(bad_at[i], len(ids) - 1)] = BAD
        requests.append(make_request(ids, max_tokens=1 + 8 * long))
    poison = (failure.split()[1], BAD) if failure.startswith("nan") else None
    session = FakeSession(
        fake_signature(device=device),
        num_blocks=num_blocks,
        num_state_slots=max_num_seqs + num_snapshots + (device == "cuda"),
        poison=poison,
    )
    session.fails = {
        "raises": lambda _, ids: BAD in ids,
        "now and then": lambda step, _: step % 40 == 0,
    }.get(failure, session.fails)
    config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    with closing(Engine(session, config)) as engine:
        completions = engine.generate(requests)
        cache, snapshots = engine._scheduler._cache, engine._scheduler._snapshots
    assert session.faults == []
    assert cache.num_free_slots == max_num_seqs
    assert not snapshots.is_making
    for completion, request in zip(completions, requests, strict=True):
        if BAD in request.prompt_token_ids and failure != "now and then":
            assert completion.finish_reason == "error"
            assert ("NaN" in completion.error) == (poison is not None)
        else:
            assert completion == expected(session.signature, request)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("state", [RECURRENT, "sliding"])
def test_a_state_that_is_not_finite_reaches_no_other_row(device, state):
    """Two of six rows go bad after their common prefix, and others take over their slots."""
    prompts = [list(p) for p in with_common(tokens(64, 1), [20] * 6)]
    prompts[0][70] = prompts[3][80] = BAD
    prompts += [list(tokens(30, (5, i))) for i in range(4)]
    requests = [make_request(prompt, max_tokens=9) for prompt in prompts]
    session = FakeSession(fake_signature(device=device), poison=(state, BAD), num_state_slots=8)
    with closing(Engine(session, EngineConfig(max_num_seqs=2))) as engine:
        completions = engine.generate(requests)
    assert session.faults == []
    for i, (completion, request) in enumerate(zip(completions, requests, strict=True)):
        if i in (0, 3):
            assert "NaN" in completion.error
        else:
            assert completion == expected(session.signature, request)
    assert engine.stats.num_cached_tokens > 0


@pytest.mark.parametrize("state", [RECURRENT, "sliding"])
def test_all_rows_come_back_if_their_common_prefix_is_not_finite(state):
    """Each row that started from the bad snapshot is computed anew, and gets its own error."""
    common = (*tokens(40, 1), BAD, *tokens(40, 2))
    requests = [make_request(prompt) for prompt in with_common(common, [20] * 6)]
    requests.append(make_request(tokens(50, 3)))
    session = FakeSession(poison=(state, BAD), num_state_slots=8)
    with closing(Engine(session, EngineConfig(max_num_seqs=3))) as engine:
        *bad, good = engine.generate(requests)
    assert all("NaN" in completion.error for completion in bad)
    assert good == expected(session.signature, requests[-1])
    assert engine.stats.num_failed == 6


@pytest.mark.parametrize("number", range(1, 9))
def test_a_failed_step_makes_no_snapshot_and_costs_no_row(number):
    session = FakeSession(num_state_slots=8)
    session.fails = lambda step, _: step == number
    requests = [make_request(p) for p in with_common(tokens(100, 1), [30] * 5)]
    stats = run(session, requests, max_num_seqs=3, max_num_batched_tokens=64)
    assert len(session.steps) > number
    assert stats.num_failed == 0
    assert stats.num_preemptions > 0
