"""Sources in the engine, on sessions without a model: each row completes as if it were alone.

`FakeSession` shows whether each sequence reads the whole of its own source behind which its tokens
go round, `FakeSourceEncoder` which sources were computed.
"""

import functools
import itertools
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.scheduler import Scheduler
from beam_gemma.engine.sequence import Request, Sequence
from beam_gemma.engine.stats import Tally
from beam_gemma.errors import ArtifactError, EngineError, PromptTooLongError, RecordError
from beam_gemma.runtime.capacity import plan_capacity
from beam_gemma.runtime.limits import EngineConfig
from tests.doubles.fake_sources import (
    KINDS,
    MAX_SOURCE_LEN,
    NAN_TOKEN,
    WINDOW,
    FakeSourceEncoder,
    source_signature,
)
from tests.doubles.fakes import (
    NUM_IMAGE_TOKENS,
    VOCAB_SIZE,
    FakeEncoder,
    FakeSession,
    expected,
    fake_picture,
    fake_signature,
    histories_of,
    logits_of,
    logsumexp,
    read_source,
)
from tests.engine.test_scheduler import apply

BAD = 94
"""A token that no encoder takes."""
BOS = 2
both_kinds = pytest.mark.parametrize("kind", KINDS)


def make_request(num_source_tokens, *, seed=1, num_prompt_tokens=1, max_tokens=5, **changes):
    """Return a row with one of many sources of a length; equal seeds give equal sources."""
    source = tuple((seed * 31 + 7 * i) % 90 + 1 for i in range(num_source_tokens))
    prompt = (BOS, *((3 * i) % 90 + 1 for i in range(1, num_prompt_tokens)))
    request = Request(
        request_id=f"{num_source_tokens} {seed}",
        prompt_token_ids=prompt,
        source_token_ids=source,
        params=SamplingParams(max_tokens=max_tokens),
    )
    return replace(request, **changes)


def run(session, requests, encoder=None, *, vision=None, **config):
    encoder = encoder or FakeSourceEncoder()
    engine_config = EngineConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 100} | config)
    with closing(Engine(session, engine_config, encoder=encoder, vision=vision)) as engine:
        futures = engine.submit(requests)
        results = [future.result(timeout=200) for future in futures]
        cache, stats, counts = engine._scheduler._cache, engine.stats, Tally(engine).take()
    assert session.faults == []
    assert cache.num_free_slots == cache.num_slots
    for group, count in session.num_blocks.items():
        assert cache.num_free_blocks(group) == count - 1
    assert (counts.get("sources", 0), counts.get("reused_sources", 0)) == (
        stats.num_sources,
        stats.num_reused_sources,
    )
    assert stats.num_cached_tokens == 0
    return results, stats


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(1, 130),
            st.integers(1, 3),
            st.sampled_from([1, 1, 9, 90]),
            st.integers(1, 70),
        ),
        min_size=1,
        max_size=9,
    ),
    kind=st.sampled_from(sorted(KINDS)),
    failure=st.sampled_from(["none", "none", "device", "encoder"]),
    max_num_seqs=st.integers(1, 4),
    budget=st.integers(4, 150),
    num_blocks=st.integers(20, 50),
)
def test_rows_complete_as_if_alone(rows, kind, failure, max_num_seqs, budget, num_blocks):
    """Windows of 40 tokens go round, sources are shared, caches are small, steps fail."""
    requests = [
        make_request(n, seed=seed, num_prompt_tokens=p, max_tokens=m) for n, seed, p, m in rows
    ]
    session = FakeSession(source_signature(kind), num_blocks=num_blocks)
    encoder = FakeSourceEncoder()
    if failure == "device":
        session.fails = lambda step, _: step % 5 == 0
    if failure == "encoder":
        encoder.fails = lambda step, _: step % 5 == 1
    results, stats = run(
        session, requests, encoder, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
    )
    assert results == [expected(session.signature, request) for request in requests]
    assert stats.num_sources >= len({request.source_token_ids for request in requests})


