"""Whole texts side by side, and back."""

import numpy as np

from beam_gemma.engine.embedding_engine import feeds
from beam_gemma.runtime.step_shapes import PAD_TEXTS_TO, side_by_side


def test_each_token_has_a_place_and_each_place_a_token_or_none():
    texts = [[7, 8, 9], [5], list(range(20, 20 + PAD_TEXTS_TO + 1))]
    step = side_by_side(feeds(texts))
    rows = step["token_rows"]
    assert rows.shape == (3, 2 * PAD_TEXTS_TO)
    laid = np.where(rows >= 0, step["input_ids"][rows], -1)
    assert [line[line >= 0].tolist() for line in laid] == texts
    assert step["input_ids"].tolist() == laid.reshape(-1)[step["token_places"]].tolist()
    assert step["position_ids"].tolist() == [i for text in texts for i in range(len(text))]
    assert {step[name].dtype for name in ("token_rows", "token_places", "position_ids")} == {
        np.dtype(np.int64)
    }
