"""The contract between an exported graph and the engine that runs it.

A graph computes one *ragged step*: the new tokens of many sequences, packed without padding. This
module names every input and output, with dtype and symbolic shape, for each device, so that neither
the exporter nor the engine writes a name as a literal.

Dimensions: B sequences of the step, T new tokens, R packed positions that need a head, Q of these
that need a probability, F of these that need the whole distribution, Y targets, V vocabulary,
D hidden, K key-value heads, H head dimension, P cache blocks, M blocks in a table row, S slots of
sequences, E positions with given embeddings, W width of an embedding, L places of a text.

Inputs of every graph
    input_ids [T] int64            packed new tokens
    cu_seqlens [B+1] int32         where each sequence's new tokens start

Inputs of decoders, heads `generate` and `score`
    past_seqlens [B] int32         tokens of each sequence that earlier steps have seen
    logit_rows [R] int64           the packed positions that need a head
    probability_rows [Q] int64     of these R rows, those that need a probability

For each kind of state that a model keeps
    PagedState (keys and values of each token, one group of layers)
        block_table.g [B, M] int32     cache blocks of each sequence, for group g
        context_starts.g [B] int32     CPU, windows only: position of the first slot of the table
        slot_mapping.g [T] int32       where each new key and value goes; -1 skips the write
        key_cache.i, value_cache.i     one pair for each layer i, updated in place
    RecurrentState (fixed size for each sequence)
        state_slots [B] int32          the slot of each sequence; its content counts as zero where
                                       past_seqlens is 0
        name.i [S, ...]                one for each layer i, updated in place
    CrossState (keys and values of an encoder's output, read by every step)
        block_table.cross_attention [B, M] int32, source_seqlens [B] int32
        cross_key_cache.i, cross_value_cache.i

Optional inputs, where a model declares them
    inputs_embeds [E, D], embeds_rows [E]   embeddings in place of ids at these packed positions
    span_ends [T] int32            the last position that a token attends to; its own when causal.
                                   Greater inside a span that is attended both ways
    position_ids [T] int64         rotary positions, where they are not the sequence positions

Outputs of the `generate` head
    topk_logits [R, k] float32, topk_ids [R, k] int64    highest first; equal logits by id
    top_probability [Q] float32    of the first candidate
    logits [R, V] float32          fetched only when a row needs the whole distribution

Head `score`: the logits of given tokens alone, and what normalizes them
    target_rows [Y] int64          of the R rows, the one before each target
    target_ids [Y] int64           the targets
    target_logits [Y] float32      output
    top_logits [Q] float32         output, of the most likely token; with its probability,
    top_probability [Q] float32    log(sum(exp(logits))) = top_logits - log(top_probability)

Head `embed`: no state, since every text is computed whole in one step
    embedding [B, W] float32       output: of each sequence
    first_state [B, D] float32     output, of each sequence's first token: with two-sided attention
                                   it follows from all tokens, else from itself alone

Graphs for CUDA that embed also take
    position_ids [T]
    token_rows [B, L] int64        texts side by side, with the packed position of each token; -1 is
                                   padding
    token_places [T] int64         where in these B * L places each token lies

CUDA decoders also take
    position_ids [T]               always, so that no position is computed on the device
    attention_metadata [3] int32   in host memory: upper bounds that let kernels be chosen without
                                   waiting for the stream

and with the head `generate` they choose the next tokens themselves, so that a step can follow
another before the host has seen what it chose:
    token_slots [T] int32          where a token lies in `next_ids`; -1: it is that of `input_ids`
    logit_slots [R] int32          where in `next_ids` a row's token goes
    temperatures [R] float32       0 takes the most likely token
    uniforms [R] float32           a number in [0, 1) for the row's draw
    top_ks [R] int32               1 to 64 candidates to draw from; any with temperature 0
    top_ps [R] float32             the share of their probability to draw from
    full_rows [F] int64            of these R rows, those whose whole distribution is fetched:
                                   `logits` is [F, V] there
    next_ids [S] int64             state: the last token that was chosen for each slot
    chosen_ids [R] int64, chosen_logits [R] float32    output: what `sampling.sample` would choose
    top_logits [R] float32         output, of the most likely token; NaN where the row's hidden
                                   state is not finite
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from beam_gemma.errors import ArtifactError
from beam_gemma.model.graph_tensors import (
    _STATES,
    CrossState,
    Device,
    Head,
    PagedState,
    RecurrentState,
    State,
    StateTensor,
    Tensor,
    _state_tensor,
    _tensors,
)

HEADS: dict[str, Head] = {"generate": "generate", "classify": "score", "embed": "embed"}
"""The head of each task."""
CONTEXT_ALIGNMENT = 64
"""CPU: tables start and end at multiples of this many tokens.

