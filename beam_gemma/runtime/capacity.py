"""Sizes of a session's state: memory divided among the groups of layers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from beam_gemma.errors import OptionsError
from beam_gemma.model.graph_tensors import PagedState, StateTensor
from beam_gemma.model.signature import CONTEXT_ALIGNMENT, Signature, blocks_for

NUM_SNAPSHOTS = 16
"""Slots for snapshots of recurrent state, beside those of sequences: 12 MB for RecurrentGemma 2B,
whose state takes 0.7 MB in 32 bits. Rows of a job have few prefixes in common at a time."""

GATHERED_SHARE = 1 / 4
"""Most of the memory beside weights for keys and values that a prefill step gathers; sequences are
shorter where that is too little (`Signature.gathered_bytes`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """Sizes of a session's state."""

    num_blocks: Mapping[str, int]
    """Cache blocks per paged group, including block 0, which is reserved for padding."""
    num_state_slots: int
    """Slots for state of a fixed size: one per sequence, then those for snapshots."""

    def shape_of(self, tensor: StateTensor) -> tuple[int, ...]:
        """Return the shape of a state tensor, with a number in place of each letter."""
        sizes = {"S": self.num_state_slots}
        sizes |= {f"P_{group}": count for group, count in self.num_blocks.items()}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape)


def plan_capacity(
    signature: Signature, *, num_bytes: int, max_num_seqs: int, max_num_batched_tokens: int
) -> Capacity:
    """Divide memory among the paged groups, after the recurrent state of all slots.

    Per sequence, a group with a sliding window needs at most the window, one chunk and the
    alignment of block tables. The other groups get the rest, up to `max_model_len` per sequence,
    `max_source_len` if they hold sources alone, and as many cells as both take if they hold both.

    Raises:
        OptionsError: a group gets fewer than 2 blocks.
    """
    num_state_slots = num_slots(signature, max_num_seqs)
    block = signature.block_size
    unit = CONTEXT_ALIGNMENT if signature.device == "cpu" else block
    need, cost = {}, {}
    for state in signature.paged_states:
        num_cells = state.num_cells(signature.max_source_len, signature.max_model_len)
        longest = per_sequence = blocks_for(num_cells + unit, block)
        if state.sliding_window is not None and state.holds == "target":
            reach = state.sliding_window + max_num_batched_tokens + 2 * unit
            per_sequence = min(longest, blocks_for(reach, block))
        need[state.group] = max_num_seqs * per_sequence + 1
        cost[state.group] = block_bytes(signature, state)
    if not need:
        return Capacity(num_blocks={}, num_state_slots=num_state_slots)
    num_blocks = {}
    left = max(0, num_bytes - num_state_slots * slot_bytes(signature))
    # Serve the smallest need first; each group gets at most an equal share of the remaining bytes.
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
    return Capacity(num_blocks=num_blocks, num_state_slots=num_state_slots)


def within_reach(signature: Signature, *, num_bytes: int, num_prefill_tokens: int) -> Signature:
    """Return the contract with the longest sequence whose keys and values a step can gather.

    Args:
        signature: The contract.
        num_bytes: Memory for all that takes its size from the free memory.
        num_prefill_tokens: Most new tokens of a prefill step, which may all be padding.
    """
    if not signature.gathered_bytes:
        return signature
    num_cells = int(GATHERED_SHARE * num_bytes) // signature.gathered_bytes
    longest = max(num_cells - num_prefill_tokens, num_prefill_tokens)
    return replace(signature, max_model_len=min(longest, signature.max_model_len))


def num_slots(signature: Signature, max_num_seqs: int) -> int:
    """Return the number of slots for state of a fixed size, snapshots of it included."""
    return max_num_seqs + NUM_SNAPSHOTS * signature.has_recurrent_state


def slot_bytes(signature: Signature) -> int:
    """Return the size in bytes of one sequence's recurrent state in all layers."""
    states = signature.recurrent_states
    return sum(len(s.layers) * num_bytes(s.dtype, s.shape) for s in states)


def block_bytes(signature: Signature, state: PagedState) -> int:
    """Return the size in bytes of one block's keys and values in all layers of a group."""
    shape = (state.num_key_value_heads, state.head_dim, signature.block_size)
    return 2 * len(state.layers) * num_bytes(signature.dtype, shape)


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return an array's size in bytes; `dtype` is a numpy name or bfloat16, which numpy lacks."""
    return prod(shape) * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)
