"""Scheduling: budgets never passed, spans never split, full steps, and every request ends."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.scheduler import Scheduler
from beam_gemma.engine.sequence import Request, Sequence, Status
from tests.doubles.fakes import STATES, fake_signature

PAGED = STATES[:2]


def make_scheduler(
    *,
    max_num_seqs=4,
    max_num_batched_tokens=100,
    num_blocks=400,
    max_model_len=1000,
    enable_prefix_caching=True,
    **signature,
):
    signature = fake_signature(max_model_len=max_model_len, **signature)
    cache = KVCache(
        signature,
        num_blocks={"full": num_blocks, "sliding": num_blocks},
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    return Scheduler(
        cache,
        signature,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
    )


def make_request(num_prompt_tokens, max_tokens=5, spans=(), token=3):
    return Request(
        request_id="r",
        prompt_token_ids=(token,) * num_prompt_tokens,
        params=SamplingParams(max_tokens=max_tokens),
        spans=spans,
    )


def make_sequence(*arguments, **settings_):
    return Sequence(make_request(*arguments, **settings_), frozenset())


def apply(scheduler, step):
    """Move on as an engine does whose every row goes to `max_tokens`."""
    for sequence, num_new_tokens in step:
        gives_token = sequence.num_pending_tokens == num_new_tokens
        sequence.launch(num_new_tokens)
        sequence.settle(num_new_tokens)
        if gives_token and sequence.accept(7, 0.0):
            scheduler.finish(sequence)


def run_all(scheduler, limit=10_000):
    """Run to the end; return each step as [(prompt length, past, new, still in the prompt)]."""
    steps = []
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        assert step, "a step does nothing"
        assert all(s.status is Status.RUNNING for s, _ in step)
        assert len({s.slot for s, _ in step}) == len(step)
        steps.append(
            [(s.num_prompt_tokens, s.num_computed_tokens, n, s.is_prefilling) for s, n in step]
        )
        apply(scheduler, step)
        assert len(steps) < limit
    return steps


def padded_area(lengths):
    """Return the area of attention's query tiles, by its definition."""
    num_tiles = -(-max(lengths) // 64)
    tile = -(-max(lengths) // num_tiles)
    return tile * sum(-(-n // tile) for n in lengths)


def check_step(step, *, max_num_seqs, max_num_batched_tokens, device="cpu"):
    new = [n for _, _, n, _ in step]
    assert min(new) >= 1
    assert len(step) <= max_num_seqs
    assert sum(new) <= max_num_batched_tokens
    if device == "cpu":
        assert padded_area(new) <= 1.5 * sum(new), "a step is mostly padding"


@settings(max_examples=120, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(
            st.integers(1, 300), st.integers(1, 40), st.integers(0, 9), st.sampled_from([3, 3, 4])
        ),
        max_size=25,
    ),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(6, 200),
    num_blocks=st.integers(22, 80),
    device=st.sampled_from(["cpu", "cuda"]),
    states=st.sampled_from([PAGED, STATES]),
    enable_prefix_caching=st.booleans(),
)
def test_budgets_hold_and_every_request_ends(
    shapes, max_num_seqs, budget, num_blocks, device, states, enable_prefix_caching
):
    """Down to the smallest cache that holds the longest row."""
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget}
    scheduler = make_scheduler(
        **limits,
        num_blocks=num_blocks,
        device=device,
        states=states,
        enable_prefix_caching=enable_prefix_caching,
    )
    arrivals = {}
    for prompt, max_tokens, arrival, token in shapes:
        sequence = make_sequence(prompt, max_tokens, token=token)
        scheduler.check(sequence.request)
        arrivals.setdefault(arrival, []).append(sequence)
    for arrival in sorted(arrivals):
        scheduler.add(arrivals[arrival])
        apply(scheduler, scheduler.schedule())
    for step in run_all(scheduler):
        check_step(step, **limits, device=device)
    for sequence in (s for batch in arrivals.values() for s in batch):
        assert sequence.status is Status.FINISHED
        assert len(sequence.token_ids) == (
            sequence.num_prompt_tokens + sequence.request.params.max_tokens
        )
    assert scheduler._cache.num_free_slots == max_num_seqs
    for group in ("full", "sliding"):
        assert scheduler._cache.num_free_blocks(group) == num_blocks - 1


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
    for ((_, past, new, _),) in run_all(scheduler):
        assert new <= budget
        assert not any(a < past + new < b for a, b in spans)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), length=st.integers(1, 100), start=st.integers(0, 40))
