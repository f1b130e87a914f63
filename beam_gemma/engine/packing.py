"""The input arrays of one step, under the names of the graph's signature.

Where the graph chooses next tokens, a token that a step in flight chooses is not known here yet;
the input then names the slot where the device keeps it. For a row whose token the host chooses, the
device still makes a greedy choice, which is never read.

Dimensions: B sequences, T new tokens, R rows that need a next token, L tokens of a picture, D
hidden.
"""

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf

import numpy as np
from jaxtyping import Int32, Shaped

from beam_gemma.engine.cuda_source_packing import as_tokens
from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.sampling import uniform_at
from beam_gemma.engine.sequence import Medium, Sequence, Step
from beam_gemma.engine.source_packing import NO_SOURCES, Sources, source_states, source_tables
from beam_gemma.engine.span_packing import span_inputs
from beam_gemma.engine.step_layout import StepLayout
from beam_gemma.model.graph_tensors import PagedState
from beam_gemma.model.signature import CONTEXT_ALIGNMENT, Signature, blocks_for
from beam_gemma.runtime.step_shapes import host_dtype, in_rows

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
Features = Mapping[bytes, Shaped[np.ndarray, "L D"]]
"""Embeddings of pictures and sounds by the digests of these."""
NO_FEATURES: Features = {}


def pack(
    step: Step,
    signature: Signature,
    cache: KVCache,
    features: Features = NO_FEATURES,
    sources: Sources = NO_SOURCES,
) -> dict[str, np.ndarray]:
    """Return the arrays of `signature.step_inputs` for a step whose cache blocks are in place.

    Args:
        step: The sequences of the step, with the number of new tokens of each.
        signature: The graph's contract.
        cache: The cache that holds the step's blocks.
        features: Embeddings of all media that have tokens in the step.
        sources: States of the sources of all sequences that start in the step.
    """
    layout = StepLayout(step)
    feeds: dict[str, np.ndarray] = {
        "input_ids": layout.input_ids,
        "cu_seqlens": layout.cu_seqlens,
        "past_seqlens": layout.past_seqlens,
        **(_targets(step, layout) if signature.head == "score" else _last_tokens(step, layout)),
    }
    if signature.chooses:
        rows = [s for s, n in step if s.num_pending_tokens == n]
        feeds |= {"token_slots": layout.token_slots, **_choices(rows)}
    feeds |= _state_inputs(layout, signature, cache, sources)
    if "inputs_embeds" in signature.optional_inputs:
        feeds |= _embeddings(step, layout, signature, features)
    if "span_ends" in signature.optional_inputs and signature.device == "cuda":
        feeds |= span_inputs(step, signature, feeds)
    elif "span_ends" in signature.optional_inputs:
        feeds["span_ends"] = _span_ends(step, layout)
    if "first_keys" in signature.optional_inputs:
        feeds["first_keys"] = _first_keys(step, layout, signature)
    if "position_ids" in signature.optional_inputs:
        feeds["position_ids"] = layout.positions.astype(np.int64)
    if signature.device == "cuda" and signature.paged_states:
        is_decode = not any(sequence.is_prefilling for sequence, _ in step)
        feeds["attention_metadata"] = _attention_metadata(layout, is_decode=is_decode)
    if signature.device == "cuda" and signature.shares_caches:
        feeds |= rows_as_sequences(feeds)
    if signature.device == "cuda" and signature.has_source:
        return as_tokens(feeds, signature)
    return feeds


def _state_inputs(
    layout: StepLayout, signature: Signature, cache: KVCache, sources: Sources
) -> dict[str, np.ndarray]:
    """Return the inputs of each kind of state of the model, and the states of sources."""
    feeds: dict[str, np.ndarray] = {}
    for state in signature.paged_states:
        tables = _tables if state.holds == "target" else source_tables
        feeds |= tables(layout, signature, cache, state)
    if signature.has_source:
        feeds |= source_states(layout, signature, sources)
    if signature.has_recurrent_state:
        feeds["state_slots"] = layout.slots
        feeds |= in_rows(layout.cu_seqlens) if signature.device == "cuda" else {}
    return feeds


def _last_tokens(step: Step, layout: StepLayout) -> dict[str, np.ndarray]:
    """Return the last rows of sequences that get a next token, and which need a probability."""
    done = np.array([s.num_pending_tokens == n for s, n in step], bool)
    wanted = np.array([s.request.logprob for s, _ in step], bool)
    return {
        "logit_rows": layout.cu_seqlens[1:][done].astype(np.int64) - 1,
        "probability_rows": np.flatnonzero(wanted[done]),
    }


def _choices(rows: list[Sequence]) -> dict[str, np.ndarray]:
    """Return the inputs by which the graph chooses each row's next token, and its slot."""
    is_hosts = [row.wants_logits for row in rows]
    params = [row.request.params for row in rows]
    is_drawn = [p.temperature > 0 and not host for p, host in zip(params, is_hosts, strict=True)]
    uniforms = [
        uniform_at(row.request.params.seed, row.request.sampling_key, row.num_tokens)
        if drawn
        else 0
        for row, drawn in zip(rows, is_drawn, strict=True)
    ]
    return {
        "logit_slots": np.array([row.slot for row in rows], np.int32),
        "temperatures": np.where(is_drawn, [p.temperature for p in params], 0).astype(np.float32),
        # Rounding to float32 must not lift a number to 1.
        "uniforms": np.minimum(np.array(uniforms, np.float32), BELOW_ONE),
        "top_ks": np.where(is_drawn, [p.top_k for p in params], 1).astype(np.int32),
        "top_ps": np.array([p.top_p for p in params], np.float32),
        "full_rows": np.flatnonzero(is_hosts),
    }