@both_kinds
def test_scores_are_those_of_the_definition(kind):
    """Several targets of several positions, behind sources that rows share."""
    signature = source_signature(kind, head="score")
    requests = []
    for seed, places in ((1, (0, 4, 4, 11)), (1, (3, 11)), (2, (0, 0, 1, 1, 11))):
        targets = tuple((place, 5 + 3 * i) for i, place in enumerate(places))
        requests.append(make_request(50, seed=seed, num_prompt_tokens=12, targets=targets))
    together, stats = run(FakeSession(signature), requests)
    assert (stats.num_sources, stats.num_reused_sources) == (2, 1)
    for request, result in zip(requests, together, strict=True):
        [alone], _ = run(FakeSession(signature), [request], max_num_batched_tokens=7)
        assert result == alone
        assert len(result.scores) == len(request.targets)
        for (place, token), score in zip(request.targets, result.scores, strict=True):
            ids = list(request.prompt_token_ids[: place + 1])
            source = read_source(request.source_token_ids)
            logits = logits_of(histories_of(signature, ids, source), 0, VOCAB_SIZE, None)
            exact = float(logits[token] - logsumexp(logits[None])[0])
            assert score == pytest.approx(exact, abs=1e-5), "float32"


@both_kinds
def test_a_source_that_rows_share_is_read_once(kind):
    """Rows of a source follow one another, so that states need not be kept for long."""
    session, encoder = FakeSession(source_signature(kind)), FakeSourceEncoder()
    requests = [make_request(60, seed=seed, max_tokens=4) for _ in range(6) for seed in range(5)]
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=100)
    with closing(Engine(session, config, encoder=encoder)) as engine:
        engine._sources._max_bytes = 0
        results = engine.generate(requests)
        stats = engine.stats
    assert results == [expected(session.signature, request) for request in requests]
    assert sorted(itertools.chain.from_iterable(encoder.steps)) == [60] * 5
    assert (stats.num_sources, stats.num_reused_sources) == (5, 25)
    assert stats.num_prompt_tokens == 5 * 60 + len(requests)


@both_kinds
def test_a_step_starts_sources_up_to_its_token_limit(kind):
    """A longer source starts alone, and rows without room wait for the next step."""
    session, encoder = FakeSession(source_signature(kind)), FakeSourceEncoder()
    starts = []
    run_step = session._run

    def record(feeds, **options):
        slots = next(feeds[name] for name in feeds if name.startswith("source_slots."))
        starts.append(0 if slots[0] < 0 else len(slots))
        return run_step(feeds, **options)

    session._run = record
    requests = [make_request(n, seed=n, max_tokens=2) for n in (250, 90, 40, 35, 30, 20, 10)]
    results, _ = run(session, requests, encoder, max_num_seqs=8)
    assert results == [expected(session.signature, request) for request in requests]
    assert [n for n in starts if n] == [250, 90, 75, 60]
    assert sorted(encoder.steps) == sorted([[250], [90], [40, 35], [30, 20, 10]])


@pytest.mark.parametrize("num_source_tokens", [100, 101])
def test_a_prompt_that_goes_on_has_no_longer_source_beside_it(num_source_tokens):
    """On CUDA its tokens would change the shape of products, and so the bits of the prompt."""
    scheduler = make_scheduler("apart")
    going, starting = (
        Sequence(make_request(n, num_prompt_tokens=p), frozenset())
        for n, p in ((20, 120), (num_source_tokens, 30))
    )
    scheduler.add([going])
    apply(scheduler, scheduler.schedule())
    scheduler.add([starting])
    step = scheduler.schedule()
    assert step == ((going, 60), (starting, 30))[: 2 if num_source_tokens == 100 else 1]


def test_a_window_that_goes_round_bounds_chunks():
    """The tokens that fill the window come in one chunk, later ones one at a time."""
    session = FakeSession(source_signature("merged"))
    request = make_request(100, num_prompt_tokens=WINDOW + 5, max_tokens=2)
    results, _ = run(session, [request])
    assert results == [expected(session.signature, request)]
    assert session.steps == [[(0, WINDOW)], *([(WINDOW + i, 1)] for i in range(6))]


def test_a_window_that_goes_round_bounds_tokens_that_a_constraint_forces():
    scheduler = make_scheduler()
    row = Sequence(make_request(20, num_prompt_tokens=30, max_tokens=40), frozenset())
    scheduler.add([row])
    apply(scheduler, scheduler.schedule())
    row.token_ids += [5] * 20
    lengths = []
    for _ in range(4):
        [(_, num_new_tokens)] = step = scheduler.schedule()
        lengths.append(num_new_tokens)
        apply(scheduler, step)
    assert lengths == [WINDOW - 30, 1, 1, 1]


