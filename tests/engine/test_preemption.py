"""Sequences that are put back or run alone: who goes, who goes along, and what is forgotten."""

import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request, Sequence, Status
from tests.engine.test_scheduler import PAGED, apply, make_scheduler, make_sequence, run_all


def make_row(token_ids, max_tokens=3):
    params = SamplingParams(max_tokens=max_tokens)
    request = Request(request_id="r", prompt_token_ids=tuple(token_ids), params=params)
    return Sequence(request, frozenset())


def take_free_blocks(scheduler, num_tokens):
    """Have a sequence that the scheduler does not know hold blocks."""
    cache = scheduler._cache
    prefix = cache.find_prefix(None, num_tokens, num_reusable_tokens=0)
    assert cache.admit(prefix, num_tokens, num_spare_blocks=0) is not None


def test_a_preempted_sequence_waits_with_nothing_computed():
    scheduler = make_scheduler()
    row = make_sequence(30, 9)
    scheduler.add([row])
    for count, isolated in ((1, True), (2, False)):
        apply(scheduler, scheduler.schedule())
        scheduler.preempt(row, isolated=isolated)
        assert row.status is Status.WAITING
        assert row.isolated, "until it has its next token, preempted again or not"
        assert (row.num_computed_tokens, row.num_settled_tokens) == (0, 0)
        assert scheduler.num_preemptions == count
        assert scheduler.num_waiting == 1


def test_of_three_running_sequences_the_newest_makes_room():
    scheduler = make_scheduler(num_blocks=10, max_num_batched_tokens=200)
    rows = [make_sequence(n, 40) for n in (32, 31, 30)]
    scheduler.add(rows)
    while not scheduler.num_preemptions:
        apply(scheduler, scheduler.schedule())
    assert [row.status for row in rows] == [Status.RUNNING, Status.RUNNING, Status.WAITING]


def test_sequences_that_count_on_blocks_of_a_failed_one_are_put_back_with_it():
    scheduler = make_scheduler(states=PAGED, max_num_batched_tokens=1000)
    first = make_row([3] * 100)
    second = make_row([3] * 64 + [4] * 36, 2)
    third = make_row([5] * 100, 1)
    scheduler.add([first, second, third])
    step = scheduler.schedule()
    assert [(s, s.num_cached_tokens) for s, _ in step] == [(first, 0), (second, 64), (third, 0)]
    scheduler.preempt(first, clean=False)
    assert [s.status for s in (first, second)] == [Status.WAITING] * 2
    assert third.status is Status.RUNNING
    assert scheduler.num_preemptions == 2
    scheduler.schedule()
    # Nothing of either was computed; the second shares again what the first computes now.
    assert [s.num_cached_tokens for s in (first, second)] == [0, 64]


def test_sequences_that_share_computed_blocks_stay_when_another_fails():
    scheduler = make_scheduler(states=PAGED, max_num_batched_tokens=1000)
    rows = [make_row([3] * 64 + [token] * 36) for token in (4, 5)]
    scheduler.add(rows)
    apply(scheduler, scheduler.schedule())
    scheduler.preempt(rows[0], clean=False)
    assert [row.status for row in rows] == [Status.WAITING, Status.RUNNING]


@pytest.mark.parametrize("is_first", [True, False])
def test_an_isolated_sequence_and_others_never_share_a_step(is_first):
    scheduler = make_scheduler(max_num_batched_tokens=1000)
    isolated, other = make_sequence(30, 9 if is_first else 1), make_sequence(30, 5)
    isolated.isolated = True
    scheduler.add([isolated, other])
    assert [s for s, _ in scheduler.schedule()] == [isolated if is_first else other]


def test_an_isolated_sequence_does_not_start_beside_a_step_in_flight():
    scheduler = make_scheduler(max_num_batched_tokens=1000)
    running, isolated = make_sequence(30, 9), make_sequence(30, 9)
    isolated.isolated = True
    scheduler.add([running])
    for sequence, num_new_tokens in scheduler.schedule():
        sequence.launch(num_new_tokens)
    scheduler.add([isolated])
    assert scheduler.schedule(ahead=True) == ((running, 1),)


def test_an_isolated_sequence_shares_no_block():
    scheduler = make_scheduler(states=PAGED)
    scheduler.add([make_sequence(80, 1)])
    run_all(scheduler)
    shared, isolated = make_sequence(80, 2), make_sequence(80, 1)
    isolated.isolated = True
    scheduler.add([shared, isolated])
    run_all(scheduler)
    assert (shared.num_cached_tokens, isolated.num_cached_tokens) == (64, 0)


def test_isolated_sequences_decode_one_at_a_time_on_cuda():
    scheduler = make_scheduler(device="cuda", max_num_seqs=2)
    rows = [make_sequence(20, 9) for _ in range(2)]
    scheduler.add(rows)
    for _ in range(4):
        apply(scheduler, scheduler.schedule())
    for row in rows:
        scheduler.preempt(row, clean=False, isolated=True)
    steps = run_all(scheduler)
    assert {len(step) for step in steps} == {1}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_of_a_prompt_are_scheduled_ahead_if_they_get_blocks(device):
    scheduler = make_scheduler(device=device, num_blocks=30, max_num_batched_tokens=100)
    row = make_sequence(300, 5)
    scheduler.add([row])
    for ahead in (False, True):
        ((sequence, num_new_tokens),) = scheduler.schedule(ahead=ahead)
        assert (sequence, num_new_tokens) == (row, 100)
        sequence.launch(num_new_tokens)
    take_free_blocks(scheduler, 16 * scheduler._cache.num_free_blocks("full"))
    assert scheduler.schedule(ahead=True) == ()
    assert row.status is Status.RUNNING
    assert scheduler.num_preemptions == 0
