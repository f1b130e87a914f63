"""How much state a session keeps: memory, divided among the groups of layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from beam_gemma.errors import OptionsError
from beam_gemma.model.graph_tensors import PagedState
from beam_gemma.model.signature import CONTEXT_ALIGNMENT, Signature, blocks_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """How much state a session keeps."""

    num_blocks: Mapping[str, int]
    """Cache blocks for each paged group; block 0 is padding and belongs to nobody."""
    num_state_slots: int
    """Sequences that have state of a fixed size."""


def plan_capacity(
    signature: Signature, *, num_bytes: int, max_num_seqs: int, max_num_batched_tokens: int
) -> Capacity:
    """Divide memory among the paged groups.

    A group with a window never needs more than the window, one chunk and the alignment of tables
    for each sequence; what it leaves goes to the others, up to the longest sequences there can be.
    """
    block = signature.block_size
    unit = CONTEXT_ALIGNMENT if signature.device == "cpu" else block
    longest = blocks_for(signature.max_model_len + unit, block)
    need, cost = {}, {}
    for state in signature.paged_states:
        per_sequence = longest
        if state.sliding_window is not None:
            reach = state.sliding_window + max_num_batched_tokens + 2 * unit
            per_sequence = min(longest, blocks_for(reach, block))
        need[state.group] = max_num_seqs * per_sequence + 1
        cost[state.group] = block_bytes(signature, state)
    if not need:
        return Capacity(num_blocks={}, num_state_slots=max_num_seqs)
    num_blocks = {}
    left = num_bytes
    # The cheapest need first, each with at most an equal share of what is left.
    for i, group in enumerate(sorted(need, key=lambda g: need[g] * cost[g])):
        share = left // (len(need) - i)
        num_blocks[group] = min(need[group], share // cost[group])
        left -= num_blocks[group] * cost[group]
    starved = [group for group, count in num_blocks.items() if count < 2]
    if starved:
        raise OptionsError(
            f"cache: expected memory for at least 2 blocks of {starved[0]}, "
            f"got {num_bytes:,} bytes in all; free memory or run on a larger machine"
        )
    return Capacity(num_blocks=num_blocks, num_state_slots=max_num_seqs)


def block_bytes(signature: Signature, state: PagedState) -> int:
    """Return the bytes of one block in all layers of a group, keys and values."""
    shape = (state.num_key_value_heads, state.head_dim, signature.block_size)
    return 2 * len(state.layers) * num_bytes(signature.dtype, shape)


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of an array of numpy's dtype, or of bfloat16, which numpy lacks."""
    return prod(shape) * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)