@both_kinds
def test_preempted_rows_read_their_sources_again_or_from_the_store(kind):
    session, encoder = FakeSession(source_signature(kind), num_blocks=13), FakeSourceEncoder()
    requests = [make_request(60, seed=seed, max_tokens=90) for seed in range(4)]
    results, stats = run(session, requests, encoder, max_num_seqs=3, max_num_batched_tokens=130)
    assert results == [expected(session.signature, request) for request in requests]
    assert stats.num_preemptions > 0
    assert (stats.num_sources, stats.num_reused_sources) == (4, stats.num_preemptions)


@both_kinds
@pytest.mark.parametrize("length", [1, 20])
def test_an_encoder_that_fails_for_one_source_ends_its_rows_alone(kind, length):
    session, encoder = FakeSession(source_signature(kind)), FakeSourceEncoder()
    encoder.fails = lambda _, ids: BAD in ids
    rows = [make_request(n, seed=n, num_prompt_tokens=length) for n in (10, 11, 12, 13)]
    rows[2] = replace(rows[2], source_token_ids=(*rows[2].source_token_ids[:-1], BAD))
    rows += [rows[2]] * 8  # more than may fail in a row of different sources
    results, stats = run(session, rows, encoder, max_num_seqs=8)
    for row, result in zip(rows, results, strict=True):
        if BAD in row.source_token_ids:
            assert result.error == (
                "model: step failed: DeviceError: encoder: expected the states of 1 sources of 12 "
                "tokens, got RuntimeError: the encoder is gone"
            )
        else:
            assert result == expected(session.signature, row)
    assert stats.num_failed == 9


@both_kinds
def test_a_row_at_fault_ends_once_a_probe_has_read_a_source_of_its_own(kind):
    session, encoder = FakeSession(source_signature(kind)), FakeSourceEncoder()
    encoder.fails = lambda _, ids: BAD in ids
    row = replace(make_request(9), source_token_ids=(5, BAD))
    [result], _ = run(session, [row], encoder)
    assert "got RuntimeError: the encoder is gone" in result.error
    assert encoder.steps == [[2], [2], [1]]


@both_kinds
def test_an_encoder_that_reads_nothing_stops_the_engine(kind):
    session, encoder = FakeSession(source_signature(kind)), FakeSourceEncoder()
    encoder.fails = lambda _, __: True
    engine = Engine(session, EngineConfig(max_num_seqs=3), encoder=encoder)
    futures = engine.submit([make_request(9, seed=seed) for seed in range(3)])
    for future in futures:
        with pytest.raises(EngineError, match=r"stopped by DeviceError: encoder: .* is gone"):
            future.result(timeout=200)


@both_kinds
def test_a_source_whose_states_are_not_finite_ends_its_rows_alone(kind):
    """Also those that take its blocks later, which attention reads beyond their own cells."""
    session = FakeSession(source_signature(kind), num_blocks=20)
    rows = [make_request(n, seed=n, max_tokens=60) for n in range(20, 44)]
    for i in (1, 7, 8):
        rows[i] = replace(rows[i], source_token_ids=(NAN_TOKEN, *rows[i].source_token_ids[1:]))
    results, stats = run(session, rows)
    for i, (row, result) in enumerate(zip(rows, results, strict=True)):
        if i in (1, 7, 8):
            assert "expected finite logits, got NaN or infinity after 0 tokens" in result.error
        else:
            assert result == expected(session.signature, row)
    assert stats.num_failed == 3


@both_kinds
@pytest.mark.parametrize("group", ["full", "sliding"])
def test_a_row_that_is_not_finite_leaves_nothing_in_its_blocks(kind, group):
    session = FakeSession(source_signature(kind), num_blocks=14, poison=(group, 93))
    rows = [make_request(n, seed=n, max_tokens=50) for n in range(20, 40)]
    for i in (0, 5, 6):
        rows[i] = replace(rows[i], prompt_token_ids=(BOS, 93))
    results, _ = run(session, rows)
    for i, (row, result) in enumerate(zip(rows, results, strict=True)):
        assert (result.error is not None) == (i in (0, 5, 6))
        assert result.error or result == expected(session.signature, row)


