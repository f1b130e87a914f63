"""Padding of steps to fixed sizes, so that one set of kernels serves all steps of a kind.

A row's result must not depend on the other rows of its step, and the sizes of a captured CUDA graph
are fixed. So a decode step has one of a few widths, with as many rows as tokens; a prefill step has
one number of tokens and `PREFILL_ROWS` rows. The padding tokens belong to padding sequences, which
start at position 0, write nothing to a cache (slot -1) and read block 0, which is reserved for
them: sequences of one token each in a decode step, one sequence of all padding tokens in a prefill
step. Padding rows repeat row 0, and their chosen tokens go to a slot that no sequence has. A step
without spans or pictures has a padding span of one token, and one row of embeddings; no token takes
what they give. A step of a decoder with sources has as many rows of states as the sources that may
start in it have tokens, or one in a decode step; padding rows are written nowhere.

Dimensions: T tokens, B sequences, R rows that need a head, Q of these that need a probability,
Y targets, F rows whose full distribution is fetched, M blocks in a row of a block table, L places
of a text or of a sequence's tokens, E embeddings of pictures, X tokens inside spans, Z spans, C
source tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from beam_gemma.errors import DeviceError
from beam_gemma.model.graph_tensors import Tensor
from beam_gemma.model.signature import PREFILL_ROWS, Signature, blocks_for

METADATA = "attention_metadata"
"""Name of the input that lies on the host and is the same in all steps of a shape."""
MIN_CONTEXT = 1024
"""Tokens that the narrowest block table covers; a narrower one's graph costs more than it saves."""
TOKENS_PER_TEXT = 16
"""Minimum average text length of an embedding step, in tokens; limits its number of texts."""
_FILL = {
    "token_slots": -1,
    "slot_mapping": -1,
    "token_rows": -1,
    "embeds_rows": -1,
    "span_places": -1,
    "token_slot_mapping": -1,
    "top_ps": 1,
}
MOST_SPANS = 2 * PREFILL_ROWS
"""Most spans that a prefill step has room for: one that began earlier for each of its rows, and as
many whole ones, which have the tokens of a picture or more each."""
MOST_PLACES = 4
"""Most places, relative to `max_num_batched_tokens`, in a prefill step of a model with recurrent
state. Its sequences lie side by side, each as wide as the longest, so places beyond the tokens are
padding; up to four sequences of any lengths fit."""
_SLOTS = ("logit_slots", "state_slots")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """The sizes of a padded step."""

    is_decode: bool
    size: int
    """Configured step size this shape is rounded up to."""
    num_tokens: int
    num_sequences: int
    num_rows: int = 0
    num_probabilities: int = 0
    num_targets: int = 0
    num_full: int = 0
    """Rows whose full distribution can be fetched: `num_rows` or 0."""
    num_blocks: int = 0
    """Blocks in a row of each block table."""
    text_length: int = 0
    """Places per text, or per sequence, if they lie side by side; otherwise 0."""
    num_embeddings: int = 1
    num_span_tokens: int = 1
    num_spans: int = 1
    num_source_tokens: int = 0
    """Rows of states of sources; 0 only for a graph without sources."""
    num_source_sequences: int = 0
    """Sequences that attention takes source tokens as."""

    def of(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape of an input or output of the graph."""
        return tuple(dim if isinstance(dim, int) else self._size(dim) for dim in tensor.shape)

    def metadata(self, block_size: int) -> Int32[np.ndarray, " 3"]:
        """Return a sequence's maximum new tokens and context, then 0 for an unknown minimum."""
        longest = 1 if self.is_decode else max(self.num_tokens, self.num_source_tokens)
        return np.array([longest, self.num_blocks * block_size, 0], np.int32)

    def _size(self, letter: str) -> int:
        if letter.startswith("M_"):
            return self.num_blocks
        return {
            "T": self.num_tokens,
            "B": self.num_sequences,
            "B1": self.num_sequences + 1,
            "R": self.num_rows,
            "R1": self.num_rows + 1,
            "Q": self.num_probabilities,
            "Y": self.num_targets,
            "F": self.num_full,
            "L": self.text_length,
            "E": self.num_embeddings,
            "X": self.num_span_tokens,
            "Z": self.num_spans,
            "Z1": self.num_spans + 1,
            "C": self.num_source_tokens,
            "TC": self.num_tokens + self.num_source_tokens,
            "T1": self.num_tokens + self.num_source_sequences,
            "T2": self.num_tokens + self.num_source_sequences + 1,
        }[letter]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """Sizes that steps are padded to, in ascending order."""

    decode: tuple[int, ...]
    """Sizes of a decode step, in sequences."""
    prefill: tuple[int, ...]
    """Sizes of any other step, in tokens."""
    sources: tuple[int, ...] = ()
    """Sizes of any other step of a decoder with sources, in source tokens."""
    has_flash: bool = True
    """Whether the device has flash attention: compute capability 8.0. Without it, ONNX Runtime
    takes its kernel for decode steps if a step has as many sequences as tokens; what it runs
    otherwise gathers keys and values, those of a whole source for each new token. So each source
    token is a sequence of its own then, and in a decoder that gathers anyway (`gathered_heads`),
    empty sequences follow those of a prefill step."""

    def shape(
        self, feeds: Mapping[str, np.ndarray], signature: Signature, *, with_logits: bool
    ) -> StepShape:
        """Return the shape that a step is padded to.

        Raises:
            DeviceError: the step is larger than the largest size.
        """
        num_tokens, num_sequences = len(feeds["input_ids"]), len(feeds["cu_seqlens"]) - 1
        if signature.head == "encode":
            size, length = _least(self.prefill, num_tokens), _row_length(feeds)
            num_sequences = max(size // length, num_sequences)
            return _encode_shape(size, num_sequences, length, _num_embeddings(feeds, size))
        if signature.head == "embed":
            size = _least(self.prefill, num_tokens)
            num_embeddings = _num_embeddings(feeds, size)
            if "token_rows" not in feeds:
                return _embed_shape(size, max(num_texts(size), num_sequences), 0, num_embeddings)
            length = _row_length(feeds)
            return _embed_shape(size, max(size // length, num_sequences), length, num_embeddings)
        num_probabilities = len(feeds["probability_rows"])
        if signature.head == "generate" and feeds[METADATA][0] == 1:
            size = _least(self.decode, num_sequences)
            return decode_shape(
                signature,
                size,
                num_blocks=_table_width(feeds, signature, 0),
                with_probabilities=num_probabilities > 0,
                with_logits=with_logits,
            )
        size = _least(self.prefill, num_tokens)
        padding = size - num_tokens
        num_rows = max(PREFILL_ROWS, _rounded(len(feeds["logit_rows"])))
        spans = _span_sizes(feeds, size)
        span_padding = spans["num_span_tokens"] - len(feeds.get("span_rows", ()))
        sources = self.source_sizes(len(feeds.get("source_states", ())))
        # Tables are wide enough for what attends to the padding block.
        num_longest = max(padding, span_padding, *sources.values())
        return StepShape(
            is_decode=False,
            size=size,
            num_tokens=size,
            num_sequences=size if self.has_as_many(signature) else num_sequences + (padding > 0),
            num_rows=num_rows,
            num_full=num_rows if with_logits else 0,
            num_probabilities=_rounded(num_probabilities),
            num_targets=_rounded(len(feeds.get("target_ids", ()))),
            num_blocks=_table_width(feeds, signature, num_longest),
            text_length=_row_length(feeds) if signature.has_recurrent_state else 0,
            **spans,
            **sources,
        )

    def has_as_many(self, signature: Signature) -> bool:
        """Return whether a prefill step has as many sequences as tokens, to gather nothing."""
        return signature.gathered_heads > 0 and not self.has_flash

    def source_sizes(self, num_source_tokens: int) -> dict[str, int]:
        """Return the padded numbers of source tokens and of their sequences in a prefill step.

        Raises:
            DeviceError: there are more than the largest size.
        """
        if not num_source_tokens:
            return {}
        size = _least(self.sources, num_source_tokens)
        num_sequences = 1 if self.has_flash else size
        return {"num_source_tokens": size, "num_source_sequences": num_sequences}


def decode_shape(
    signature: Signature,
    width: int,
    *,
    num_blocks: int,
    with_probabilities: bool,
    with_logits: bool,
) -> StepShape:
    """Return the shape of a decode step with `width` sequences."""
    has_source = int(signature.has_source)
    return StepShape(
        is_decode=True,
        size=width,
        num_tokens=width,
        num_sequences=width,
        num_rows=width,
        num_probabilities=width if with_probabilities else 0,
        num_full=width if with_logits else 0,
        num_blocks=power_of_two(max(num_blocks, blocks_for(MIN_CONTEXT, signature.block_size))),
        text_length=int(signature.has_recurrent_state),
        num_source_tokens=has_source,
        num_source_sequences=has_source,
    )


def largest_shapes(sizes: StepSizes, signature: Signature) -> list[StepShape]:
    """Return the shapes of the steps that need the most memory."""
    most = sizes.prefill[-1]
    if signature.head in ("embed", "encode"):
        longest = power_of_two(max(signature.max_model_len, PAD_TEXTS_TO))
        few, many = max(1, 2 * most // longest), num_texts(most)
        shapes = ((many, 2 * TOKENS_PER_TEXT), (few, longest))
        if signature.head == "encode":
            return [_encode_shape(most, *shape, most) for shape in shapes]
        return [_embed_shape(most, *shape, most) for shape in shapes]
    num_cells = (
        s.num_cells(signature.max_source_len, signature.max_model_len)
        for s in signature.paged_states
    )
    most_cells = max(*num_cells, *sizes.sources, most, MIN_CONTEXT)
    widest = power_of_two(blocks_for(most_cells, signature.block_size))
    prefill = StepShape(
        is_decode=False,
        size=most,
        num_tokens=most,
        num_sequences=most if sizes.has_as_many(signature) else min(PREFILL_ROWS, most) + 1,
        num_rows=PREFILL_ROWS,
        num_probabilities=PREFILL_ROWS,
        num_targets=PREFILL_ROWS if signature.head == "score" else 0,
        num_full=PREFILL_ROWS if signature.head == "generate" else 0,
        num_blocks=widest,
        num_embeddings=most,
        num_span_tokens=most,
        num_spans=min(MOST_SPANS, most) + 1,
        **(sizes.source_sizes(sizes.sources[-1]) if signature.has_source else {}),
    )
    prefills = _largest_rows(prefill) if signature.has_recurrent_state else [prefill]
    if signature.head == "score":
        return prefills
    width = sizes.decode[-1]
    decode = decode_shape(
        signature, width, num_blocks=widest, with_probabilities=True, with_logits=True
    )
    return [*prefills, decode]


def _largest_rows(prefill: StepShape) -> list[StepShape]:
    """Return the shapes of a model with recurrent state: with most sequences and most places.

    Lengths are rounded up to powers of two, so places may be twice as many as `MOST_PLACES` says.
    """
    longest = power_of_two(prefill.num_tokens)
    few = min(2 * MOST_PLACES, PREFILL_ROWS) + 1
    many = power_of_two(MOST_PLACES * prefill.num_tokens // prefill.num_sequences)
    return [
        replace(prefill, text_length=max(many, 1)),
        replace(prefill, num_sequences=min(few, prefill.num_sequences), text_length=longest),
    ]


def pad(
    feeds: Mapping[str, np.ndarray],
    shape: StepShape,
    into: Mapping[str, np.ndarray],
    *,
    spare_slot: int,
) -> None:
    """Write a step's inputs into arrays of its padded shape.

    Args:
        feeds: The step's inputs; without sequences, the padded step changes no sequence's state.
        shape: The shape to pad to.
        into: The target arrays by name; each is overwritten entirely.
        spare_slot: The slot that belongs to no sequence.
    """
    beside_sources = {}
    if shape.num_source_tokens:
        sizes = (shape.num_tokens, shape.num_source_tokens, shape.num_source_sequences)
        beside_sources = source_rows(*sizes)
    num_tokens = len(feeds["input_ids"])
    for name, target in into.items():
        if name in beside_sources:
            target[...] = beside_sources[name]
            continue
        source = feeds[name]
        if name == "cu_seqlens":
            _pad_starts(source, target, shape.num_sequences, shape.num_tokens)
            continue
        if name == "span_cu_seqlens":
            _pad_starts(source, target, shape.num_spans, shape.num_span_tokens)
            continue
        if name == "row_cu_seqlens":
            _pad_starts(source, target, shape.num_rows, shape.num_rows)
            continue
        if name == "full_rows":
            source = source[: shape.num_full]
        if name == "token_places":
            # Rows are longer now, so the places in all but the first move.
            width = feeds["token_rows"].shape[1]
            source = source // max(width, 1) * shape.text_length + source % max(width, 1)
        kind = name.partition(".")[0]
        fill = spare_slot if kind in _SLOTS else _FILL.get(kind, 0)
        target[...] = fill
        if kind == "token_slot_mapping":
            # Source tokens come behind the padding of new tokens.
            tokens, source = source[:num_tokens], source[num_tokens:]
            target[:num_tokens] = tokens
            target = target[shape.num_tokens :]
        target[tuple(slice(size) for size in source.shape)] = source


def source_rows(
    num_tokens: int, num_source_tokens: int, num_source_sequences: int = 1
) -> dict[str, np.ndarray]:
    """Return the inputs by which attention tells new tokens from source tokens behind them.

    They are the same for all steps of a shape.
    """
    tokens, others = np.arange(num_tokens), np.full(num_source_tokens, -1)
    ends = np.arange(1, num_source_sequences + 1) * num_source_tokens // num_source_sequences
    starts = np.concatenate([np.arange(num_tokens + 1), num_tokens + ends])
    return {
        "token_rows": np.concatenate([tokens, others]),
        "source_rows": np.concatenate([np.full(num_tokens, -1), np.arange(num_source_tokens)]),
        "token_places": tokens,
        "token_cu_seqlens": starts.astype(np.int32),
    }


def no_step(signature: Signature) -> dict[str, np.ndarray]:
    """Return the inputs of a step without sequences."""
    return {
        t.name: np.zeros(
            [int(t.name.endswith("cu_seqlens")), *[0] * (len(t.shape) - 1)], host_dtype(t.dtype)
        )
        for t in signature.step_inputs()
    }


def host_dtype(dtype: str) -> np.dtype[Any]:
    """Return numpy's type for a tensor: bfloat16, which numpy lacks, is passed as its bits."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def num_texts(num_tokens: int) -> int:
    """Return the maximum number of texts in an embedding step of `num_tokens` tokens."""
    return max(1, num_tokens // TOKENS_PER_TEXT)


def power_of_two(number: int) -> int:
    """Return the least power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def _embed_shape(size: int, num_sequences: int, text_length: int, num_embeddings: int) -> StepShape:
    """Return an embedding step's shape; each padding text has a token, since none may be empty.

    If texts lie side by side, padding texts have no places and their embeddings are zeros.
    """
    num_sequences += 1
    return StepShape(
        is_decode=False,
        size=size,
        num_tokens=_rounded(size + num_sequences),
        num_sequences=num_sequences,
        text_length=text_length,
        num_embeddings=num_embeddings,
    )


def _encode_shape(
    size: int, num_sequences: int, text_length: int, num_embeddings: int
) -> StepShape:
    """Return the shape of a step over whole sources; padding tokens belong to none."""
    return StepShape(
        is_decode=False,
        size=size,
        num_tokens=size,
        num_sequences=num_sequences,
        text_length=text_length,
        num_embeddings=num_embeddings,
    )


def _num_embeddings(feeds: Mapping[str, np.ndarray], size: int) -> int:
    """Return the padded number of embeddings of pictures in a step over whole texts or sources."""
    return min(power_of_two(len(feeds.get("inputs_embeds", (None,)))), size)


def _row_length(feeds: Mapping[str, np.ndarray]) -> int:
    """Return the padded length of the rows of tokens that lie side by side."""
    return power_of_two(feeds["token_rows"].shape[1])


def _pad_starts(
    source: Int32[np.ndarray, " B"],
    target: Int32[np.ndarray, "..."],
    num_sequences: int,
    num_tokens: int,
) -> None:
    """Spread the padding tokens evenly over the padding sequences."""
    count = len(source)
    target[:count] = source
    spare = num_sequences - (count - 1)
    left = num_tokens - int(source[-1])
    if spare:
        target[count:] = source[-1] + np.arange(1, spare + 1) * left // spare


def _span_sizes(feeds: Mapping[str, np.ndarray], num_tokens: int) -> dict[str, int]:
    """Return the padded numbers of embeddings, of tokens inside spans and of spans.

    Only attention and copies of rows have these sizes, so no row's result depends on them. Powers
    of two, up to the tokens of the step, keep their number small. Padding tokens belong to one more
    span.
    """
    num_real = len(feeds.get("span_rows", ()))
    num_span_tokens = min(power_of_two(max(1, num_real)), num_tokens)
    num_spans = len(feeds.get("span_past_seqlens", ()))
    num_embeddings = power_of_two(max(1, len(feeds.get("inputs_embeds", ()))))
    return {
        "num_embeddings": min(num_embeddings, num_tokens),
        "num_span_tokens": num_span_tokens,
        "num_spans": num_spans + (num_span_tokens > num_real),
    }


def _table_width(feeds: Mapping[str, np.ndarray], signature: Signature, num_padding: int) -> int:
    tables = ("block_table.", "token_block_table.")
    widths = [array.shape[1] for name, array in feeds.items() if name.startswith(tables)]
    least = blocks_for(max(num_padding, MIN_CONTEXT), signature.block_size)
    return power_of_two(max(*widths, least)) if widths else 0


def _rounded(count: int) -> int:
    return -(-count // PREFILL_ROWS) * PREFILL_ROWS


def _least(sizes: Sequence[int], number: int) -> int:
    """Return the least of the sizes that is at least `number`.

    Raises:
        DeviceError: all sizes are smaller.
    """
    fitting = [size for size in sizes if size >= number]
    if not fitting:
        raise DeviceError(f"step: expected at most {max(sizes):,} tokens, got {number:,}")
    return min(fitting)


PAD_TEXTS_TO = 16
"""Texts are padded to a multiple of this many tokens; kernels with masks need a multiple of 4."""


def side_by_side(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the inputs of a step over whole texts on CUDA, given packed ids and `cu_seqlens`."""
    starts = feeds["cu_seqlens"].astype(np.int64)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], np.diff(starts))
    return {**feeds, "position_ids": positions, **in_rows(starts, multiple=PAD_TEXTS_TO)}


def in_rows(starts: Int[np.ndarray, " B"], *, multiple: int = 1) -> dict[str, np.ndarray]:
    """Return the inputs that lay packed sequences side by side, one in each row.

    Args:
        starts: Where each sequence starts, and the number of tokens at the end.
        multiple: What the length of the rows is a multiple of.
    """
    ends = starts.astype(np.int64)
    lengths = np.diff(ends)
    width = -(-int(lengths.max()) // multiple) * multiple
    places = np.arange(width)
    rows = np.where(places < lengths[:, None], ends[:-1, None] + places, -1)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    offsets = np.arange(ends[-1]) - ends[owners]
    return {"token_rows": rows, "token_places": owners * width + offsets}