def _targets(step: Step, layout: StepLayout) -> dict[str, np.ndarray]:
    """Return the step's targets, and the distinct rows whose logits score them."""
    rows, ids, wanted = [], [], []
    for begin, (sequence, num_new_tokens) in zip(layout.cu_seqlens.tolist(), step, strict=False):
        for i in sequence.targets_within(sequence.num_computed_tokens, num_new_tokens):
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


def rows_as_sequences(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the inputs by which CUDA layers without caches take each row as a sequence.

    Args:
        feeds: The step's `cu_seqlens`, `logit_rows` and `position_ids`.
    """
    rows = feeds["logit_rows"]
    return {
        "row_sequences": np.searchsorted(feeds["cu_seqlens"], rows, side="right") - 1,
        "row_cu_seqlens": np.arange(len(rows) + 1, dtype=np.int32),
        "row_past_seqlens": feeds["position_ids"][rows].astype(np.int32),
    }


def _tables(
    layout: StepLayout, signature: Signature, cache: KVCache, state: PagedState
) -> dict[str, np.ndarray]:
    """Return the cache inputs of one group of layers."""
    size = signature.block_size
    starts = cache.context_starts(state.group)[layout.slots]
    # CPU attention sums over fixed chunks of the context, so tables hold whole chunks.
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


def _embeddings(
    step: Step, layout: StepLayout, signature: Signature, features: Features
) -> dict[str, np.ndarray]:
    """Return the embeddings of the step's media, and which token has which."""
    ranges = (
        (begin, sequence.num_computed_tokens, n, sequence.request.media)
        for begin, (sequence, n) in zip(layout.cu_seqlens.tolist(), step, strict=False)
    )
    return place_embeddings(ranges, len(layout.positions), signature, features)


def place_embeddings(
    ranges: Iterable[tuple[int, int, int, SequenceOf[Medium]]],
    num_tokens: int,
    signature: Signature,
    features: Features,
) -> dict[str, np.ndarray]:
    """Return the embeddings of media in a step, at most T, and which token has which.

    Without any, one row of zeros stands for them.

    Args:
        ranges: For each text, where its new tokens start in the step, the position of the first
            in the text, their number, and the media of the text.
        num_tokens: Number of all new tokens.
        signature: The graph's contract.
        features: Embeddings of all media that have tokens in the step.
    """
    rows = np.full(num_tokens, -1, np.int64)
    parts: list[np.ndarray] = []
    num_rows = 0
    for begin, past, num_new_tokens, media in ranges:
        for medium in media:
            first = max(past, medium.start)
            end = min(past + num_new_tokens, medium.end)
            if first >= end:
                continue
            parts.append(features[medium.digest][first - medium.start : end - medium.start])
            rows[begin + first - past : begin + end - past] = np.arange(end - first) + num_rows
            num_rows += end - first
    embeds = np.zeros((max(num_rows, 1), signature.hidden_size), host_dtype(signature.dtype))
    if parts:
        np.concatenate(parts, out=embeds)
    return {"inputs_embeds": embeds, "embeds_rows": rows}


def _spans(step: Step, layout: StepLayout) -> Iterator[tuple[slice, int, int]]:
    """Yield the packed positions, start and end of each span that has tokens in the step."""
    for begin, (sequence, num_new_tokens) in zip(layout.cu_seqlens.tolist(), step, strict=False):
        past = sequence.num_computed_tokens
        shift = begin - past
        for start, end in sequence.spans_within(num_new_tokens):
            yield slice(max(start, past) + shift, end + shift), start, end


def _span_ends(step: Step, layout: StepLayout) -> Int32[np.ndarray, " T"]:
    """Return the last position each token attends to: its own, or the end of its span."""
    ends = layout.positions.copy()
    for places, _, end in _spans(step, layout):
        ends[places] = end - 1
    return ends


def _first_keys(step: Step, layout: StepLayout, signature: Signature) -> Int32[np.ndarray, " T"]:
    """Return the first position each token attends to in layers with a window.

    It is the start of the token's span if that lies before the window.
    """
    window = signature.shortest_window or signature.max_model_len
    first_keys = np.maximum(layout.positions - np.int32(window - 1), 0)
    for places, start, _ in _spans(step, layout):
        first_keys[places] = np.minimum(first_keys[places], start)
    return first_keys


def _attention_metadata(layout: StepLayout, *, is_decode: bool) -> Int32[np.ndarray, " 3"]:
    """Return upper bounds of new tokens and context per sequence, and 0, an unknown lower bound.

    Bounds only choose kernels and size their workspaces; powers of two keep the choices few. One
    new token means decode, so a step of prompts says two even if each has one token left.
    """
    longest = 1 if is_decode else max(2, int(layout.num_new_tokens.max()))
    bounds = (longest, int(layout.seqlens.max()))
    return np.array([*(1 << (bound - 1).bit_length() for bound in bounds), 0], np.int32)