def test_pictures_of_a_source_are_read_with_it():
    """Equal tokens with other pictures are other sources."""
    session = FakeSession(source_signature("merged"))
    encoder, vision = FakeSourceEncoder(takes_pictures=True), FakeEncoder()

    def with_pictures(*numbers):
        base = make_request(70)
        starts = (5, 5 + NUM_IMAGE_TOKENS + 3)
        places = zip(numbers, starts, strict=False)
        return replace(base, media=tuple(fake_picture(n, at) for n, at in places))

    rows = [with_pictures(*n) for n in ((1,), (1, 2), (2, 1), (2, 1), ())]
    results, stats = run(session, rows, encoder, vision=vision, max_num_batched_tokens=80)
    assert results == [expected(session.signature, row) for row in rows]
    assert (stats.num_sources, stats.num_reused_sources) == (4, 1)
    assert stats.num_pictures == 2, "each picture is computed once"


def test_a_tower_that_fails_ends_the_rows_with_the_picture_alone():
    session = FakeSession(source_signature("merged"))
    encoder, vision = FakeSourceEncoder(takes_pictures=True), FakeEncoder()
    vision.fails = lambda pixels: pixels[0, 0, 0] == 2
    rows = [replace(make_request(40 + n), media=(fake_picture(n % 4, 3),)) for n in range(4)]
    results, _ = run(session, rows, encoder, vision=vision)
    assert [r.error for r in results] == [
        None, None, "model: step failed: RuntimeError: the tower is gone", None
    ]  # fmt: skip


@both_kinds
def test_a_prompt_that_fails_is_cut_where_its_blocks_are(kind):
    """Else the first part would read what the failed step has left in the last of its blocks."""
    session = FakeSession(source_signature(kind))
    session.fails = lambda step, _: step == 1
    row = make_request(50, num_prompt_tokens=30)
    results, _ = run(session, [row])
    assert results == [expected(session.signature, row)]
    cut = 14 if kind == "merged" else 16
    assert session.steps[:3] == [[(0, 30)], [(0, cut)], [(cut, 30 - cut)]]


class LateSession(FakeSession):
    """Runs a started step when its result is asked for, after all that was started before."""

    max_steps_in_flight = 2

    def __init__(self, signature, **options):
        super().__init__(signature, **options)
        self.queue = []
        self.deepest = 0

    def start(self, feeds, **_):
        step = LateStep(self, functools.partial(super().start, feeds))
        self.queue.append(step.run)
        self.deepest = max(self.deepest, len(self.queue))
        return step

    def zero_blocks(self, group, blocks):
        self.queue.append(functools.partial(super().zero_blocks, group, list(blocks)))


class LateStep:
    """A step of a `LateSession`."""

    def __init__(self, session, start):
        self.session, self.start = session, start
        self.output = self.error = None

    def run(self):
        try:
            self.output = self.start().output
        except RuntimeError as error:
            self.error = error

    def result(self):
        while self.output is self.error is None:
            self.session.queue.pop(0)()
        if self.error:
            raise self.error
        return self.output


@both_kinds
@pytest.mark.parametrize("failing", [1, 2, 6, 20])
def test_a_step_that_fails_while_the_next_is_in_flight_is_run_again(kind, failing):
    """In a window that goes round, the next step has replaced what the failed one reads."""
    signature = source_signature(kind, head="score")
    targets = tuple((place, 7) for place in (3, 41, 44, 50, 69))
    rows = [make_request(50 + i, seed=i, num_prompt_tokens=70, targets=targets) for i in range(2)]
    session = LateSession(signature)
    session.fails = lambda step, _: step == failing
    late, stats = run(session, rows, max_num_batched_tokens=30)
    assert late == run(FakeSession(signature), rows)[0]
    assert session.deepest >= 2
    assert (stats.num_preemptions > 0) == (kind == "merged" and failing > 1)


def test_an_engine_that_is_closed_while_it_reads_finishes_first():
    session, encoder = FakeSession(source_signature("merged")), FakeSourceEncoder()
    session.go.clear()
    engine = Engine(session, EngineConfig(max_num_seqs=2), encoder=encoder)
    futures = engine.submit([make_request(9, seed=seed) for seed in range(6)])
    session.go.set()
    engine.close()
    assert [f.result(timeout=0) for f in futures] == [
        expected(session.signature, make_request(9, seed=seed)) for seed in range(6)
    ]


