"""Pictures in the engine, on a session without a model: each row completes as if it were alone.

`FakeSession` shows whether every token of a picture got its own embedding, `FakeEncoder` which
pictures were computed.
"""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.scheduler import Scheduler
from beam_gemma.engine.sequence import Request, Sequence, Sound
from beam_gemma.engine.stats import Tally
from beam_gemma.errors import ArtifactError, EngineError, PromptTooLongError, RecordError
from beam_gemma.runtime.limits import EngineConfig
from tests.doubles.fakes import (
    NUM_IMAGE_TOKENS,
    STATES,
    FakeEncoder,
    FakeSession,
    expected,
    fake_picture,
    fake_signature,
)
from tests.engine.test_scheduler import run_all

PAGED = STATES[:2]
OPTIONAL = {"cpu": ("inputs_embeds", "span_ends"), "cuda": ("inputs_embeds", "span_ends")}
BAD = 250
"""A picture that no encoder takes."""


def signature_of(device="cpu", states=PAGED):
    return fake_signature(device=device, states=states, optional_inputs=OPTIONAL[device])


def make_request(*parts, max_tokens=5, wide=False):
    """Return a row of texts, given by their lengths, with pictures, given as strings, in between.

    Args:
        parts: Numbers of tokens of text, and pictures.
        max_tokens: Tokens of the completion.
        wide: Whether the whole prompt is one span, in place of each picture.
    """
    ids, pictures = [], []
    for part in parts:
        if isinstance(part, str):
            pictures.append(fake_picture(int(part), len(ids)))
            ids += [0] * NUM_IMAGE_TOKENS
        else:
            ids += [(len(ids) + part) % 90 + 1] * part
    spans = tuple((p.start, p.start + NUM_IMAGE_TOKENS) for p in pictures)
    return Request(
        request_id=" ".join(map(str, parts)),
        prompt_token_ids=tuple(ids),
        params=SamplingParams(max_tokens=max_tokens),
        media=tuple(pictures),
        spans=((0, len(ids)),) if wide else spans,
    )


def run(session, requests, encoder, **config):
    with closing(Engine(session, EngineConfig(**config), vision=encoder)) as engine:
        futures = engine.submit(requests)
        results = [future.result(timeout=200) for future in futures]
        cache, stats, counts = engine._scheduler._cache, engine.stats, Tally(engine).take()
    assert session.faults == []
    assert cache.num_free_slots == config["max_num_seqs"]
    for group, count in session.num_blocks.items():
        assert cache.num_free_blocks(group) == count - 1
    assert (counts.get("pictures", 0), counts.get("reused_pictures", 0)) == (
        stats.num_pictures,
        stats.num_reused_pictures,
    )
    return results, stats


part = st.one_of(st.integers(1, 30), st.sampled_from(["1", "2", "3"]))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(part, min_size=1, max_size=6), st.booleans(), st.integers(1, 40)),
        min_size=1,
        max_size=8,
    ),
    failure=st.sampled_from(["none", "none", "device", "encoder"]),
    device=st.sampled_from(["cpu", "cuda"]),
    max_num_seqs=st.integers(1, 4),
    budget=st.integers(180, 300),
    num_blocks=st.integers(15, 50),
    enable_prefix_caching=st.sampled_from([True, True, False]),
)
def test_rows_complete_as_if_alone(
    rows, failure, device, max_num_seqs, budget, num_blocks, enable_prefix_caching
):
    requests = [make_request(*parts, max_tokens=n, wide=wide) for parts, wide, n in rows]
    session = FakeSession(signature_of(device), num_blocks=num_blocks)
    encoder = FakeEncoder()
    if failure == "device":
        session.fails = lambda step, _: step % 5 == 0
    if failure == "encoder":
        encoder.fails = lambda _: len(encoder.batches) % 5 == 1
    results, stats = run(
        session,
        requests,
        encoder,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=enable_prefix_caching,
    )
    assert results == [expected(session.signature, request) for request in requests]
    assert stats.num_pictures == 0 or any(request.media for request in requests)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_prefix_may_end_inside_a_picture(device):
    """Of the second row's 20 tokens of the picture, 9 lie in blocks of the first row."""
    session, encoder = FakeSession(signature_of(device)), FakeEncoder()
    rows = [make_request(7, "1", 20), make_request(7, "1", 9)]
    with closing(Engine(session, EngineConfig(), vision=encoder)) as engine:
        for row in rows:
            assert engine.generate([row]) == [expected(session.signature, row)]
        assert engine.stats.num_cached_tokens == 16
        assert (engine.stats.num_pictures, engine.stats.num_reused_pictures) == (1, 1)
    assert (16, 20) in session.steps[-5]
    assert encoder.batches == [1]


