"""Steps on CUDA: prefill and decode apart, each token by the same of both, and steps ahead."""

import numpy as np
import pytest

from beam_gemma.engine.packing import pack
from beam_gemma.engine.sampling import SamplingParams, uniform_at
from beam_gemma.engine.sequence import Request, Sequence, Status
from beam_gemma.model.signature import PREFILL_ROWS
from tests.doubles.fakes import STATES
from tests.engine.test_scheduler import apply, make_scheduler, make_sequence, run_all

PAGED = STATES[:2]


def make(**options):
    return make_scheduler(**{"device": "cuda", "states": PAGED} | options)


def launch(step):
    """Have a step in flight."""
    for sequence, num_new_tokens in step:
        sequence.launch(num_new_tokens)
    return step


def lengths(step):
    return [n for _, n in step]


def test_prompts_fill_a_step_and_are_cut_for_it():
    scheduler = make(max_num_seqs=4, max_num_batched_tokens=100)
    scheduler.add([make_sequence(n, 1, token=n) for n in (90, 60, 30)])
    steps = [[(p, n) for p, _, n, _ in step] for step in run_all(scheduler)]
    assert steps == [[(90, 90), (60, 10)], [(60, 50), (30, 30)]]


def test_prefill_step_takes_no_more_prompts_than_it_has_rows():
    scheduler = make(max_num_seqs=100, max_num_batched_tokens=1000)
    scheduler.add([make_sequence(3, 1) for _ in range(100)])
    assert [len(step) for step in run_all(scheduler)] == [PREFILL_ROWS, 100 - PREFILL_ROWS]


@pytest.mark.parametrize(
    ("num_free", "prompt", "is_prefill"),
    [(1, 99, False), (1, 100, True), (2, 3, True), (1, 300, True)],
)
def test_decode_waits_for_prefill_of_two_free_slots_or_a_full_step(num_free, prompt, is_prefill):
    """With 32 slots: two free ones, or a full step."""
    scheduler = make(max_num_seqs=32, max_num_batched_tokens=100, max_model_len=400)
    scheduler.add([make_sequence(3, 20, token=4) for _ in range(32 - num_free)])
    apply(scheduler, scheduler.schedule())
    scheduler.add([make_sequence(prompt, 3)])
    step = scheduler.schedule()
    assert len(step) == (1 if is_prefill else 32 - num_free)
    assert step[0][0].is_prefilling == is_prefill


@pytest.mark.parametrize(
    ("num_seqs", "num_free", "prompts", "is_prefill"),
    [
        (32, 1, (60, 60), False),  # the second one finds no slot
        (64, 3, (99, 1), True),
        (64, 3, (100, 5), True),
        (64, 3, (60, 39), False),
    ],
)
def test_decode_waits_for_prompts_that_fill_a_step_in_the_slots_that_are_free(
    num_seqs, num_free, prompts, is_prefill
):
    """One slot of 32 and three of 64 are too few to prefill for their own sake."""
    scheduler = make(max_num_seqs=num_seqs, max_num_batched_tokens=100)
    scheduler.add([make_sequence(3, 20, token=4) for _ in range(num_seqs - num_free)])
    while scheduler.num_waiting:
        apply(scheduler, scheduler.schedule())
    scheduler.add([make_sequence(n, 3, token=n) for n in prompts])
    assert scheduler.schedule()[0][0].is_prefilling == is_prefill


def test_a_prompt_in_chunks_goes_on_while_it_fills_steps_and_then_waits_for_decode():
    scheduler = make(max_num_seqs=32, max_num_batched_tokens=100)
    scheduler.add([make_sequence(3, 20, token=4) for _ in range(31)])
    apply(scheduler, scheduler.schedule())
    scheduler.add([make_sequence(250, 3)])
    steps = []
    for _ in range(3):
        steps.append(scheduler.schedule())
        apply(scheduler, steps[-1])
    assert [lengths(step) for step in steps] == [[100], [100], [1] * 31]


def test_tokens_of_a_prompt_that_are_cached_do_not_fill_a_step():
    scheduler = make(max_num_seqs=32, max_num_batched_tokens=100)
    scheduler.add([make_sequence(81, 1, token=7)])
    run_all(scheduler)
    scheduler.add([make_sequence(3, 20, token=4) for _ in range(31)])
    apply(scheduler, scheduler.schedule())
    scheduler.add([make_sequence(100, 3, token=7)])
    assert lengths(scheduler.schedule()) == [1] * 31, "80 of 100 tokens are there"