def test_a_chunk_is_halved_between_blocks_and_outside_of_spans(data, length, start):
    borders = sorted(data.draw(st.sets(st.integers(start, start + length), max_size=8)))
    spans = tuple(itertools.islice(itertools.pairwise(borders), 0, None, 2))
    sequence = make_sequence(start + length, spans=spans)
    sequence.num_computed_tokens = start
    cut = start + sequence.middle(length, 16)
    places = [p for p in range(start + 1, start + length) if p % 16 == 0]
    places = [p for p in places if not any(a < p < b for a, b in spans)]
    halfway = start + length / 2
    assert cut in places or (not places and cut == start)
    assert all(abs(cut - halfway) <= abs(p - halfway) for p in places)


def first_steps(scheduler):
    """Return the prompt lengths in the order in which they first run."""
    return list(dict.fromkeys(prompt for step in run_all(scheduler) for prompt, *_ in step))


def test_the_rows_with_most_steps_run_first():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add([make_sequence(*shape) for shape in ((10, 2), (30, 1), (20, 2), (40, 1))])
    assert first_steps(scheduler) == [20, 10, 40, 30]


def test_rows_that_share_their_first_block_run_together():
    scheduler = make_scheduler(max_num_seqs=1, states=PAGED)
    rows = [(20, 9, 3), (21, 1, 3), (22, 8, 4), (23, 7, 3), (24, 6, 4), (10, 7, 4), (12, 9, 4)]
    rows.append((16, 2, 3))  # one full block
    scheduler.add([make_sequence(n, m, token=token) for n, m, token in rows])
    # 10 and 12 have no full block, so nothing to share.
    assert first_steps(scheduler) == [20, 23, 16, 21, 12, 22, 24, 10]


def test_a_row_that_arrives_late_waits_for_the_next_generation():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add([make_sequence(n, 1) for n in (10, 30)])
    apply(scheduler, scheduler.schedule())
    for batch in ((40, 60), (50,)):
        scheduler.add([make_sequence(n, 1) for n in batch])
    assert first_steps(scheduler) == [10, 60, 50, 40]


def test_all_that_wait_are_dropped_and_what_runs_goes_on():
    scheduler = make_scheduler(max_num_seqs=1)
    rows = [make_sequence(n, 3) for n in (40, 30, 20, 10)]
    scheduler.add(rows[:2])
    apply(scheduler, scheduler.schedule())
    scheduler.add(rows[2:])
    assert scheduler.num_waiting == 3
    assert scheduler.drop_waiting() == rows[1:]
    assert scheduler.num_waiting == 0
    assert scheduler.drop_waiting() == []
    late = make_sequence(50, 1)
    scheduler.add([late])
    assert first_steps(scheduler) == [40, 50]


def test_prefill_goes_on_until_decode_is_full():
    scheduler = make_scheduler(max_num_seqs=3, max_num_batched_tokens=20)
    scheduler.add([make_sequence(15, 3) for _ in range(4)])
    kinds = [[new for _, _, new, _ in step] for step in run_all(scheduler)]
    assert kinds == [[15], [15], [15], [1, 1, 1], [1, 1, 1], [15], [1], [1]]


def test_uneven_prompts_share_a_step_where_tiles_are_full():
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=1000)
    scheduler.add([make_sequence(n) for n in (300, 120, 60, 30, 20)])
    # Tiles of 60: 5, 2, 1, 1 and 1 of them are 600 for 530 tokens.
    assert [n for _, n in scheduler.schedule()] == [300, 120, 60, 30, 20]
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=1000)
    scheduler.add([make_sequence(n) for n in (65, 33, 33, 33, 33)])
    # Tiles of 33: two and four of them are 198 for 197 tokens.
    assert [n for _, n in scheduler.schedule()] == [65, 33, 33, 33, 33]


