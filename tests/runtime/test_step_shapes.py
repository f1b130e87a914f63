"""Padded steps: what was there stays as it is, and what is added harms nobody."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.engine.packing import rows_as_sequences
from beam_gemma.errors import DeviceError
from beam_gemma.model.graph_tensors import PagedState
from beam_gemma.model.signature import PREFILL_ROWS, Signature
from beam_gemma.runtime.step_shapes import (
    METADATA,
    StepSizes,
    host_dtype,
    largest_shapes,
    no_step,
    pad,
    power_of_two,
    side_by_side,
)
from tests.doubles.ragged import Feeder, padded

SIZES = StepSizes(decode=(4, 16), prefill=(300,))
SPARE = 16


def signature(head="generate", block_size=64):
    return Signature(
        head=head,
        device="cuda",
        dtype="bfloat16",
        vocab_size=97,
        hidden_size=8,
        max_model_len=5000,
        states=(
            PagedState(group="full", layers=(0,), num_key_value_heads=1, head_dim=8),
            PagedState(
                group="near", layers=(1,), num_key_value_heads=1, head_dim=8, sliding_window=9
            ),
        ),
        block_size=block_size,
        optional_inputs=("position_ids",),
    )


@st.composite
def steps(draw):
    sig = signature(block_size=draw(st.sampled_from([64, 256])))
    is_decode = draw(st.booleans())
    count = draw(st.integers(1, 16 if is_decode else 8))
    feeder = Feeder(sig, count, 3000)
    feeder.past = [draw(st.integers(0, 2500)) for _ in range(count)]
    lengths = [1 if is_decode else draw(st.integers(1, 37)) for _ in range(count)]
    feeds = feeder.feeds(
        [(i, list(range(1, n + 1))) for i, n in enumerate(lengths)], all_rows=False
    )
    feeds["probability_rows"] = np.flatnonzero([draw(st.booleans()) for _ in range(count)])
    feeds["temperatures"] = np.linspace(0.1, 2, count).astype(np.float32)
    feeds[METADATA][0] = 1 if is_decode else max(2, max(lengths))
    return sig, feeds, is_decode


@given(steps(), st.booleans())
def test_padding_leaves_a_step_as_it_is_and_writes_nowhere(step, with_logits):
    sig, feeds, is_decode = step
    shape, into = padded(feeds, sig, SIZES, spare_slot=SPARE, with_logits=with_logits)
    assert shape.is_decode is is_decode
    for name, array in into.items():
        if name != "full_rows":
            real = array[tuple(slice(n) for n in feeds[name].shape)]
            np.testing.assert_array_equal(real, feeds[name])
    count, tokens, rows = (len(feeds[n]) for n in ("past_seqlens", "input_ids", "logit_rows"))
    starts = into["cu_seqlens"]
    assert starts[-1] == shape.num_tokens in (4, 16, 300)
    lengths = np.diff(starts)[count:]
    assert (lengths >= 1).all()
    assert (into["past_seqlens"][count:] == 0).all()
    assert (into["logit_slots"][rows:] == SPARE).all()
    assert (into["temperatures"][rows:] == 0).all()
    assert (into["token_slots"][tokens:] == -1).all()
    for name in ("logit_rows", "probability_rows"):
        assert (into[name] < (shape.num_tokens if name == "logit_rows" else shape.num_rows)).all()
    for group in ("full", "near"):
        table = into[f"block_table.{group}"]
        assert (into[f"slot_mapping.{group}"][tokens:] == -1).all()
        assert (table[count:] == 0).all()
        assert (table[:count, feeds[f"block_table.{group}"].shape[1] :] == 0).all()
        assert (lengths <= table.shape[1] * sig.block_size).all()
    if is_decode:
        assert (lengths == 1).all()
        assert shape.num_rows == shape.num_tokens
    longest, context, least = shape.metadata(sig.block_size)
    assert (longest >= np.diff(starts)).all()
    assert longest == (1 if is_decode else 300)
    assert (context >= into["past_seqlens"] + np.diff(starts)).all()
    assert least == 0


@given(steps())
def test_padding_rows_of_shared_caches_reach_one_cell(step):
    """Of the first sequence of the step, whatever its length: they are read and dropped."""
    sig, feeds, _ = step
    sig = replace(sig, shares_caches=True)
    feeds |= rows_as_sequences(feeds)
    shape, into = padded(feeds, sig, SIZES, spare_slot=SPARE)
    count = len(feeds["logit_rows"])
    assert into["row_cu_seqlens"].tolist() == list(range(shape.num_rows + 1))
    assert into["row_past_seqlens"][:count].tolist() == feeds["row_past_seqlens"].tolist()
    assert (into["row_sequences"][:count] == feeds["row_sequences"]).all()
    assert not into["row_past_seqlens"][count:].any()
    assert not into["row_sequences"][count:].any()


@given(steps())
def test_without_flash_attention_wide_heads_have_as_many_sequences_as_tokens(step):
    """ONNX Runtime then takes its kernel for decode steps, which gathers nothing."""
    sig, feeds, is_decode = step
    sig = replace(sig, gathered_heads=4)
    sizes = replace(SIZES, has_flash=False)
    shape, into = padded(feeds, sig, sizes, spare_slot=SPARE)
    assert shape.num_sequences == shape.num_tokens
    assert into["cu_seqlens"][-1] == shape.num_tokens
    assert (np.diff(into["cu_seqlens"]) >= 0).all()
    largest = largest_shapes(sizes, sig)
    assert all(s.num_sequences == s.num_tokens for s in largest)
    usual = SIZES.shape(feeds, sig, with_logits=False)
    assert is_decode or usual.num_sequences < usual.num_tokens


@given(st.lists(steps(), min_size=2, max_size=6))
def test_shapes_are_few(some):
    """A prefill step's kernels do not depend on what it holds, but for tables and probabilities."""
    shapes = [SIZES.shape(feeds, sig, with_logits=False) for sig, feeds, _ in some]
    for shape in shapes:
        assert shape.num_blocks == power_of_two(shape.num_blocks)
        assert shape.num_probabilities in (0, shape.num_rows)
        assert shape.is_decode or shape.num_rows == PREFILL_ROWS


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=4), st.booleans())
def test_spans_are_padded_by_one_that_no_token_takes(gaps, is_decode):
    sig = replace(signature(), optional_inputs=("inputs_embeds", "span_ends", "position_ids"))
    ends = np.cumsum([gap + length for gap, length in gaps]) if not is_decode else np.array([], int)
    lengths = [length for _, length in gaps][: len(ends)]
    num_tokens = int(ends[-1]) + 3 if len(ends) else 1
    feeder = Feeder(sig, 1, 300)
    feeds = feeder.feeds([(0, [5] * num_tokens)], all_rows=False)
    feeds[METADATA][0] = 1 if is_decode else 2
    parts = [np.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)]
    rows = np.concatenate([np.zeros(0, np.int64), *parts])
    places = np.full(num_tokens, -1)
    places[rows] = np.arange(len(rows))
    embeds = np.ones((max(1, len(rows)), sig.hidden_size), np.uint16)
    feeds |= {"span_rows": rows, "span_places": places, "embeds_rows": places}
    feeds |= {"span_cu_seqlens": np.cumsum([0, *lengths]).astype(np.int32)}
    feeds |= {"span_past_seqlens": (ends - lengths).astype(np.int32), "inputs_embeds": embeds}
    for group in ("full", "near"):
        feeds[f"span_block_table.{group}"] = feeds[f"block_table.{group}"].repeat(len(ends), axis=0)
    shape, into = padded(feeds, sig, SIZES, spare_slot=SPARE)
    sizes = [shape.num_span_tokens, shape.num_embeddings]
    assert sizes == ([1, 1] if not len(rows) else [min(power_of_two(len(rows)), 300)] * 2)
    for name in ("span_rows", "span_places", "span_past_seqlens", "inputs_embeds"):
        real = into[name][: len(feeds[name])]
        np.testing.assert_array_equal(real, feeds[name])
    for name in ("span_places", "embeds_rows"):
        assert (into[name][num_tokens:] == -1).all()
    starts = into["span_cu_seqlens"]
    assert (np.diff(starts) > 0).all()
    assert starts[-1] == shape.num_span_tokens == len(into["span_rows"])
    assert len(starts) - 1 == len(ends) + (shape.num_span_tokens > len(rows))
    assert not into["span_block_table.full"][len(ends) :].any()
    context = into["span_past_seqlens"] + np.diff(starts)
    assert (context <= into["span_block_table.full"].shape[1] * sig.block_size).all()