@pytest.mark.parametrize("gathers", [False, True])
def test_a_step_gathers_no_more_tokens_than_the_longest_sequence_has(gathers):
    """Sequences find most of their tokens in the cache, and read them; two read 199 of 200."""
    scheduler = make(max_num_batched_tokens=100, max_model_len=200, gathered_heads=int(gathers))
    scheduler.add([make_sequence(81, 1, token=7)])
    run_all(scheduler)
    scheduler.add([make_sequence(n, 1, token=7) for n in (100, 99, 98)])
    steps = [[n for _, _, n, _ in step] for step in run_all(scheduler)]
    assert steps == ([[20, 3], [2]] if gathers else [[20, 3, 2]])


def test_a_sequence_alone_gathers_all_its_tokens():
    scheduler = make(max_num_batched_tokens=100, max_model_len=200, gathered_heads=1)
    scheduler.add([make_sequence(199, 1)])
    assert [len(step) for step in run_all(scheduler)] == [1, 1]


def test_a_step_is_filled_to_the_last_token():
    scheduler = make(max_num_batched_tokens=100)
    scheduler.add([make_sequence(n, 1, token=n) for n in (99, 5)])
    assert lengths(scheduler.schedule()) == [99, 1]


def scored(num_tokens, first_target):
    """Return a sequence with a target at each position from one on."""
    request = Request(
        request_id="r",
        prompt_token_ids=(3,) * num_tokens,
        params=SamplingParams(max_tokens=1),
        targets=tuple((position, 5) for position in range(first_target, num_tokens)),
    )
    return Sequence(request, frozenset())


@pytest.mark.parametrize(
    ("shapes", "steps"),
    [
        ([(300, 100)], [[164], [64], [64], [8]]),  # 200 targets
        ([(100, 30), (30, 20)], [[94], [6, 30]]),  # 70 and 10
        ([(30, 20), (100, 10)], [[30, 64], [36]]),  # 10 and 90
    ],
)
def test_a_prefill_step_has_no_more_targets_than_rows(shapes, steps):
    """PREFILL_ROWS is 64; the tokens before the first target that is too many are computed."""
    scheduler = make(max_num_batched_tokens=500, head="score", enable_prefix_caching=False)
    scheduler.add([scored(*shape) for shape in shapes])
    found = []
    while scheduler.has_unfinished:
        step = launch(scheduler.schedule())
        found.append(lengths(step))
        for sequence, num_new_tokens in step:
            sequence.settle(num_new_tokens)
            if not sequence.is_prefilling:
                scheduler.finish(sequence)
    assert found == steps


def test_prompts_start_once_nothing_decodes():
    scheduler = make(max_num_seqs=32, max_num_batched_tokens=100)
    scheduler.add([make_sequence(3, 2, token=4) for _ in range(31)])
    apply(scheduler, scheduler.schedule())
    scheduler.add([make_sequence(9, 1)])
    assert [len(step) for step in run_all(scheduler)] == [31, 1]


def test_preempted_rows_recompute_prompts_by_prefill_and_completions_by_decode():
    """The prompt by prefill, each token of the completion by decode."""
    scheduler = make(num_blocks=11, max_num_batched_tokens=200, enable_prefix_caching=False)
    scheduler.add([make_sequence(60, 90, token=1), make_sequence(59, 80, token=2)])
    steps = run_all(scheduler)
    assert scheduler.num_preemptions > 0
    for step in steps:
        assert len({is_prefill for *_, is_prefill in step}) == 1
        for prompt, past, new, is_prefill in step:
            assert (past < prompt) == is_prefill
            assert past + new <= prompt or new == 1


def test_only_blocks_of_prompts_are_found_again():
    scheduler = make(max_num_batched_tokens=200)
    scheduler.add([make_sequence(40, 60, token=7)])  # and what is chosen is 7 as well
    run_all(scheduler)
    scheduler.add([make_sequence(90, 3, token=7)])
    scheduler.schedule()
    assert scheduler.num_cached_tokens == 32


