"""Packing: the arrays of a step, written out by hand, and the names a signature asks for."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.media_store import MediaStore
from beam_gemma.engine.packing import NO_FEATURES, pack
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Picture, Request, Sequence
from beam_gemma.model.signature import OPTIONAL_INPUTS
from tests.doubles.fakes import STATES, FakeEncoder, fake_picture, fake_signature, soft_ids


def make_cache(signature, max_num_seqs=4):
    return KVCache(
        signature,
        num_blocks={"full": 200, "sliding": 200},
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=400,
    )


def admit(cache, prompt, *, computed=0, spans=(), media=(), logprob=False):
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=9),
        spans=spans,
        media=media,
        logprob=logprob,
    )
    sequence = Sequence(request, frozenset())
    sequence.begin(candidates=64)
    prefix = cache.find_prefix(None, len(prompt), num_reusable_tokens=len(prompt) - 1)
    sequence.slot = cache.admit(prefix, computed, num_spare_blocks=0)
    sequence.restart(computed)
    return sequence


def pack_step(step, signature, cache, features=NO_FEATURES):
    for sequence, num_new_tokens in step:
        cache.extend(sequence.slot, sequence.num_computed_tokens, num_new_tokens)
    return pack(tuple(step), signature, cache, features)


def test_prefill_of_three_sequences():
    signature = fake_signature()
    cache = make_cache(signature)
    whole = admit(cache, [10, 11, 12])
    part = admit(cache, range(20, 40))
    rest = admit(cache, range(50, 90), computed=38)
    feeds = pack_step([(rest, 2), (whole, 3), (part, 4)], signature, cache)
    assert feeds["input_ids"].tolist() == [88, 89, 10, 11, 12, 20, 21, 22, 23]
    assert feeds["cu_seqlens"].tolist() == [0, 2, 5, 9]
    assert feeds["past_seqlens"].tolist() == [38, 0, 0]
    assert feeds["logit_rows"].tolist() == [1, 4], "the third prompt is not complete"
    assert feeds["state_slots"].tolist() == [rest.slot, whole.slot, part.slot]
    # `rest` was the first to take blocks: 1, 2 and 3; then the step took one for each.
    table = feeds["block_table.full"]
    assert table[:, :4].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [5, 0, 0, 0]]
    assert not table[:, 4:].any()
    assert table.shape == (3, 4), "64 tokens"
    places = [3 * 16 + 6, 3 * 16 + 7, *range(64, 67), *range(80, 84)]
    assert feeds["slot_mapping.full"].tolist() == places
    assert feeds["context_starts.sliding"].tolist() == [0, 0, 0]
    assert feeds["span_ends"].tolist() == [38, 39, 0, 1, 2, 0, 1, 2, 3]


def test_layers_without_caches_take_each_row_as_a_sequence():
    signature = fake_signature(
        device="cuda", states=STATES[:2], optional_inputs=("position_ids",), shares_caches=True
    )
    cache = make_cache(signature)
    whole, part = admit(cache, [10, 11, 12]), admit(cache, range(20, 40))
    rest = admit(cache, range(50, 90), computed=38)
    feeds = pack_step([(rest, 2), (part, 4), (whole, 3)], signature, cache)
    assert feeds["logit_rows"].tolist() == [1, 8], "the second prompt is not complete"
    assert feeds["row_sequences"].tolist() == [0, 2]
    assert feeds["row_cu_seqlens"].tolist() == [0, 1, 2]
    assert feeds["row_past_seqlens"].tolist() == [39, 2]


def test_of_the_complete_rows_those_that_ask_get_a_probability():
    signature = fake_signature()
    cache = make_cache(signature, max_num_seqs=5)
    asks = [False, True, True, True, False]
    rows = [admit(cache, range(5), logprob=ask) for ask in asks]
    feeds = pack_step(list(zip(rows, (5, 4, 5, 5, 5), strict=True)), signature, cache)
    assert feeds["logit_rows"].tolist() == [4, 13, 18, 23], "the second prompt is not complete"
    assert feeds["probability_rows"].tolist() == [1, 2]


def test_tables_of_a_window_start_where_the_cache_says():
    signature = fake_signature()
    cache = make_cache(signature)
    long = admit(cache, range(200), computed=199)
    short = admit(cache, range(10), computed=9)
    feeds = pack_step([(long, 1), (short, 1)], signature, cache)
    # The window of 40 reaches back from 199 to 160: the table starts at 128.
    assert feeds["context_starts.sliding"].tolist() == [128, 0]
    assert feeds["block_table.sliding"].shape == (2, 8)
    assert feeds["block_table.sliding"][0, :6].tolist() == [9, 10, 11, 12, 13, 0]
    assert feeds["slot_mapping.sliding"].tolist() == [13 * 16 + 199 % 16, 14 * 16 + 9]
    assert feeds["block_table.full"].shape == (2, 16)
    assert feeds["slot_mapping.full"].tolist() == [13 * 16 + 199 % 16, 14 * 16 + 9]


def test_cuda_tables_start_at_zero_and_bounds_are_powers_of_two():
    signature = fake_signature(device="cuda")
    cache = make_cache(signature)
    long = admit(cache, range(200), computed=197)
    feeds = pack_step([(long, 3)], signature, cache)
    # The window reaches back from 197 to 158: nine whole blocks are behind it.
    assert feeds["block_table.sliding"].tolist() == [[*[0] * 9, *range(10, 14)]]
    assert feeds["slot_mapping.sliding"].tolist() == [13 * 16 + n for n in (5, 6, 7)]
    assert feeds["attention_metadata"].tolist() == [4, 256, 0]


def test_tokens_of_a_span_attend_to_its_last():
    signature = fake_signature()
    cache = make_cache(signature)
    first = admit(cache, range(5))
    spanned = admit(cache, range(12), computed=2, spans=((0, 2), (3, 6), (6, 8)))
    feeds = pack_step([(first, 5), (spanned, 10)], signature, cache)
    assert feeds["span_ends"].tolist() == [0, 1, 2, 3, 4, 2, 5, 5, 5, 7, 7, 8, 9, 10, 11]


def test_a_span_may_begin_in_blocks_that_others_have_computed():
    signature = fake_signature()
    cache = make_cache(signature)
    sequence = admit(cache, range(12), computed=4, spans=((0, 2), (3, 6), (6, 8)))
    feeds = pack_step([(sequence, 8)], signature, cache)
    assert feeds["span_ends"].tolist() == [5, 5, 7, 7, 8, 9, 10, 11]


def test_first_keys_reach_back_to_the_start_of_a_span_or_of_the_window():
    signature = fake_signature(optional_inputs=("span_ends", "first_keys"))
    cache = make_cache(signature)
    first = admit(cache, range(60), spans=((0, 58),))
    feeds = pack_step([(first, 60), (admit(cache, range(50), computed=48), 2)], signature, cache)
    # The window is 40.
    assert feeds["first_keys"].tolist() == [*[0] * 58, 58 - 39, 59 - 39, 48 - 39, 49 - 39]
    inside = admit(cache, range(60), computed=50, spans=((20, 58),))
    feeds = pack_step([(inside, 10)], signature, cache)
    starts = [min(20, place - 39) for place in range(50, 58)]
    assert feeds["first_keys"].tolist() == [*starts, 58 - 39, 59 - 39]


def test_tokens_of_pictures_take_the_embeddings_of_their_places():
    signature = fake_signature(optional_inputs=("inputs_embeds",))
    cache = make_cache(signature)
    one, other = fake_picture(1, 2), fake_picture(2, 3)
    features = MediaStore({Picture: FakeEncoder()}).prepare([one, other])
    whole = admit(cache, range(25), media=(one,))
    rest = admit(cache, range(70), computed=16, media=(other, fake_picture(1, 24)))
    text = admit(cache, range(7))
    feeds = pack_step([(whole, 24), (rest, 30), (text, 7)], signature, cache, features)
    first, second = (soft_ids(picture.values) for picture in (one, other))
    rows = feeds["embeds_rows"]
    assert rows.dtype == np.int64
    soft = np.where(rows >= 0, feeds["inputs_embeds"][rows, 0], -1).tolist()
    # Of `other` 13 tokens are computed; the next picture lies behind one token of text.
    assert soft == [-1, -1, *first, -1, -1, *second[13:], -1, *first, -1, -1, *[-1] * 7]
    assert len(feeds["inputs_embeds"]) == 20 + 7 + 20


def test_embeddings_in_bfloat16_stay_as_they_are():
    signature = replace(fake_signature(optional_inputs=("inputs_embeds",)), dtype="bfloat16")
    cache = make_cache(signature)
    picture = fake_picture(1, 1)
    bits = np.arange(20 * 8, dtype=np.uint16).reshape(20, 8)
    step = [(admit(cache, range(25), media=(picture,)), 25)]
    feeds = pack_step(step, signature, cache, {picture.digest: bits})
    np.testing.assert_array_equal(feeds["inputs_embeds"], bits)
    assert feeds["inputs_embeds"].dtype == np.uint16
    assert feeds["embeds_rows"].tolist() == [-1, *range(20), *[-1] * 4]


def test_positions_and_absent_embeddings():
    signature = fake_signature(optional_inputs=("position_ids", "inputs_embeds"))
    cache = make_cache(signature)
    feeds = pack_step([(admit(cache, range(7), computed=4), 3)], signature, cache)
    assert feeds["position_ids"].tolist() == [4, 5, 6]
    assert feeds["inputs_embeds"].tolist() == [[0] * 8], "an input is never empty"
    assert feeds["embeds_rows"].tolist() == [-1] * 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("states", [STATES, STATES[:1], STATES[1:], STATES[2:]])
def test_every_signature_gets_exactly_its_inputs(device, states):
    for count in range(len(OPTIONAL_INPUTS) + 1):
        for optional in itertools.combinations(OPTIONAL_INPUTS, count):
            signature = fake_signature(device=device, states=states, optional_inputs=optional)
            cache = make_cache(signature)
            feeds = pack_step([(admit(cache, range(7)), 7)], signature, cache)
            tensors = signature.step_inputs()
            assert sorted(feeds) == sorted(t.name for t in tensors)
            for tensor in tensors:
                array = feeds[tensor.name]
                assert (array.dtype, array.ndim) == (np.dtype(tensor.dtype), len(tensor.shape))