def test_a_step_is_never_mostly_padding():
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=1000)
    scheduler.add([make_sequence(n, 1) for n in (60, 20, 19, 5)])
    # 60 + 20 + 19: three tiles of 60 are 180 for 99 tokens.
    steps = [[n for _, _, n, _ in step] for step in run_all(scheduler)]
    assert steps == [[60, 20], [19], [5]]


def test_a_long_prompt_is_cut_evenly_and_others_join_it_whole():
    scheduler = make_scheduler(max_num_batched_tokens=100)
    scheduler.add([make_sequence(n, 1) for n in (210, 31, 30)])
    steps = [[(p, n) for p, _, n, _ in step] for step in run_all(scheduler)]
    assert steps == [[(210, 70)], [(210, 70)], [(210, 70)], [(31, 31), (30, 30)]]


def test_a_short_prompt_joins_the_chunk_of_a_long_one():
    scheduler = make_scheduler(max_num_batched_tokens=200)
    scheduler.add([make_sequence(n, 1) for n in (250, 40, 35)])
    steps = [[(p, n) for p, _, n, _ in step] for step in run_all(scheduler)]
    # Tiles of 63: two of the long prompt and one each of the others are 252 for 200 tokens.
    assert steps == [[(250, 125), (40, 40), (35, 35)], [(250, 125)]]


def test_decode_rows_join_a_prompt_only_where_nothing_is_padded_for_them():
    scheduler = make_scheduler(max_num_seqs=8)
    scheduler.add([make_sequence(30, 20) for _ in range(3)])
    for _ in range(2):
        apply(scheduler, scheduler.schedule())
    scheduler.add([make_sequence(64, 3)])
    assert [n for _, n in scheduler.schedule()] == [64]


def test_a_few_decode_rows_join_a_large_prompt_on_the_cpu():
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=400)
    scheduler.add([make_sequence(30, 20) for _ in range(2)])
    apply(scheduler, scheduler.schedule())
    scheduler.add([make_sequence(320, 3)])
    # Tiles of 64: 5 and 2 of them are 448 for 322 tokens.
    assert [n for _, n in scheduler.schedule()] == [320, 1, 1]


def test_chunks_shrink_as_the_context_grows_down_to_one_tile(monkeypatch):
    monkeypatch.setattr("beam_gemma.engine.scheduler.MAX_CHUNK_AREA", 200 * 192)
    scheduler = make_scheduler(max_num_batched_tokens=200)
    scheduler.add([make_sequence(600, 1)])
    # Three tiles are 192 tokens, of which 600 make four chunks; 450 and less are cut by one tile.
    chunks = [n for ((_, _, n, _),) in run_all(scheduler)]
    assert chunks == [150, 57, 57, 56, 56, 56, 56, 56, 56]


def test_chunks_shrink_around_spans_but_not_within(monkeypatch):
    monkeypatch.setattr("beam_gemma.engine.scheduler.MAX_CHUNK_AREA", 1)
    scheduler = make_scheduler(max_num_batched_tokens=200)
    scheduler.add([make_sequence(630, 1, spans=((400, 600),))])
    assert [n for ((_, _, n, _),) in run_all(scheduler)] == [*[63] * 6, 22, 200, 30]


@pytest.mark.parametrize(("num_forced", "step"), [(0, [320, 1]), (1, [320]), (17, [320])])
def test_decode_rows_join_a_prompt_only_if_blocks_are_left_for_them(num_forced, step):
    """The prompt takes 20 blocks and leaves one, which holds one token or 16 after a full block."""
    scheduler = make_scheduler(num_blocks=24, max_num_batched_tokens=400)
    row = make_sequence(30, 40)
    scheduler.add([row])
    apply(scheduler, scheduler.schedule())
    row.token_ids += [7] * num_forced
    scheduler.add([make_sequence(320, 3)])
    assert [n for _, n in scheduler.schedule()] == step