def test_scheduling_ahead_preempts_no_row_and_passes_no_end():
    scheduler = make(num_blocks=11, max_num_batched_tokens=200, enable_prefix_caching=False)
    rows = [make_sequence(64, 9, token=1), make_sequence(80, 9, token=2)]
    scheduler.add([*rows, make_sequence(9, 1, token=3)])
    launch(scheduler.schedule())
    assert [s for s, _ in scheduler.schedule(ahead=True)] == [], "four and five blocks of ten"
    assert all(row.status is Status.RUNNING for row in rows)
    scheduler = make(max_num_batched_tokens=200)
    short, long = make_sequence(9, 2, token=1), make_sequence(8, 3, token=2)
    scheduler.add([short, long])
    launch(scheduler.schedule())
    for expected in ([long, short], [long], []):
        assert [s for s, _ in launch(scheduler.schedule(ahead=True))] == expected


def test_blocks_of_a_window_are_kept_until_no_step_in_flight_may_run_again():
    scheduler = make(max_num_batched_tokens=200, max_model_len=400)
    row = make_sequence(54, 30)
    scheduler.add([row])
    apply(scheduler, scheduler.schedule())
    num_free = []
    for num_settled in (0, 0, 1):  # after 55 tokens the next one reaches back to the second block
        row.settle(num_settled)
        launch(scheduler.schedule(ahead=True))
        num_free.append(scheduler._cache.num_free_blocks("sliding"))
    assert num_free[0] == num_free[1] == num_free[2] - 1


def test_a_sequence_in_flight_keeps_its_slot_when_it_ends():
    scheduler = make(max_num_seqs=2)
    row = make_sequence(20, 9)
    scheduler.add([row])
    for ahead in (False, True):
        launch(scheduler.schedule(ahead=ahead))
    row.settle(20)
    scheduler.finish(row)
    assert row.slot >= 0
    assert scheduler.has_unfinished
    assert scheduler.schedule(ahead=True) == ()
    row.settle(1)
    scheduler.finish(row)
    assert row.slot == -1
    assert not scheduler.has_unfinished
    assert scheduler._cache.num_free_slots == 2


def drawn(num_tokens, **params):
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(range(10, 10 + num_tokens)),
        params=SamplingParams(max_tokens=9, **params),
        sampling_key=f"key {num_tokens}",
    )
    return Sequence(request, frozenset())


def test_a_step_says_where_tokens_are_and_how_to_choose():
    scheduler = make(enable_prefix_caching=False)
    rows = [
        drawn(5),
        drawn(4, temperature=0.5, top_k=7, top_p=0.9, seed=3),
        drawn(3, temperature=0.5),
    ]
    scheduler.add(rows)
    step = scheduler.schedule()
    signature, cache = scheduler._signature, scheduler._cache
    feeds = pack(step, signature, cache)
    assert feeds["token_slots"].tolist() == [-1] * 12
    assert feeds["logit_slots"].tolist() == [row.slot for row in rows]
    assert feeds["temperatures"].tolist() == [0, 0.5, 0], "the host draws from all tokens"
    assert feeds["top_ks"].tolist() == [1, 7, 1]
    assert feeds["top_ps"].tolist() == [1, np.float32(0.9), 1]
    assert feeds["uniforms"].tolist() == [0, np.float32(uniform_at(3, "key 4", 4)), 0]
    assert feeds["full_rows"].tolist() == [2]
    launch(step)
    feeds = pack(scheduler.schedule(ahead=True), signature, cache)
    assert feeds["input_ids"].tolist() == [0, 0, 0]
    assert feeds["token_slots"].tolist() == [row.slot for row in rows]
    assert feeds["uniforms"].tolist()[1] == np.float32(uniform_at(3, "key 4", 5))
    assert feeds["past_seqlens"].tolist() == [5, 4, 3]


def test_no_number_of_a_draw_is_rounded_to_one(monkeypatch):
    monkeypatch.setattr("beam_gemma.engine.packing.uniform_at", lambda *_: 1 - 2.0**-53)
    scheduler = make()
    scheduler.add([drawn(4, temperature=1.0, top_k=2)])
    feeds = pack(scheduler.schedule(), scheduler._signature, scheduler._cache)
    assert feeds["uniforms"].tolist() == [1 - 2.0**-24]


def test_a_last_token_of_a_prompt_is_not_taken_for_decode():
    scheduler = make(max_num_batched_tokens=16)
    scheduler.add([make_sequence(17, 3)])
    apply(scheduler, scheduler.schedule())
    for longest in (2, 1):
        step = scheduler.schedule()
        assert lengths(step) == [1]
        feeds = pack(step, scheduler._signature, scheduler._cache)
        assert feeds["attention_metadata"][0] == longest
        apply(scheduler, step)
