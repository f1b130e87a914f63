"""The contract between an exported graph and the engine that runs it.

A graph computes one *ragged step*: the new tokens of many sequences, packed without padding. This
module names every input and output, with dtype and symbolic shape, for each device, so that neither
the exporter nor the engine writes a name as a literal.

Dimensions: B sequences of the step, T new tokens, R packed positions passed to the head, Q of these
with a probability, F of these with the full distribution, Y targets, V vocabulary size, D hidden
size, K key-value heads, H head dimension, P cache blocks, M blocks in a table row, S slots of
sequences, E given embeddings, W width of an embedding, L places of a padded text or tokens of
a picture or a clip, N pictures, I pixels of a side, G patches of a token, A pixels of a patch's
side, J frames of a clip, X new tokens inside spans, Z spans of the step, C source tokens of
sequences that start in the step, U width of the encoder; B1, R1, Z1, T1, T2 for one or two more, TC
for T + C.

Inputs of every graph
    input_ids [T] int64            packed new tokens
    cu_seqlens [B+1] int32         where each sequence's new tokens start

Inputs of decoders, heads `generate` and `score`
    past_seqlens [B] int32         number of tokens per sequence from earlier steps
    logit_rows [R] int64           packed positions passed to the head
    probability_rows [Q] int64     those of the R rows whose probability is computed

Inputs for each kind of state of a model
    PagedState (keys and values of each token, one group of layers)
        block_table.g [B, M] int32     cache blocks of each sequence, for group g
        context_starts.g [B] int32     CPU, windows only: position of the first slot of the table
        slot_mapping.g [T] int32       cache slot of each new key and value; -1 skips the write
        key_cache.i, value_cache.i     one pair for each layer i, updated in place
    RecurrentState (fixed size for each sequence)
        state_slots [B] int32          slot of each sequence; its content is treated as zero if
                                       past_seqlens is 0
        name.i [S, ...]                one tensor for each layer i, updated in place
        token_rows [B, L] int64        CUDA: packed position of each new token, one sequence per
                                       row; -1 is padding
        token_places [T] int64         CUDA: place of each token among these B * L places

Inputs of decoders whose sequences have a source, which an encoder has read
    source_states [C, U]           encoder's states of the sources of the sequences that start in
                                   the step; at least one row, which may be of zeros
    source_seqlens [B] int32       number of source tokens of each sequence
    source_slots.g [C] int32       for each group g that holds sources: cache slot of the key and
                                   value of each source token; -1 skips the write
    block_table.g                  as above; a group that holds sources alone has no slot_mapping.g
    cross_key_cache.i, cross_value_cache.i    caches of a group that holds sources alone

CUDA decoders whose sequences have a source take each new token as a sequence of its own, for the
groups that hold sources; behind the T new tokens come the C source tokens, which are only written.
The inputs below take the place of `source_seqlens` and of the `block_table.g`, `slot_mapping.g` and
`source_slots.g` of these groups
    token_rows [TC] int64          packed position of each of the T + C tokens; -1 if a source's
    source_rows [TC] int64         row of `source_states` of each of them; -1 if new
    token_places [T] int64         index of each new token among the T + C tokens
    token_cu_seqlens [T2] int32    where each new token and each sequence of source tokens starts
    token_past_seqlens.g [T1] int32    cells of its sequence that a new token reaches before the
                                   last one it reaches; 0 for sequences of source tokens
    token_block_table.g [T1, M] int32    cache blocks of each new token's sequence; block 0 for
                                   sequences of source tokens
    token_slot_mapping.g [TC] int32    cache slot of each new key and value; -1 skips the write

CUDA decoders whose last layers read caches of earlier ones (`shares_caches`) compute these layers
for the R rows alone, each of which is a sequence of its own to attention
    row_sequences [R] int64        sequence of each row
    row_cu_seqlens [R1] int32      where each row starts: 0 to R
    row_past_seqlens [R] int32     number of tokens before each row in its sequence

CUDA decoders with a table of per-layer embeddings take it as an input that is the same in all steps
(`tables`), so that it may lie in host memory.

Optional inputs, if a model declares them
    inputs_embeds [E, D]           embeddings of pictures and clips that take the place of those of
                                   ids; at least one row, which may be of zeros
    embeds_rows [T] int64          row of `inputs_embeds` for each token; -1 takes that of its id
    span_ends [T] int32            CPU: last position a token attends to: its own if causal, later
                                   inside a span with two-sided attention; CUDA has the inputs below
    first_keys [T] int32           CPU, models whose spans reach beyond windows: first position that
                                   a token of a layer with a window attends to
    position_ids [T] int64         rotary positions, if they differ from the sequence positions

CUDA decoders with `span_ends` take the spans of a step as sequences of their own, at least one, in
place of that input
    span_rows [X] int64            packed position of each token inside a span
    span_places [T] int64          index of a token in `span_rows`; -1 outside of spans
    span_cu_seqlens [Z+1] int32    where each span's tokens start in `span_rows`
    span_past_seqlens [Z] int32    position of the first of these tokens in its sequence
    span_block_table.g [Z, M] int32    cache blocks of each span's sequence, for group g

Outputs of the `generate` head
    topk_logits [R, k] float32, topk_ids [R, k] int64    highest first; ties by id
    top_probability [Q] float32    probability of the first candidate
    logits [R, V] float32          fetched only if a row needs the full distribution

Head `score`: logits of target tokens, and the values that normalize them
    target_rows [Y] int64          index among the R rows of the position before each target
    target_ids [Y] int64           token ids of the targets
    target_logits [Y] float32      output: logits of the targets
    top_logits [Q] float32         output: logit of the most likely token; with its probability,
    top_probability [Q] float32    log(sum(exp(logits))) = top_logits - log(top_probability)

Head `embed`: no state, since each text is computed in full in one step
    embedding [B, W] float32       output: embedding of each sequence
    first_state [B, D] float32     output: state of each sequence's first token; depends on all
                                   tokens if attention is two-sided, else on that token alone

Head `encode`: no state; the encoder of a model whose decoder reads a source, each source in full
    source_states [T, D]           output: state of each token after the final norm, in `dtype`

Head `vision`: no state and none of the inputs above; each picture is computed by itself
    pixels [N, 3, I, I] uint8      pictures of the model's size, channels first, red first
    image_features [N, L, D]       output: embeddings of each picture's L tokens, in `dtype`
                                   If sizes vary, one picture is computed at a time, and the inputs
                                   are the G patches of each of its tokens
    patches [L, G, 3 A^2] uint8    colors of patches of A x A pixels, row by row, red first
    patch_places [L, G, 2] int64   column and row of each patch
    image_features [L, D]          output: embeddings of the picture's L tokens, in `dtype`

Head `sound`: no state and none of the inputs above; each clip is computed by itself
    sound_frames [J, ...] float32  frames of a clip: mel bins, or samples
    sound_features [L, D]          output: embeddings of the clip's L tokens, in `dtype`; of some
                                   models, as many for every clip

Inputs of CUDA graphs with the heads `embed` and `encode`, in addition
    position_ids [T]
    token_rows [B, L] int64        packed position of each token, one text per row; -1 is padding
    token_places [T] int64         place of each token among these B * L places

Inputs of CUDA decoders, in addition
    position_ids [T]               always, so that no position is computed on the device
    attention_metadata [3] int32   in host memory: upper bounds, so that kernels can be chosen
                                   without waiting for the stream

CUDA decoders with the head `generate` also choose the next tokens, so that a step can start before
the host has read the tokens chosen by the previous one:
    token_slots [T] int32          index of a token in `next_ids`; -1 takes it from `input_ids`
    logit_slots [R] int32          index in `next_ids` where a row's token is stored
    temperatures [R] float32       0 takes the most likely token
    uniforms [R] float32           number in [0, 1) for the row's draw
    top_ks [R] int32               1 to 64 candidates to draw from; ignored at temperature 0
    top_ps [R] float32             share of their probability to draw from
    full_rows [F] int64            those of the R rows whose full distribution is fetched;
                                   `logits` is [F, V] in these graphs
    next_ids [S] int64             state: last token chosen for each slot
    chosen_ids [R] int64, chosen_logits [R] float32    output: same choice as `sampling.sample`
    top_logits [R] float32         output: logit of the most likely token; NaN if the row's hidden
                                   state is not finite
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from beam_gemma.errors import ArtifactError
from beam_gemma.model.graph_tensors import (
    STATE_KINDS,
    Device,
    Head,
    PagedState,
    RecurrentState,
    State,
    StateTensor,
    Table,
    Tensor,
    state_tensor,
    tensors_of,
)
from beam_gemma.model.input_groups import (
    CHOICE_INPUTS,
    CHOICE_OUTPUTS,
    ROW_INPUTS,
    SHARED_CACHE_INPUTS,
    SOURCE_INPUTS,
    SPAN_INPUTS,
    TEXT_INPUTS,
)
from beam_gemma.model.sound_signature import SoundSignature

HEADS: dict[str, Head] = {"generate": "generate", "classify": "score", "embed": "embed"}
"""Graph head for each task."""
CONTEXT_ALIGNMENT = 64
"""CPU: block tables start and end at multiples of this many tokens.