def test_a_picture_whose_tokens_are_all_in_the_cache_is_not_needed():
    session, encoder = FakeSession(signature_of()), FakeEncoder()
    with closing(Engine(session, EngineConfig(), vision=encoder)) as engine:
        for row in (make_request(2, "1", 40), make_request(2, "1", 40, "2")):
            assert engine.generate([row]) == [expected(session.signature, row)]
        assert engine.stats.num_cached_tokens == 48
        assert (engine.stats.num_pictures, engine.stats.num_reused_pictures) == (2, 0)
    assert encoder.batches == [1, 1]


def test_rows_with_other_pictures_or_none_share_only_what_is_before_them():
    session, encoder = FakeSession(signature_of()), FakeEncoder()
    base = make_request(36, "1", 20)
    text = Request(request_id="text", prompt_token_ids=base.prompt_token_ids, params=base.params)
    for other in (make_request(36, "2", 20), text):
        with closing(Engine(session, EngineConfig(), vision=encoder)) as engine:
            for row in (base, other):
                assert engine.generate([row]) == [expected(session.signature, row)]
            assert engine.stats.num_cached_tokens == 32


def test_pictures_that_rows_of_a_step_share_are_computed_once_and_together():
    session, encoder = FakeSession(signature_of()), FakeEncoder()
    rows = [make_request(*parts) for parts in ((5, "1"), (6, "1"), (7, "2", "1"), (8, "3"), (9,))]
    results, stats = run(session, rows, encoder, max_num_seqs=8, max_num_batched_tokens=400)
    assert results == [expected(session.signature, row) for row in rows]
    assert encoder.batches == [3]
    assert (stats.num_pictures, stats.num_reused_pictures) == (3, 2)


def test_a_preempted_row_needs_its_pictures_again():
    session, encoder = FakeSession(signature_of(), num_blocks=10), FakeEncoder()
    rows = [make_request(20, "1", 10, max_tokens=40), make_request(19, "2", 10, max_tokens=40)]
    results, stats = run(
        session,
        rows,
        encoder,
        max_num_seqs=2,
        max_num_batched_tokens=200,
        enable_prefix_caching=False,
    )
    assert results == [expected(session.signature, row) for row in rows]
    assert stats.num_preemptions > 0
    assert (stats.num_pictures, stats.num_reused_pictures) == (2, stats.num_preemptions)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_picture_that_cannot_be_computed_ends_its_rows_alone(device):
    session, encoder = FakeSession(signature_of(device)), FakeEncoder()
    encoder.fails = lambda pixels: pixels[0, 0, 0] == BAD
    rows = [
        make_request(*parts) for parts in ((5, "1"), (40, "250"), (7, "2", "250"), (8, "3"), (9,))
    ]
    results, stats = run(session, rows, encoder, max_num_seqs=8, max_num_batched_tokens=400)
    for row, result in zip(rows, results, strict=True):
        if any(picture.values[0, 0, 0] == BAD for picture in row.media):
            assert result.error == "model: step failed: RuntimeError: the tower is gone"
        else:
            assert result == expected(session.signature, row)
    assert stats.num_failed == 2


def test_an_encoder_that_computes_nothing_stops_the_engine():
    session, encoder = FakeSession(signature_of()), FakeEncoder()
    encoder.fails = lambda _: True
    engine = Engine(session, EngineConfig(max_num_seqs=3), vision=encoder)
    futures = engine.submit([make_request(i + 1, str(i)) for i in range(3)])
    for future in futures:
        with pytest.raises(EngineError, match="stopped by RuntimeError: the tower is gone"):
            future.result(timeout=200)