Attention adds up chunks of this size, since products of that shape give the same bits in any
company (`export.ops.lowering_cpu`); where chunks begin must not depend on the rest of the step.
"""
QUERY_TILE = 64
"""CPU: most new tokens of one sequence that attend together; attention pads only to whole tiles."""
PREFILL_ROWS = 64
"""CUDA: rows of a prefill step that reach the head, hence the most sequences it can end with."""
TOP_K = 64
"""Candidates that the `generate` head returns for each row."""
OPTIONAL_INPUTS = ("inputs_embeds", "span_ends", "position_ids")
CROSS = "cross_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """Everything the engine must know of one exported graph."""

    head: Head
    device: Device
    dtype: str
    """Of caches and of given embeddings."""
    vocab_size: int
    hidden_size: int
    max_model_len: int
    """Longest sequence, prompt and completion together, in tokens."""
    states: tuple[State, ...]
    block_size: int = 16
    optional_inputs: tuple[str, ...] = ()
    top_k: int = TOP_K
    embedding_size: int = 0
    """Width of an embedding, for the head `embed`."""

    def __post_init__(self) -> None:
        unknown = set(self.optional_inputs) - set(OPTIONAL_INPUTS)
        if unknown:
            raise ArtifactError(
                f"signature: expected optional inputs of {OPTIONAL_INPUTS}, got {sorted(unknown)}"
            )

    @property
    def paged_states(self) -> tuple[PagedState, ...]:
        """The groups of layers with paged keys and values."""
        return tuple(s for s in self.states if isinstance(s, PagedState))

    @property
    def has_recurrent_state(self) -> bool:
        """Whether each running sequence needs a state slot."""
        return any(isinstance(s, RecurrentState) for s in self.states)

    @property
    def chooses(self) -> bool:
        """Whether the graph chooses next tokens, and keeps them for the step that follows."""
        return self.device == "cuda" and self.head == "generate"

    def takes_context_starts(self, state: PagedState) -> bool:
        """Return whether the graph is told where a group's tables start."""
        return self.device == "cpu" and state.sliding_window is not None

    def step_inputs(self) -> tuple[Tensor, ...]:
        """Return what changes with every step, in the order of the graph."""
        tensors = [*_tensors(("T",), input_ids="int64"), *_tensors(("B1",), cu_seqlens="int32")]
        if self.head == "embed":
            return (*tensors, *_TEXT_INPUTS) if self.device == "cuda" else tuple(tensors)
        tensors += _tensors(("B",), past_seqlens="int32")
        tensors += _tensors(("R",), logit_rows="int64")
        tensors += _tensors(("Q",), probability_rows="int64")
        if self.head == "score":
            tensors += _tensors(("Y",), target_rows="int64", target_ids="int64")
        for state in self.paged_states:
            tensors += self._paged_inputs(state)
        if self.has_recurrent_state:
            tensors.append(Tensor(name="state_slots", dtype="int32", shape=("B",)))
        if any(isinstance(s, CrossState) for s in self.states):
            tensors += [
                Tensor(name=f"block_table.{CROSS}", dtype="int32", shape=("B", f"M_{CROSS}")),
                Tensor(name="source_seqlens", dtype="int32", shape=("B",)),
            ]
        if self.chooses:
            tensors += _CHOICE_INPUTS
        tensors += self._optional_tensors()
        if self.device == "cuda" and self.paged_states:
            tensors.append(Tensor(name="attention_metadata", dtype="int32", shape=(3,)))
        return tuple(tensors)

    def state_tensors(self) -> tuple[StateTensor, ...]:
        """Return the buffers that live as long as the engine, in the order of the graph."""
        tensors: list[StateTensor] = []
        for state in self.states:
            if isinstance(state, RecurrentState):
                shape: tuple[int | str, ...] = ("S", *state.shape)
                tensors += [
                    _state_tensor(f"{state.name}.{layer}", state.dtype, shape)
                    for layer in state.layers
                ]
            else:
                tensors += self._cache_tensors(state)
        if self.chooses:
            tensors.append(
                StateTensor(
                    input_name="next_ids", output_name="next_ids_out", dtype="int64", shape=("S",)
                )
            )
        return tuple(tensors)

    def outputs(self) -> tuple[Tensor, ...]:
        """Return the outputs that are not state."""
        if self.head == "embed":
            return (
                Tensor(name="embedding", dtype="float32", shape=("B", self.embedding_size)),
                Tensor(name="first_state", dtype="float32", shape=("B", self.hidden_size)),
            )
        if self.head == "score":
            return (
                *_tensors(("Y",), target_logits="float32"),
                *_tensors(("Q",), top_logits="float32", top_probability="float32"),
            )
        tensors = (
            Tensor(name="topk_logits", dtype="float32", shape=("R", self.candidates)),
            Tensor(name="topk_ids", dtype="int64", shape=("R", self.candidates)),
            *_tensors(("Q",), top_probability="float32"),
            Tensor(
                name="logits",
                dtype="float32",
                shape=("F" if self.chooses else "R", self.vocab_size),
            ),
        )
        return (*tensors, *_CHOICE_OUTPUTS) if self.chooses else tensors

    @property
    def candidates(self) -> int:
        """Columns of `topk_logits`: `top_k`, or the whole of a smaller vocabulary."""
        return min(self.top_k, self.vocab_size)

    def to_json(self) -> dict[str, Any]:
        """Return a form for the manifest that `from_json` reads back."""
        kinds = {cls: kind for kind, cls in _STATES.items()}
        states = [{"kind": kinds[type(s)], **asdict(s)} for s in self.states]
        return {**asdict(self), "states": states}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Signature":
        """Read what `to_json` wrote."""
        states = tuple(_state_from_json(dict(state)) for state in raw["states"])
        return cls(**{**_tuples(raw), "states": states})

    def _paged_inputs(self, state: PagedState) -> list[Tensor]:
        group = state.group
        tensors = [
            Tensor(name=f"block_table.{group}", dtype="int32", shape=("B", f"M_{group}")),
            Tensor(name=f"slot_mapping.{group}", dtype="int32", shape=("T",)),
        ]
        if self.takes_context_starts(state):
            tensors.append(Tensor(name=f"context_starts.{group}", dtype="int32", shape=("B",)))
        return tensors

    def _optional_tensors(self) -> list[Tensor]:
        tensors = {
            "inputs_embeds": [
                Tensor(name="inputs_embeds", dtype=self.dtype, shape=("E", self.hidden_size)),
                Tensor(name="embeds_rows", dtype="int64", shape=("E",)),
            ],
            "span_ends": [Tensor(name="span_ends", dtype="int32", shape=("T",))],
            "position_ids": [Tensor(name="position_ids", dtype="int64", shape=("T",))],
        }
        return [t for name in self.optional_inputs for t in tensors[name]]

    def _cache_tensors(self, state: PagedState | CrossState) -> list[StateTensor]:
        prefix = ""
        if isinstance(state, CrossState):
            prefix = "cross_"
            state = PagedState(
                group=CROSS,
                layers=state.layers,
                num_key_value_heads=state.num_key_value_heads,
                head_dim=state.head_dim,
            )
        shape = state.shape(self.device, self.block_size)
        return [
            _state_tensor(f"{prefix}{kind}_cache.{layer}", self.dtype, shape)
            for layer in state.layers
            for kind in ("key", "value")
        ]


_TEXT_INPUTS = (
    *_tensors(("T",), position_ids="int64"),
    *_tensors(("B", "L"), token_rows="int64"),
    *_tensors(("T",), token_places="int64"),
)
_CHOICE_INPUTS = (
    *_tensors(("T",), token_slots="int32"),
    *_tensors(("R",), logit_slots="int32", temperatures="float32", uniforms="float32"),
    *_tensors(("R",), top_ks="int32", top_ps="float32"),
    *_tensors(("F",), full_rows="int64"),
)
_CHOICE_OUTPUTS = _tensors(
    ("R",), chosen_ids="int64", chosen_logits="float32", top_logits="float32"
)


def block_size_for(device: Device, head_dim: int) -> int:
    """Return the tokens of one cache block.

    On CUDA the fast kernels take only multiples of so many, the more the narrower the heads.
    """
    if device == "cpu":
        return 16
    return 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many cache blocks hold so many tokens."""
    return math.ceil(num_tokens / block_size)


def _state_from_json(raw: dict[str, Any]) -> State:
    kind = raw.pop("kind")
    if kind not in _STATES:
        raise ArtifactError(f"signature: expected a state among {sorted(_STATES)}, got {kind!r}")
    return _STATES[kind](**_tuples(raw))


def _tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