def test_forced_tokens_are_computed_with_the_one_before_them_while_the_step_has_room():
    scheduler = make_scheduler(max_num_batched_tokens=20)
    rows = [make_sequence(5, 40) for _ in range(3)]
    scheduler.add(rows)
    apply(scheduler, scheduler.schedule())
    for row in rows:
        row.token_ids += [7] * 8
    assert [n for _, n in scheduler.schedule()] == [9, 9, 2]


def test_blocks_of_a_single_group_are_shared():
    scheduler = make_scheduler(states=PAGED[:1], max_num_batched_tokens=1000)
    scheduler.add([make_sequence(n, 5) for n in (180, 179)])
    assert [n for _, n in scheduler.schedule()] == [180, 3]


def test_rows_that_share_a_prefix_start_in_the_step_that_computes_it():
    scheduler = make_scheduler(max_num_seqs=4, states=PAGED, max_num_batched_tokens=1000)
    scheduler.add([make_sequence(n, 5) for n in (500, 499, 498, 497)])
    step = scheduler.schedule()
    assert [(s.num_cached_tokens, n) for s, n in step] == [(0, 500), (496, 3), (496, 2), (496, 1)]
    assert scheduler.num_cached_tokens == 3 * 496


def test_a_prefix_is_not_shared_before_it_is_scheduled():
    """A chunk of the first prompt is in this step; what comes after it is not there yet."""
    scheduler = make_scheduler(max_num_seqs=4, states=PAGED, max_num_batched_tokens=200)
    scheduler.add([make_sequence(300, 5), make_sequence(190, 5)])
    step = scheduler.schedule()
    assert [(s.num_computed_tokens, n) for s, n in step] == [(0, 150), (144, 46)]


@pytest.mark.parametrize("states", [PAGED, STATES])
def test_sequences_of_a_cuda_step_lie_side_by_side_in_few_places(states):
    """A step with recurrent state is as wide as its longest sequence, for each of them."""
    scheduler = make_scheduler(
        device="cuda", states=states, max_num_seqs=16, enable_prefix_caching=False
    )
    scheduler.add([make_sequence(n, 1) for n in (150, 60, 40, 20, *[3] * 12)])
    steps = [[new for _, _, new, _ in step] for step in run_all(scheduler)]
    assert sum(map(sum, steps)) == 306
    places = max(len(step) * max(step) for step in steps)
    if states is PAGED:
        assert places > 4 * 100
    else:
        assert places == 4 * 100
        assert any(len(step) > 4 for step in steps)


@pytest.mark.parametrize(
    "settings_", [{"enable_prefix_caching": False}, {"states": STATES}, {"states": ()}]
)
def test_no_prefix_is_shared_without_prefix_caching_or_with_recurrent_states(settings_):
    scheduler = make_scheduler(**{"states": PAGED, "max_num_batched_tokens": 1000} | settings_)
    scheduler.add([make_sequence(n, 5) for n in (180, 179)])
    assert [n for _, _, n, _ in run_all(scheduler)[0]] == [180, 179]


@pytest.mark.parametrize(
    ("states", "spans", "steps"),
    [
        # All 176 tokens in full blocks, those of the span included.
        (PAGED[:1], [((20, 150),)] * 2, [180, 3]),
        (PAGED[:1], [((20, 180),), ((20, 179),)], [180, 163]),
        (PAGED[:1], [((20, 150),), ()], [180, 163]),
        # A token of the span attends to blocks that a window of 40 may have left behind.
        (PAGED, [((0, 150),)] * 2, [180, 147]),
    ],
)
def test_rows_share_a_span_if_all_of_it_is_equal(states, spans, steps):
    scheduler = make_scheduler(states=states, max_num_batched_tokens=1000)
    rows = zip((180, 179), spans, strict=True)
    scheduler.add([make_sequence(n, 5, spans=span) for n, span in rows])
    assert [n for _, n in scheduler.schedule()] == steps