def make_scheduler(vision=FakeEncoder.signature, signature=None, **limits):
    limits = {"max_num_batched_tokens": 100, **limits}
    signature = signature or signature_of()
    cache = KVCache(
        signature,
        num_blocks={state.group: 400 for state in signature.paged_states},
        max_num_seqs=4,
        max_num_batched_tokens=limits["max_num_batched_tokens"],
    )
    return Scheduler(cache, signature, vision=vision, enable_prefix_caching=True, **limits)


def replaced(request, **changes):
    names = ("request_id", "prompt_token_ids", "params", "media", "spans")
    return Request(**{name: getattr(request, name) for name in names} | changes)


def test_pictures_that_do_not_fit_their_prompt_are_refused():
    scheduler = make_scheduler()
    base = make_request(5, "1", 3, "2")
    scheduler.check(base)
    first, second = base.media
    late = replace(second, start=second.start + 1)
    over = replace(second, start=first.start + 19)
    early = replace(second, start=-1)
    for pictures in ((first, late), (first, over), (early,), (second, first)):
        with pytest.raises(RecordError, match=r"places of 20 tokens in order inside a prompt of"):
            scheduler.check(replaced(base, media=pictures))
    wrong = replace(first, digest=b"wrong", values=np.zeros((3, 5, 5), np.uint8))
    with pytest.raises(RecordError, match=r"expected 4 by 4 pixels, got 5 by 5$"):
        scheduler.check(replaced(base, media=(wrong,)))
    with pytest.raises(RecordError, match=r"^pictures: expected none, .* takes none, got some$"):
        make_scheduler(vision=None).check(base)


def test_sounds_that_do_not_fit_their_prompt_are_refused():
    base = make_request(40)
    ears = replace(FakeEncoder.signature, head="sound", num_features=4)
    scheduler = make_scheduler(sound=ears)

    def check(start, width=4, num_tokens=20, graph=scheduler):
        sound = Sound(start, b"sound", np.zeros((80, width), np.float32), num_tokens)
        graph.check(replaced(base, media=(sound,)))

    check(0)
    check(len(base.prompt_token_ids) - 20)
    with pytest.raises(RecordError, match=r"^sounds: expected places of 20 tokens in order"):
        check(len(base.prompt_token_ids) - 19)
    with pytest.raises(RecordError, match=r"^sounds: expected frames of 4 values, got 5$"):
        check(0, width=5)
    fixed = make_scheduler(sound=replace(ears, num_audio_tokens=21))
    with pytest.raises(RecordError, match=r"^sounds: expected places of 21 tokens .* of 20 "):
        check(0, graph=fixed)
    with pytest.raises(RecordError, match=r"^sounds: expected none, since the model takes none"):
        check(0, graph=make_scheduler())


def test_a_prompt_that_is_seen_whole_must_fit_a_step():
    scheduler = make_scheduler(max_num_batched_tokens=41)
    scheduler.check(make_request(21, "1", wide=True))
    scheduler.check(make_request(30, "1"))
    with pytest.raises(PromptTooLongError, match=r"got 42; .* --max_num_batched_tokens 42$"):
        scheduler.check(make_request(22, "1", wide=True))


def test_chunks_end_around_pictures():
    scheduler = make_scheduler(max_num_batched_tokens=50)
    row = make_request(10, "1", "2", "3", 30, "4", max_tokens=1)
    scheduler.add([Sequence(row, frozenset())])
    # Even chunks of 120 would be 40 tokens: the first two end where a picture begins.
    assert [[n for _, _, n, _ in step] for step in run_all(scheduler)] == [[50], [35], [35]]


def test_rows_of_a_picture_follow_one_another():
    """Also where they share no block, so that embeddings need not be kept for long."""
    scheduler = make_scheduler()
    rows = [make_request(n, str(n % 2), wide=True) for n in range(1, 9)]
    scheduler.add([Sequence(row, frozenset()) for row in rows])
    scheduler.schedule()
    scheduled = (*scheduler._running, *scheduler._waiting)
    order = [int(sequence.request.request_id.split()[1]) for sequence in scheduled]
    assert order == [*[0] * 4, *[1] * 4]


def test_an_engine_refuses_embeddings_of_another_width():
    with pytest.raises(ArtifactError, match="no embeddings"):
        Engine(FakeSession(), EngineConfig(), vision=FakeEncoder())
