"""Scheduling: budgets never passed, spans never split, full steps, and every request ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.errors import PromptTooLongError, RecordError
from beam_gemma.kv_cache import KVCache
from beam_gemma.sampling import SamplingParams
from beam_gemma.scheduler import Scheduler
from beam_gemma.sequence import Request, Sequence, Status
from tests.fakes import fake_signature


def make_scheduler(
    *,
    max_num_seqs=4,
    max_num_batched_tokens=100,
    num_blocks=400,
    max_model_len=1000,
    optional_inputs=("span_ends",),
):
    signature = fake_signature(max_model_len=max_model_len, optional_inputs=optional_inputs)
    cache = KVCache(
        signature,
        num_blocks={"full": num_blocks, "sliding": num_blocks},
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    return Scheduler(cache, signature, max_num_batched_tokens=max_num_batched_tokens)


def make_request(num_prompt_tokens, max_tokens=5, spans=()):
    return Request(
        request_id="r",
        prompt_token_ids=(3,) * num_prompt_tokens,
        params=SamplingParams(max_tokens=max_tokens),
        spans=spans,
    )


def make_sequence(*arguments, **settings_):
    return Sequence(make_request(*arguments, **settings_), frozenset())


def apply(scheduler, step):
    """Move on as an engine does whose every row goes to `max_tokens`."""
    for sequence, num_new_tokens in step:
        gives_token = sequence.num_pending_tokens == num_new_tokens
        sequence.num_computed_tokens += num_new_tokens
        if gives_token and sequence.accept(7, 0.0):
            scheduler.finish(sequence)


def run_all(scheduler, limit=10_000):
    """Run to the end; return each step as [(prompt length, past, new)]."""
    steps = []
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        assert step, "a step does nothing"
        steps.append([(s.num_prompt_tokens, s.num_computed_tokens, n) for s, n in step])
        apply(scheduler, step)
        assert len(steps) < limit
    return steps


def check_step(step, *, max_num_seqs, max_num_batched_tokens):
    new = [n for _, _, n in step]
    assert min(new) >= 1
    assert len(step) <= max_num_seqs
    assert sum(new) <= max_num_batched_tokens
    assert len({past < prompt for prompt, past, _ in step}) == 1, "prefill and decode are mixed"
    assert len(new) * max(new) <= 1.5 * sum(new), "a step is mostly padding"


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(0, 9)), max_size=25
    ),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(6, 200),
    num_blocks=st.integers(25, 120),
)
def test_budgets_hold_and_every_request_ends(shapes, max_num_seqs, budget, num_blocks):
    scheduler = make_scheduler(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, num_blocks=num_blocks
    )
    arrivals = {}
    for prompt, max_tokens, arrival in shapes:
        arrivals.setdefault(arrival, []).append(make_sequence(prompt, max_tokens))
    for arrival in sorted(arrivals):
        scheduler.add(arrivals[arrival])
        step = scheduler.schedule()
        apply(scheduler, step)
    for step in run_all(scheduler):
        check_step(step, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    for sequence in (s for batch in arrivals.values() for s in batch):
        assert sequence.status is Status.FINISHED
        assert len(sequence.token_ids) == (
            sequence.num_prompt_tokens + sequence.request.params.max_tokens
        )
    assert scheduler._cache.num_free_slots == max_num_seqs
    assert scheduler._cache.num_free_blocks("full") == num_blocks - 1


@settings(max_examples=80, deadline=None)
@given(
    cuts=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 50)), max_size=6),
    tail=st.integers(1, 60),
    budget=st.integers(50, 120),
)
def test_a_chunk_never_ends_inside_a_span(cuts, tail, budget):
    spans, end = [], 0
    for gap, length in cuts:
        spans.append((end + gap, end + gap + length))
        end += gap + length
    scheduler = make_scheduler(max_num_batched_tokens=budget)
    scheduler.add([make_sequence(end + tail, spans=tuple(spans))])
    for step in run_all(scheduler):
        ((prompt, past, new),) = step
        assert new <= budget
        border = past + new
        assert border >= prompt or not any(a < border < b for a, b in spans)


def test_longest_prompts_of_a_submission_run_first_and_submissions_in_order():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add([make_sequence(n, 1) for n in (10, 30, 20)])
    scheduler.add([make_sequence(n, 1) for n in (40, 50)])
    assert [step[0][0] for step in run_all(scheduler)] == [30, 20, 10, 50, 40]


def test_prefill_goes_on_until_decode_is_full():
    scheduler = make_scheduler(max_num_seqs=3, max_num_batched_tokens=20)
    scheduler.add([make_sequence(15, 3) for _ in range(4)])
    kinds = [[new for _, _, new in step] for step in run_all(scheduler)]
    assert kinds == [[15], [15], [15], [1, 1, 1], [1, 1, 1], [15], [1], [1]]


def test_a_prefill_step_takes_all_that_fit():
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=100)
    scheduler.add([make_sequence(n) for n in (30, 28, 26, 20, 10)])
    assert [n for _, n in scheduler.schedule()] == [30, 28, 26]


def test_prompts_of_different_lengths_do_not_pad_each_other():
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=100)
    scheduler.add([make_sequence(n, 1) for n in (60, 20, 19, 5)])
    steps = [[n for _, _, n in step] for step in run_all(scheduler)]
    assert steps == [[60, 20], [19], [5]]


def test_a_long_prompt_is_cut_evenly():
    scheduler = make_scheduler(max_num_batched_tokens=100)
    scheduler.add([make_sequence(210, 1)])
    assert [step[0][2] for step in run_all(scheduler)] == [70, 70, 70]


def test_a_sequence_that_does_not_fit_waits_for_blocks():
    scheduler = make_scheduler(num_blocks=10)  # 9 blocks: 144 tokens
    scheduler.add([make_sequence(80, 17), make_sequence(60, 5)])
    steps = run_all(scheduler)
    assert [prompt for step in steps for prompt, _, _ in step].index(60) == 17
    assert all(len(step) == 1 for step in steps)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (make_request(0), RecordError, "at least one token"),
        (make_request(996, 5), PromptTooLongError, "prompt of 996 tokens.*at most 1,000.*1,001"),
        (make_request(200, 58), PromptTooLongError, "17 cache blocks of full, the cache has 16"),
        (make_request(200, spans=((10, 111),)), RecordError, "span of 101 tokens.*at most 100"),
    ],
)
def test_what_could_never_run_is_refused(request_, error, message):
    scheduler = make_scheduler(num_blocks=17)
    with pytest.raises(error, match=message):
        scheduler.check(request_)


def test_what_just_fits_is_not_refused():
    scheduler = make_scheduler(num_blocks=17)
    scheduler.check(make_request(200, 57))
    scheduler.check(make_request(200, spans=((10, 110),)))
    make_scheduler().check(make_request(995, 5))


@pytest.mark.parametrize("token", [-1, 97])
def test_a_token_that_the_model_lacks_is_refused(token):
    request = Request(
        request_id="r", prompt_token_ids=(3, token), params=SamplingParams(max_tokens=1)
    )
    with pytest.raises(RecordError, match=f"ids from 0 to 96, got .*{token}"):
        make_scheduler().check(request)


def test_spans_are_refused_where_the_model_takes_none():
    with pytest.raises(RecordError, match="one way"):
        make_scheduler(optional_inputs=()).check(make_request(20, spans=((0, 10),)))