def test_a_prompt_of_one_token_is_no_decode_step():
    sig = signature()
    feeds = Feeder(sig, 1, 100).feeds([(0, [5])])
    feeds[METADATA][0] = 2
    assert not SIZES.shape(feeds, sig, with_logits=False).is_decode
    feeds[METADATA][0] = 1
    assert SIZES.shape(feeds, sig, with_logits=False).is_decode


def test_a_step_has_room_for_the_logits_of_all_rows_or_of_none():
    sig = signature()
    feeds = Feeder(sig, 2, 100).feeds([(0, [5, 6]), (1, [7])], all_rows=False)
    feeds["full_rows"] = np.array([1])
    for with_logits, wanted in ((False, []), (True, [1] + [0] * (PREFILL_ROWS - 1))):
        _, into = padded(feeds, sig, SIZES, spare_slot=SPARE, with_logits=with_logits)
        assert into["full_rows"].tolist() == wanted


@pytest.mark.parametrize("optional", [(), ("inputs_embeds", "span_ends")])
@pytest.mark.parametrize("head", ["generate", "score"])
def test_a_step_for_nobody_writes_nothing(head, optional):
    sig = replace(signature(head), optional_inputs=(*optional, "position_ids"))
    for shape in largest_shapes(SIZES, sig):
        into = {t.name: np.full(shape.of(t), 77, host_dtype(t.dtype)) for t in sig.step_inputs()}
        pad(no_step(sig), shape, {n: a for n, a in into.items() if n != METADATA}, spare_slot=SPARE)
        assert into["cu_seqlens"][0] == 0
        assert into["cu_seqlens"][-1] == shape.num_tokens
        for group in ("full", "near"):
            assert (into[f"slot_mapping.{group}"] == -1).all()
            assert (into[f"block_table.{group}"] == 0).all()
        if optional:
            assert (np.diff(into["span_cu_seqlens"]) > 0).all()
            assert (into["span_places"] == -1).all()
            assert (into["embeds_rows"] == -1).all()
            assert all(array.size for array in into.values()), "no input is empty"
        if head == "generate":
            assert (into["logit_slots"] == SPARE).all()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_texts_are_padded_with_short_ones(lengths):
    sig = Signature(
        head="embed", device="cuda", dtype="float32", vocab_size=97, hidden_size=8,
        max_model_len=200, states=(), embedding_size=4,
    )  # fmt: skip
    sizes = StepSizes(decode=(), prefill=(128, 256))
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    feeds = side_by_side({"input_ids": np.ones(ends[-1], np.int64), "cu_seqlens": ends})
    shape, into = padded(feeds, sig, sizes, spare_slot=SPARE)
    assert shape.size == (128 if ends[-1] <= 128 else 256)
    assert shape.text_length >= max(lengths)
    assert shape.num_sequences > len(lengths)
    rows = feeds["token_rows"]
    np.testing.assert_array_equal(into["token_rows"][: len(rows), : rows.shape[1]], rows)
    assert (into["token_rows"] >= 0).sum() == ends[-1]
    places = into["token_places"][: ends[-1]]
    np.testing.assert_array_equal(into["token_rows"].ravel()[places], np.arange(ends[-1]))
    np.testing.assert_array_equal(into["cu_seqlens"][: len(ends)], ends)
    assert into["cu_seqlens"][-1] == shape.num_tokens
    assert (np.diff(into["cu_seqlens"]) >= 1).all()


def test_what_is_too_large_is_refused():
    sig = signature()
    feeds = Feeder(sig, 1, 400).feeds([(0, [1] * 301)])
    with pytest.raises(DeviceError, match="at most 300 tokens, got 301"):
        SIZES.shape(feeds, sig, with_logits=False)