Attention sums over chunks of this size, since products of that shape give the same bits in any
batch (`export.ops.lowering_cpu`); chunk starts must not depend on the rest of the step.
"""
QUERY_TILE = 64
"""CPU: most new tokens of a sequence per attention tile; attention pads only to whole tiles."""
PREFILL_ROWS = 64
"""CUDA: rows of a prefill step passed to the head, so most prompts that can end in one step."""
SOURCE_PREFILL_TOKENS = 256
"""CUDA: most new tokens of a prefill step of a decoder whose sequences have a source. What such a
decoder starts with is short, while each of its tokens is a sequence of its own to attention."""
WIDEST_FLASH_HEAD = 256
"""CUDA: widest head of ONNX Runtime's flash attention. For wider ones it reads keys and values in
their blocks in decode steps, and gathers them in prefill steps. Given bounds (`attention_metadata`)
it makes room for as many as all sequences times the longest, so such layers take none: a prefill
step then waits until the device has counted them."""
TOP_K = 64
"""Candidates that the `generate` head returns for each row."""
OPTIONAL_INPUTS = ("inputs_embeds", "span_ends", "first_keys", "position_ids")
CROSS = "cross_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature(SoundSignature):
    """Complete description of an exported graph for the engine."""

    head: Head
    device: Device
    dtype: str
    """Data type of caches and of given embeddings."""
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
    source_size: int = 0
    """Width of the states of a source; 0 for a decoder whose sequences have none."""
    max_source_len: int = 0
    """Longest source in tokens; 0 for a decoder whose sequences have none."""
    shares_caches: bool = False
    """True if the last layers of a decoder have no caches, read those of earlier layers, and
    compute the R rows alone."""
    gathered_heads: int = 0
    """CUDA: query heads of a layer whose keys and values a prefill step gathers, since its heads
    are wider than `WIDEST_FLASH_HEAD`; 0 for a decoder without such layers."""

    tables: tuple[Table, ...] = ()
    """Weights that the graph takes as inputs."""

    def __post_init__(self) -> None:
        unknown = set(self.optional_inputs) - set(OPTIONAL_INPUTS)
        if unknown:
            raise ArtifactError(
                f"signature: expected optional inputs of {OPTIONAL_INPUTS}, got {sorted(unknown)}"
            )

    @property
    def paged_states(self) -> tuple[PagedState, ...]:
        """Groups of layers with paged keys and values."""
        return tuple(s for s in self.states if isinstance(s, PagedState))

    @property
    def recurrent_states(self) -> tuple[RecurrentState, ...]:
        """States of a fixed size for each sequence."""
        return tuple(s for s in self.states if isinstance(s, RecurrentState))

    @property
    def has_source(self) -> bool:
        """True if each sequence of the decoder has a source, which an encoder reads first."""
        return self.source_size > 0

    @property
    def ring(self) -> int | None:
        """Fewest cells that the tokens of a window go round in; None if none does."""
        rings = (s.sliding_window for s in self.paged_states if s.holds == "both")
        return min((cells for cells in rings if cells is not None), default=None)

    def prefill_tokens(self, max_num_batched_tokens: int) -> int:
        """Return the most new tokens of a step that computes prompts."""
        if self.device == "cuda" and self.has_source:
            return min(max_num_batched_tokens, SOURCE_PREFILL_TOKENS)
        return max_num_batched_tokens

    @property
    def gathered_bytes(self) -> int:
        """Memory that a prefill step needs for each token it attends to, in bytes; 0 for none.

        One layer at a time gathers, and has a copy of keys and values for each query head.
        """
        widest = max((s.head_dim for s in self.paged_states), default=0)
        return 2 * self.gathered_heads * widest * 2

    @property
    def has_recurrent_state(self) -> bool:
        """True if each running sequence needs a state slot."""
        return bool(self.recurrent_states)

    @property
    def chooses(self) -> bool:
        """True if the graph chooses next tokens and keeps them for the following step."""
        return self.device == "cuda" and self.head == "generate"

    def takes_context_starts(self, state: PagedState) -> bool:
        """Return whether the graph takes `context_starts` for a group."""
        has_window = state.sliding_window is not None and state.holds == "target"
        return self.device == "cpu" and has_window

    def step_inputs(self) -> tuple[Tensor, ...]:
        """Return the inputs that change with every step, in the order of the graph."""
        if self.head == "vision":
            return self.picture_inputs()
        if self.head == "sound":
            return self.sound_inputs()
        tensors = [*tensors_of(("T",), input_ids="int64"), *tensors_of(("B1",), cu_seqlens="int32")]
        if self.head in ("embed", "encode"):
            tensors += TEXT_INPUTS if self.device == "cuda" else ()
            return (*tensors, *self._optional_tensors())
        tensors += tensors_of(("B",), past_seqlens="int32")
        tensors += tensors_of(("R",), logit_rows="int64")
        tensors += tensors_of(("Q",), probability_rows="int64")
        if self.head == "score":
            tensors += tensors_of(("Y",), target_rows="int64", target_ids="int64")
        for state in self.paged_states:
            tensors += self._paged_inputs(state)
        tensors += self._inputs_of_some()
        if self.chooses:
            tensors += CHOICE_INPUTS
        tensors += self._optional_tensors()
        if self.device == "cuda" and self.paged_states:
            tensors.append(Tensor(name="attention_metadata", dtype="int32", shape=(3,)))
        return tuple(tensors)

    @property
    def shortest_window(self) -> int | None:
        """Fewest tokens that a layer with a window reaches, the query's own included; or None."""
        windows = (s.sliding_window for s in self.paged_states if s.sliding_window is not None)
        return min(windows, default=None)

    def state_tensors(self) -> tuple[StateTensor, ...]:
        """Return the buffers that live as long as the engine, in the order of the graph."""
        tensors: list[StateTensor] = []
        for state in self.states:
            if isinstance(state, RecurrentState):
                shape: tuple[int | str, ...] = ("S", *state.shape)
                tensors += [state_tensor(name, state.dtype, shape) for name in state.names]
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
        if self.head == "vision":
            return self.picture_outputs(self.hidden_size, self.dtype)
        if self.head == "sound":
            return self.sound_outputs(self.hidden_size, self.dtype)
        if self.head == "encode":
            states = ("T", self.hidden_size)
            return (Tensor(name="source_states", dtype=self.dtype, shape=states),)
        if self.head == "embed":
            return (
                Tensor(name="embedding", dtype="float32", shape=("B", self.embedding_size)),
                Tensor(name="first_state", dtype="float32", shape=("B", self.hidden_size)),
            )
        if self.head == "score":
            return (
                *tensors_of(("Y",), target_logits="float32"),
                *tensors_of(("Q",), top_logits="float32", top_probability="float32"),
            )
        tensors = (
            Tensor(name="topk_logits", dtype="float32", shape=("R", self.candidates)),
            Tensor(name="topk_ids", dtype="int64", shape=("R", self.candidates)),
            *tensors_of(("Q",), top_probability="float32"),
            Tensor(
                name="logits",
                dtype="float32",
                shape=("F" if self.chooses else "R", self.vocab_size),
            ),
        )
        return (*tensors, *CHOICE_OUTPUTS) if self.chooses else tensors

    @property
    def candidates(self) -> int:
        """Number of columns of `topk_logits`: `top_k`, or the vocabulary size if smaller."""
        return min(self.top_k, self.vocab_size)

    def to_json(self) -> dict[str, Any]:
        """Return a form for the manifest that `from_json` reads back."""
        kinds = {cls: kind for kind, cls in STATE_KINDS.items()}
        states = [{"kind": kinds[type(s)], **asdict(s)} for s in self.states]
        return {**asdict(self), "states": states}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Signature":
        """Read what `to_json` wrote."""
        states = tuple(_state_from_json(dict(state)) for state in raw["states"])
        tables = tuple(Table(**_tuples(table)) for table in raw.get("tables", ()))
        return cls(**{**_tuples(raw), "states": states, "tables": tables})

    def _paged_inputs(self, state: PagedState) -> list[Tensor]:
        group = state.group
        if self.device == "cuda" and state.holds != "target":
            shapes = {
                "token_past_seqlens": ("T1",),
                "token_block_table": ("T1", f"M_{group}"),
                "token_slot_mapping": ("TC",),
            }
            return [
                Tensor(name=f"{name}.{group}", dtype="int32", shape=shape)
                for name, shape in shapes.items()
            ]
        tensors = [Tensor(name=f"block_table.{group}", dtype="int32", shape=("B", f"M_{group}"))]
        if state.holds != "source":
            tensors.append(Tensor(name=f"slot_mapping.{group}", dtype="int32", shape=("T",)))
        if state.holds != "target":
            tensors.append(Tensor(name=f"source_slots.{group}", dtype="int32", shape=("C",)))
        if self.takes_context_starts(state):
            tensors.append(Tensor(name=f"context_starts.{group}", dtype="int32", shape=("B",)))
        return tensors

    def _inputs_of_some(self) -> list[Tensor]:
        """Return the inputs of shared caches, of recurrent state and of sources."""
        tensors: list[Tensor] = []
        on_cuda = self.device == "cuda"
        if self.shares_caches and on_cuda:
            tensors += SHARED_CACHE_INPUTS
        if self.has_recurrent_state:
            tensors.append(Tensor(name="state_slots", dtype="int32", shape=("B",)))
            tensors += ROW_INPUTS if on_cuda else ()
        if self.has_source:
            states = ("C", self.source_size)
            tensors.append(Tensor(name="source_states", dtype=self.dtype, shape=states))
            tensors += SOURCE_INPUTS if on_cuda else tensors_of(("B",), source_seqlens="int32")
        return tensors

    def _optional_tensors(self) -> list[Tensor]:
        tensors = {
            "inputs_embeds": [
                Tensor(name="inputs_embeds", dtype=self.dtype, shape=("E", self.hidden_size)),
                Tensor(name="embeds_rows", dtype="int64", shape=("T",)),
            ],
            "span_ends": self._span_tensors(),
            "first_keys": [Tensor(name="first_keys", dtype="int32", shape=("T",))],
            "position_ids": [Tensor(name="position_ids", dtype="int64", shape=("T",))],
        }
        return [t for name in self.optional_inputs for t in tensors[name]]

    def _span_tensors(self) -> list[Tensor]:
        if self.device == "cpu":
            return list(tensors_of(("T",), span_ends="int32"))
        tables = (
            Tensor(name=f"span_block_table.{s.group}", dtype="int32", shape=("Z", f"M_{s.group}"))
            for s in self.paged_states
        )
        return [*SPAN_INPUTS, *tables]

    def _cache_tensors(self, state: PagedState) -> list[StateTensor]:
        shape = state.shape(self.device, self.block_size)
        return [
            state_tensor(name, self.dtype, shape)
            for layer in state.layers
            for name in state.names(layer)
        ]


def block_size_for(device: Device, head_dim: int) -> int:
    """Return the number of tokens in one cache block.

    The fast CUDA kernels accept only multiples of these sizes, which are larger for narrow heads.
    """
    if device == "cpu":
        return 16
    return 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Return the number of cache blocks needed for `num_tokens` tokens."""
    return math.ceil(num_tokens / block_size)


def _state_from_json(raw: dict[str, Any]) -> State:
    kind = raw.pop("kind")
    if kind not in STATE_KINDS:
        raise ArtifactError(
            f"signature: expected a state among {sorted(STATE_KINDS)}, got {kind!r}"
        )
    return STATE_KINDS[kind](**_tuples(raw))


def _tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
