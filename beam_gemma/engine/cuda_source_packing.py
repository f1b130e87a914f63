"""The inputs by which a CUDA decoder attends to sources.

Each new token is a sequence of its own, with the cells that its query reaches, and source tokens
come behind them (`export.ops.source_attention`).

Dimensions: T new tokens, C source tokens of sequences that start in the step, B sequences, M blocks
in a table row.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int64

from beam_gemma.model.graph_tensors import PagedState
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.step_shapes import METADATA, source_rows


def as_tokens(feeds: Mapping[str, np.ndarray], signature: Signature) -> dict[str, np.ndarray]:
    """Return a step's inputs with those of each token in place of those of each sequence.

    Args:
        feeds: The step's inputs, as a graph takes them whose attention takes sequences.
        signature: Contract of a CUDA decoder with sources.
    """
    rows = np.repeat(np.arange(len(feeds["past_seqlens"])), np.diff(feeds["cu_seqlens"]))
    num_source_tokens = len(feeds["source_states"])
    tokens = source_rows(len(rows), num_source_tokens)
    for state in signature.paged_states:
        if state.holds != "target":
            tokens |= _cells(feeds, rows, state)
    wanted = {tensor.name for tensor in signature.step_inputs()}
    others = {name: array for name, array in feeds.items() if name in wanted}
    longest, context, least = feeds[METADATA].tolist()
    pasts = (a for name, a in tokens.items() if name.startswith("token_past_seqlens."))
    reach = max(num_source_tokens, *(int(past.max()) + 1 for past in pasts))
    bounds = np.array([max(longest, num_source_tokens), max(context, reach), least], np.int32)
    return {**others, **tokens, METADATA: bounds}


def _cells(
    feeds: Mapping[str, np.ndarray], rows: Int64[np.ndarray, " T"], state: PagedState
) -> dict[str, np.ndarray]:
    """Return the inputs of one group: the cells that tokens reach, and those that are written."""
    group = state.group
    pasts = feeds["source_seqlens"][rows] - 1
    slots = np.full(len(rows), -1, np.int32)
    if state.holds == "both":
        last = feeds["position_ids"]
        if state.sliding_window is not None:
            last = np.minimum(last, state.sliding_window - 1)
        pasts = pasts + 1 + last
        slots = feeds[f"slot_mapping.{group}"]
    table = feeds[f"block_table.{group}"]
    padding = np.zeros((1, table.shape[1]), np.int32)
    return {
        f"token_past_seqlens.{group}": np.append(pasts, 0).astype(np.int32),
        f"token_block_table.{group}": np.concatenate([table[rows], padding]),
        f"token_slot_mapping.{group}": np.concatenate([slots, feeds[f"source_slots.{group}"]]),
    }
