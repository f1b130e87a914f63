"""The spans of a step, as the sequences by which a CUDA decoder attends in both directions."""

import numpy as np

from tests.doubles.fakes import fake_signature
from tests.engine.test_packing import admit, make_cache, pack_step


def test_spans_are_sequences_of_their_own():
    """One whole, one whose beginning is cached, and one that was over before the step."""
    signature = fake_signature(device="cuda")
    cache = make_cache(signature)
    plain = admit(cache, range(5))
    whole = admit(cache, range(12), spans=((0, 2), (3, 6), (6, 8)))
    part = admit(cache, range(40), computed=20, spans=((3, 9), (18, 25)))
    feeds = pack_step([(plain, 5), (whole, 12), (part, 9)], signature, cache)
    assert feeds["span_rows"].tolist() == [5, 6, 8, 9, 10, 11, 12, 17, 18, 19, 20, 21]
    assert feeds["span_cu_seqlens"].tolist() == [0, 2, 5, 7, 12]
    assert feeds["span_past_seqlens"].tolist() == [0, 3, 6, 20]
    places = feeds["span_places"]
    inside = places >= 0
    np.testing.assert_array_equal(feeds["span_rows"][places[inside]], np.flatnonzero(inside))
    assert inside.sum() == 12
    for group in ("full", "sliding"):
        table = feeds[f"block_table.{group}"]
        np.testing.assert_array_equal(feeds[f"span_block_table.{group}"], table[[1, 1, 1, 2]])


def test_a_step_without_spans_has_none():
    """What a decode step of a prompt with spans looks like; the session pads it."""
    signature = fake_signature(device="cuda")
    cache = make_cache(signature)
    past = admit(cache, range(12), computed=11, spans=((3, 6),))
    feeds = pack_step([(past, 1)], signature, cache)
    assert feeds["span_places"].tolist() == [-1]
    assert feeds["span_cu_seqlens"].tolist() == [0]
    for name in ("span_rows", "span_past_seqlens", "span_block_table.full"):
        assert len(feeds[name]) == 0
