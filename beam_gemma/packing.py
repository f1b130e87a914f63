"""One step's arrays, under the names that the graph's signature gives them.

Dimensions: B sequences, T new tokens.
"""

import numpy as np
from jaxtyping import Int32, Int64

from beam_gemma.kv_cache import KVCache
from beam_gemma.sequence import Step
from beam_gemma.signature import CONTEXT_ALIGNMENT, PagedState, Signature, blocks_for


def pack(step: Step, signature: Signature, cache: KVCache) -> dict[str, np.ndarray]:
    """Return what `signature.step_inputs` names for a step whose cache blocks are in place."""
    layout = _Layout(step)
    feeds: dict[str, np.ndarray] = {
        "input_ids": layout.input_ids,
        "cu_seqlens": layout.cu_seqlens,
        "past_seqlens": layout.past_seqlens,
        **(_targets(step, layout) if signature.head == "score" else _last_tokens(step, layout)),
    }
    if signature.chooses:
        feeds |= _choices(len(layout.input_ids), len(feeds["logit_rows"]))
    for state in signature.paged_states:
        feeds |= _tables(layout, signature, cache, state)
    if signature.has_recurrent_state:
        feeds["state_slots"] = layout.slots
    if "inputs_embeds" in signature.optional_inputs:
        # numpy has no bfloat16: such values travel as their bits.
        dtype = "uint16" if signature.dtype == "bfloat16" else signature.dtype
        feeds["inputs_embeds"] = np.zeros((0, signature.hidden_size), dtype)
        feeds["embeds_rows"] = np.zeros(0, np.int64)
    if "span_ends" in signature.optional_inputs:
        feeds["span_ends"] = _span_ends(step, layout)
    if "position_ids" in signature.optional_inputs:
        feeds["position_ids"] = layout.positions.astype(np.int64)
    if signature.device == "cuda" and signature.paged_states:
        feeds["attention_metadata"] = _attention_metadata(layout)
    return feeds


class _Layout:
    """Where each new token of a step lies: its sequence and its position there."""

    input_ids: Int64[np.ndarray, " T"]
    rows: Int64[np.ndarray, " T"]
    """Which of the step's sequences each token belongs to."""
    positions: Int32[np.ndarray, " T"]
    """Of each token in its sequence."""
    num_new_tokens: Int32[np.ndarray, " B"]
    past_seqlens: Int32[np.ndarray, " B"]
    slots: Int32[np.ndarray, " B"]

    def __init__(self, step: Step) -> None:
        self.num_new_tokens = np.array([n for _, n in step], np.int32)
        self.past_seqlens = np.array([s.num_computed_tokens for s, _ in step], np.int32)
        self.slots = np.array([s.slot for s, _ in step], np.int32)
        new_ids = (s.token_ids[s.num_computed_tokens : s.num_computed_tokens + n] for s, n in step)
        self.input_ids = np.array([i for ids in new_ids for i in ids], np.int64)
        self.cu_seqlens = np.zeros(len(step) + 1, np.int32)
        np.cumsum(self.num_new_tokens, out=self.cu_seqlens[1:])
        self.rows = np.repeat(np.arange(len(step)), self.num_new_tokens)
        shift = self.past_seqlens - self.cu_seqlens[:-1]
        self.positions = np.arange(len(self.rows), dtype=np.int32) + shift[self.rows]

    @property
    def seqlens(self) -> Int32[np.ndarray, " B"]:
        """Tokens of each sequence after the step."""
        return self.past_seqlens + self.num_new_tokens


def _last_tokens(step: Step, layout: _Layout) -> dict[str, np.ndarray]:
    """Return the rows of sequences that get a next token."""
    done = np.array([s.num_pending_tokens == n for s, n in step], bool)
    wanted = np.array([s.request.logprob for s, _ in step], bool)
    return {
        "logit_rows": layout.cu_seqlens[1:][done].astype(np.int64) - 1,
        "probability_rows": np.flatnonzero(wanted[done]),
    }


def _choices(num_tokens: int, num_rows: int) -> dict[str, np.ndarray]:
    """Return what lets the graph choose: here the most likely tokens, which nobody reads."""
    return {
        "token_slots": np.full(num_tokens, -1, np.int32),
        "logit_slots": np.zeros(num_rows, np.int32),
        "temperatures": np.zeros(num_rows, np.float32),
        "uniforms": np.zeros(num_rows, np.float32),
        "top_ks": np.ones(num_rows, np.int32),
        "top_ps": np.ones(num_rows, np.float32),
        "full_rows": np.zeros(0, np.int64),
    }


def _targets(step: Step, layout: _Layout) -> dict[str, np.ndarray]:
    """Return the targets of the step, and the rows before them, each once."""
    rows, ids, wanted = [], [], []
    for begin, (sequence, num_new_tokens) in zip(layout.cu_seqlens.tolist(), step, strict=False):
        for i in sequence.targets_within(num_new_tokens):
            position, token_id = sequence.request.targets[i]
            rows.append(begin + position - sequence.num_computed_tokens)
            ids.append(token_id)
            wanted.append(sequence.request.normalized)
    logit_rows, target_rows = np.unique(np.array(rows, np.int64), return_inverse=True)
    return {
        "logit_rows": logit_rows,
        "probability_rows": np.unique(target_rows[np.array(wanted, bool)]),
        "target_rows": target_rows,
        "target_ids": np.array(ids, np.int64),
    }


def _tables(
    layout: _Layout, signature: Signature, cache: KVCache, state: PagedState
) -> dict[str, np.ndarray]:
    """Return the inputs of one group of layers."""
    size = signature.block_size
    starts = cache.context_starts(state.group)[layout.slots]
    # On the CPU attention adds up fixed chunks of the context, so tables hold whole chunks.
    unit = CONTEXT_ALIGNMENT if signature.device == "cpu" else size
    longest = int((layout.seqlens - starts).max())
    width = blocks_for(longest, unit) * unit // size
    table = cache.block_table(state.group)[layout.slots, :width]
    offsets = layout.positions - starts[layout.rows]
    blocks = table[layout.rows, offsets // size]
    tables = {
        f"block_table.{state.group}": table,
        f"slot_mapping.{state.group}": blocks * np.int32(size) + offsets % size,
    }
    if signature.takes_context_starts(state):
        tables[f"context_starts.{state.group}"] = starts
    return tables


def _span_ends(step: Step, layout: _Layout) -> Int32[np.ndarray, " T"]:
    """Return the last position that each token attends to: its own, or the last of its span."""
    ends = layout.positions.copy()
    for row, (sequence, num_new_tokens) in enumerate(step):
        past = sequence.num_computed_tokens
        for start, end in sequence.request.spans:
            if past <= start < past + num_new_tokens:
                first = layout.cu_seqlens[row] + start - past
                ends[first : first + end - start] = end - 1
    return ends


def _attention_metadata(layout: _Layout) -> Int32[np.ndarray, " 3"]:
    """Return bounds of new tokens and of context in one sequence; 0 is an unknown lower bound.

    Bounds only choose kernels and size their workspaces. Powers of two keep the choices few.
    """
    bounds = (int(lengths.max()) for lengths in (layout.num_new_tokens, layout.seqlens))
    return np.array([*(1 << (bound - 1).bit_length() for bound in bounds), 0], np.int32)