def make_scheduler(kind="merged", *, vision=None, num_blocks=40, max_num_batched_tokens=100):
    signature = source_signature(kind)
    cache = KVCache(
        signature,
        num_blocks={state.group: num_blocks for state in signature.paged_states},
        max_num_seqs=4,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    return Scheduler(
        cache,
        signature,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=True,
        vision=vision,
        encoder=FakeSourceEncoder().signature,
    )


def test_sources_that_do_not_suit_the_model_are_refused():
    scheduler = make_scheduler()
    base = make_request(MAX_SOURCE_LEN, num_prompt_tokens=20, max_tokens=180)
    scheduler.check(base)
    refusals = {
        "^source: expected at least one token, got none$": {"source_token_ids": ()},
        "^prompt: expected at least one token, got none$": {"prompt_token_ids": ()},
        "^source: expected token ids from 0 to 96, got 1 to 97$": {"source_token_ids": (1, 97)},
        "^spans: expected none, since the model attends one way": {"spans": ((0, 2),)},
        "^pictures: expected none": {"media": (fake_picture(1, 0),)},
    }
    for message, changes in refusals.items():
        with pytest.raises(RecordError, match=message):
            scheduler.check(replace(base, **changes))
    with pytest.raises(PromptTooLongError, match=r"^source of 301 tokens: expected at most 300;"):
        scheduler.check(make_request(MAX_SOURCE_LEN + 1))
    with pytest.raises(PromptTooLongError, match=r"expected at most 200 together, got 201;"):
        scheduler.check(make_request(9, max_tokens=200))
    late = replace(base, media=(fake_picture(1, MAX_SOURCE_LEN - NUM_IMAGE_TOKENS + 1),))
    seeing = make_scheduler(vision=FakeEncoder.signature)
    seeing.check(replace(base, media=(fake_picture(1, MAX_SOURCE_LEN - NUM_IMAGE_TOKENS),)))
    with pytest.raises(
        RecordError, match=r"inside a source of 300, got one of 20 from token 281 on$"
    ):
        seeing.check(late)


def test_a_model_without_an_encoder_takes_no_source():
    with closing(Engine(FakeSession(), EngineConfig())) as engine:
        [refused] = engine.generate([make_request(9)])
    assert refused.error == "source: expected none, since the model has no encoder, got 9 tokens"


@pytest.mark.parametrize(
    ("kind", "num_blocks", "message"),
    [
        ("apart", 16, "needs 16 cache blocks of cross, the cache has 15"),
        ("merged", 26, "needs 26 cache blocks of full, the cache has 25"),
    ],
)
def test_requests_that_the_cache_can_never_hold_are_refused(kind, num_blocks, message):
    """A source of 250 tokens takes 16 blocks; with 151 tokens behind it, 26."""
    request = make_request(250, max_tokens=151)
    with pytest.raises(PromptTooLongError, match=message):
        make_scheduler(kind, num_blocks=num_blocks).check(request)
    make_scheduler(kind, num_blocks=num_blocks + 1).check(request)


def test_an_engine_refuses_states_of_another_width():
    encoder = FakeSourceEncoder()
    for signature, given_ in (
        (fake_signature(), encoder),
        (source_signature("apart"), None),
        (replace(source_signature("apart"), source_size=9), encoder),
    ):
        with pytest.raises(ArtifactError, match=r"^graph of sources: expected states"):
            Engine(FakeSession(signature), EngineConfig(), encoder=given_)


@both_kinds
def test_capacity_holds_the_longest_rows_of_all_slots(kind):
    """Memory permitting; a window that goes round takes no more than its cells."""
    signature = source_signature(kind)
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 50}
    capacity = plan_capacity(signature, num_bytes=1 << 30, **limits)
    session = FakeSession(signature, num_blocks=capacity.num_blocks)
    rows = [make_request(MAX_SOURCE_LEN, seed=s, max_tokens=199) for s in range(3)]
    results, stats = run(session, rows, **limits)
    assert results == [expected(signature, row) for row in rows]
    assert stats.num_preemptions == 0
    cells = {state.group: state.num_cells(MAX_SOURCE_LEN, 200) for state in signature.paged_states}
    if kind == "merged":
        assert cells["sliding"] == MAX_SOURCE_LEN + WINDOW
        assert capacity.num_blocks["sliding"] < capacity.num_blocks["full"]
    else:
        assert capacity.num_blocks["cross"] == 3 * -(-(MAX_SOURCE_LEN + 64) // 16) + 1
