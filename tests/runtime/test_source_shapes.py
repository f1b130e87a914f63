"""Padded steps of decoders with sources or recurrent state, and of encoders of sources."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.errors import DeviceError
from beam_gemma.model.graph_tensors import PagedState, RecurrentState
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.step_shapes import (
    METADATA,
    StepSizes,
    in_rows,
    largest_shapes,
    no_step,
    pad,
    power_of_two,
    side_by_side,
)
from tests.doubles.ragged import Feeder, Feeds, padded
from tests.doubles.ragged_sources import SourceFeeder

SIZES = StepSizes(decode=(4, 16), prefill=(40,), sources=(60, 120))
SPARE = 16
SIGNATURE = Signature(
    head="generate",
    device="cuda",
    dtype="float32",
    vocab_size=97,
    hidden_size=8,
    max_model_len=500,
    states=(
        PagedState(group="own", layers=(0,), num_key_value_heads=1, head_dim=8),
        PagedState(group="cross", layers=(0,), num_key_value_heads=1, head_dim=8, holds="source"),
        PagedState(
            group="ring", layers=(1,), num_key_value_heads=1, head_dim=8, sliding_window=9,
            holds="both",
        ),
    ),
    block_size=64,
    optional_inputs=("position_ids",),
    source_size=4,
    max_source_len=120,
)  # fmt: skip
RECURRENT = replace(
    SIGNATURE,
    states=(SIGNATURE.states[0], RecurrentState(name="tail", layers=(1,), shape=(3, 8))),
    source_size=0,
    max_source_len=0,
)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Feeds, bool]:
    is_decode = draw(st.booleans())
    lengths = draw(st.lists(st.integers(1, 1 if is_decode else 9), min_size=1, max_size=4))
    sources = [draw(st.integers(1, 60 // len(lengths))) for _ in lengths]
    states = [np.full((n, 4), n, np.float32) for n in sources]
    feeder = SourceFeeder(SIGNATURE, states, 60)
    feeder.past = [draw(st.integers(1, 40)) if is_decode else 0 for _ in lengths]
    feeds = feeder.feeds([(i, [5] * n) for i, n in enumerate(lengths)], all_rows=False)
    feeds[METADATA][0] = 1 if is_decode else 60
    return feeds, is_decode


@given(steps(), st.booleans())
def test_padding_parts_new_tokens_from_source_tokens(
    step: tuple[Feeds, bool], has_flash: bool
) -> None:
    feeds, is_decode = step
    shape, into = padded(feeds, SIGNATURE, replace(SIZES, has_flash=has_flash), spare_slot=SPARE)
    num_new, num_source = len(feeds["input_ids"]), len(feeds["source_states"])
    end = shape.num_tokens
    assert shape.num_source_tokens == (1 if is_decode else 60)
    np.testing.assert_array_equal(into["token_places"], np.arange(end))
    np.testing.assert_array_equal(into["token_rows"][into["token_places"]], np.arange(end))
    np.testing.assert_array_equal(into["source_rows"][end:], np.arange(shape.num_source_tokens))
    assert (into["source_rows"][:end] == -1).all()
    assert (into["token_rows"][end:] == -1).all()
    starts = into["token_cu_seqlens"]
    np.testing.assert_array_equal(starts[: end + 1], np.arange(end + 1))
    assert starts[-1] == end + shape.num_source_tokens
    lengths = np.diff(starts[end:])
    assert (lengths == (shape.num_source_tokens if has_flash else 1)).all()
    for group in ("cross", "ring"):
        slots, given_slots = (f[f"token_slot_mapping.{group}"] for f in (into, feeds))
        np.testing.assert_array_equal(slots[:num_new], given_slots[:num_new])
        np.testing.assert_array_equal(slots[end : end + num_source], given_slots[num_new:])
        assert (np.delete(slots, np.r_[:num_new, end : end + num_source]) == -1).all()
        past, table = into[f"token_past_seqlens.{group}"], into[f"token_block_table.{group}"]
        assert not past[num_new:].any()
        assert not table[num_new:].any(), "padding reads block 0"
        room = table.shape[1] * SIGNATURE.block_size
        assert (past + np.diff(starts) <= room).all()
        assert past.max() < shape.metadata(SIGNATURE.block_size)[1] <= room
    assert shape.metadata(SIGNATURE.block_size)[0] >= max(lengths)
    assert all(array.size for name, array in into.items() if name not in _MAY_BE_EMPTY)


_MAY_BE_EMPTY = ("probability_rows", "full_rows")


@pytest.mark.parametrize("head", ["generate", "score"])
@pytest.mark.parametrize("signature", [SIGNATURE, RECURRENT], ids=["sources", "recurrent"])
def test_a_step_for_nobody_writes_nothing(signature: Signature, head: str) -> None:
    signature = replace(signature, head=head)
    for shape in largest_shapes(SIZES, signature):
        into = {t.name: np.full(shape.of(t), 7, t.dtype) for t in signature.step_inputs()}
        assert all(array.size for array in into.values()), "no input is empty"
        own = {name: array for name, array in into.items() if name != METADATA}
        pad(no_step(signature), shape, own, spare_slot=SPARE)
        for name, array in own.items():
            if "slot_mapping" in name:
                assert (array == -1).all()
            elif "table" in name or "past" in name:
                assert not array.any()
        if signature is not SIGNATURE and "state_slots" in own:
            assert (own["state_slots"] == SPARE).all()
            assert (own["token_rows"] == -1).all()


def test_a_long_source_has_a_size_of_its_own_and_a_longer_one_is_refused() -> None:
    assert [SIZES.source_sizes(n)["num_source_tokens"] for n in (1, 60, 61, 120)] == [
        60, 60, 120, 120,
    ]  # fmt: skip
    with pytest.raises(DeviceError, match="at most 120 tokens, got 121"):
        SIZES.source_sizes(121)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans())
def test_sequences_side_by_side_find_their_tokens(lengths: list[int], is_decode: bool) -> None:
    lengths = [1 if is_decode else n for n in lengths]
    feeder = Feeder(RECURRENT, len(lengths), 60)
    feeds = feeder.feeds([(i, [5] * n) for i, n in enumerate(lengths)], all_rows=False)
    feeds |= in_rows(feeds["cu_seqlens"])
    feeds[METADATA][0] = 1 if is_decode else 2
    shape, into = padded(feeds, RECURRENT, SIZES, spare_slot=SPARE)
    rows, places = into["token_rows"], into["token_places"][: sum(lengths)]
    assert rows.shape == (shape.num_sequences, power_of_two(max(lengths)))
    np.testing.assert_array_equal(rows.ravel()[places], np.arange(sum(lengths)))
    owners = np.repeat(np.arange(len(lengths)), lengths)
    np.testing.assert_array_equal(places // rows.shape[1], owners)
    assert (rows >= 0).sum() == sum(lengths)
    assert (into["state_slots"][len(lengths) :] == SPARE).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_a_step_of_sources_has_one_number_of_tokens(lengths: list[int]) -> None:
    encoder = replace(
        SIGNATURE, head="encode", states=(), source_size=0, max_model_len=120, max_source_len=0,
        optional_inputs=("inputs_embeds",),
    )  # fmt: skip
    sizes = StepSizes(decode=(), prefill=(100, 200))
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    feeds = side_by_side({
        "input_ids": np.ones(starts[-1], np.int64),
        "cu_seqlens": starts,
        "inputs_embeds": np.zeros((1, 8), np.float32),
        "embeds_rows": np.full(starts[-1], -1),
    })  # fmt: skip
    shape, into = padded(feeds, encoder, sizes, spare_slot=SPARE)
    assert shape.num_tokens == 100
    places = into["token_places"][: starts[-1]]
    np.testing.assert_array_equal(into["token_rows"].ravel()[places], np.arange(starts[-1]))
    assert (into["embeds_rows"] == -1).all()
    [most_texts, longest] = largest_shapes(sizes, encoder)
    assert most_texts.num_tokens == longest.num_tokens == 200
    assert longest.text_length >= 120