def test_admission_reserves_nothing_and_the_newest_makes_room():
    scheduler = make_scheduler(num_blocks=11, max_num_batched_tokens=200)  # 160 tokens
    older, newer = make_sequence(60, 90), make_sequence(59, 80)
    scheduler.add([older, newer])
    steps = run_all(scheduler)
    assert [p for p, *_ in steps[0]] == [60, 59], "both start, though both cannot end"
    assert scheduler.num_preemptions == 1
    assert older.status is newer.status is Status.FINISHED
    recomputed = [row[:3] for step in steps[1:] for row in step if row[2] > 1]
    assert recomputed == [(59, 0, 80)], "all that it had when the older one found no block"


def test_a_row_waits_where_a_running_one_would_soon_push_it_out():
    scheduler = make_scheduler(num_blocks=11)
    scheduler.add([make_sequence(64, 10), make_sequence(96, 9)])  # 4 blocks and soon 5, and 6
    steps = run_all(scheduler)
    assert scheduler.num_preemptions == 0
    assert all(len(step) == 1 for step in steps)


@pytest.mark.parametrize("num_prompt_tokens", range(1, 17))
def test_decode_beside_a_prompt_never_takes_a_block_from_it(num_prompt_tokens):
    """Each chunk leaves less; one of these lengths needs a block when the last one has gone."""
    scheduler = make_scheduler(num_blocks=54, max_num_seqs=2, max_num_batched_tokens=130)
    scheduler.add([make_sequence(num_prompt_tokens, 100)])
    apply(scheduler, scheduler.schedule())
    scheduler.add([make_sequence(811, 3)])  # 7 chunks of two tiles
    steps = run_all(scheduler)
    assert any(len(step) == 2 and step[0][2] > 1 for step in steps), "they do run together"


def test_an_isolated_row_is_alone_until_it_has_its_next_token():
    """Also in a last chunk of one token, which would pass for decode."""
    scheduler = make_scheduler(max_num_seqs=2, max_num_batched_tokens=2, device="cuda")
    rows = [make_sequence(2, 9), make_sequence(2, 9)]
    scheduler.add(rows)
    for _ in range(2):
        apply(scheduler, scheduler.schedule())
    scheduler.preempt(rows[1], clean=False, isolated=True)
    assert len(rows[1].token_ids) == 3
    steps = [scheduler.schedule()]
    apply(scheduler, steps[0])
    steps.append(scheduler.schedule())
    assert steps == [((rows[1], 2),), ((rows[1], 1),)]


def test_a_preempted_row_runs_before_all_that_wait():
    scheduler = make_scheduler(num_blocks=11, max_num_seqs=2, max_num_batched_tokens=200)
    rows = [make_sequence(*shape) for shape in ((60, 90), (60, 80), (100, 20))]
    scheduler.add(rows)
    while rows[1].status is not Status.FINISHED:
        apply(scheduler, scheduler.schedule())
        assert rows[2].num_computed_tokens == 0 or rows[1].status is not Status.WAITING
    assert scheduler.num_preemptions == 1


def test_a_preempted_row_takes_up_its_own_blocks_again():
    scheduler = make_scheduler(num_blocks=11, states=PAGED)
    scheduler.add([make_sequence(60, 30, token=1), make_sequence(60, 29, token=2)])
    run_all(scheduler)
    assert scheduler.num_preemptions == 1
    # It had 80 tokens in five blocks; the other row has taken the last.
    assert scheduler.num_cached_tokens == 64


def test_a_long_prompt_starts_only_when_the_cache_can_hold_all_of_it():
    """Else it would be cut off in its second chunk and begun again, step after step."""
    scheduler = make_scheduler(num_blocks=17, states=PAGED, enable_prefix_caching=False)
    scheduler.add([make_sequence(100, 20), make_sequence(220, 3)])
    steps = run_all(scheduler)
    assert scheduler.num_preemptions == 0
    assert [n for step in steps for p, _, n, _ in step if p == 220] == [74, 73, 73, 1, 1]
