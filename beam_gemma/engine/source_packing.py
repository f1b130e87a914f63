"""The inputs of a step whose sequences have a source: its states, and the cells of its tokens.

The states of a source are given once, in the step that computes the first tokens of its sequence.
Each layer then writes their keys and values to the cells that `source_slots` names.

Dimensions: B sequences, T new tokens, C source tokens of sequences that start in the step, N tokens
of a source, U width of the encoder, M blocks in a table row.
"""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from jaxtyping import Int32, Shaped

from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.step_layout import StepLayout
from beam_gemma.model.graph_tensors import PagedState
from beam_gemma.model.signature import CONTEXT_ALIGNMENT, Signature, blocks_for
from beam_gemma.runtime.step_shapes import host_dtype

Sources: TypeAlias = Mapping[bytes, Shaped[np.ndarray, "N U"]]
"""States of sources by the sources' digests."""
NO_SOURCES: Sources = {}


def source_states(
    layout: StepLayout, signature: Signature, sources: Sources
) -> dict[str, np.ndarray]:
    """Return the states of the sources that start in the step, and the length of each source.

    Without any, one row of zeros stands for them.
    """
    parts = [sources[sequence.source_digest] for _, sequence in layout.starting]
    if not parts:
        parts = [np.zeros((1, signature.source_size), host_dtype(signature.dtype))]
    return {"source_states": np.concatenate(parts), "source_seqlens": layout.source_seqlens}


def source_tables(
    layout: StepLayout, signature: Signature, cache: KVCache, state: PagedState
) -> dict[str, np.ndarray]:
    """Return the cache inputs of one group of layers that holds sources."""
    size = signature.block_size
    # As in other groups, CPU attention sums over whole chunks of the context.
    unit = CONTEXT_ALIGNMENT if signature.device == "cpu" else size
    width = blocks_for(int(_num_cells(state, layout).max()), unit) * unit // size
    table = cache.block_table(state.group)[layout.slots, :width]
    tables = {
        f"block_table.{state.group}": table,
        f"source_slots.{state.group}": _source_slots(layout, table, size),
    }
    if state.holds == "both":
        offsets = layout.positions % (state.sliding_window or signature.max_model_len)
        cells = layout.source_seqlens[layout.rows] + offsets
        blocks = table[layout.rows, cells // size]
        tables[f"slot_mapping.{state.group}"] = blocks * np.int32(size) + cells % size
    return tables


def _num_cells(state: PagedState, layout: StepLayout) -> Int32[np.ndarray, " B"]:
    """Return the number of cells of each sequence after the step."""
    if state.holds == "source":
        return layout.source_seqlens
    longest = state.sliding_window or int(layout.seqlens.max())
    return layout.source_seqlens + np.minimum(layout.seqlens, longest)


def _source_slots(
    layout: StepLayout, table: Int32[np.ndarray, "B M"], size: int
) -> Int32[np.ndarray, " C"]:
    """Return the cache slot of each source token of the sequences that start; -1 without any."""
    if not layout.starting:
        return np.full(1, -1, np.int32)
    indices = np.array([i for i, _ in layout.starting])
    lengths = layout.source_seqlens[indices]
    rows = np.repeat(indices, lengths)
    ends = lengths.cumsum(dtype=np.int32)
    cells = np.arange(len(rows), dtype=np.int32) - np.repeat(ends - lengths, lengths)
    return table[rows, cells // size] * np.int32(size) + cells % size
