"""Whole texts side by side, for kernels that take a rectangle of tokens.

Dimensions: B texts, T tokens, L places of a text.
"""

from collections.abc import Mapping

import numpy as np

PAD_TEXTS_TO = 16
"""Texts are padded to a multiple of so many tokens; kernels that can mask want one of 4."""


def side_by_side(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the inputs of a step that embeds on CUDA, for packed `input_ids` and `cu_seqlens`."""
    ends = feeds["cu_seqlens"].astype(np.int64)
    lengths = np.diff(ends)
    width = -(-int(lengths.max()) // PAD_TEXTS_TO) * PAD_TEXTS_TO
    places = np.arange(width)
    rows = np.where(places < lengths[:, None], ends[:-1, None] + places, -1)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(ends[-1]) - ends[owners]
    return {
        **feeds,
        "position_ids": positions,
        "token_rows": rows,
        "token_places": owners * width + positions,
    }
