"""CPU lowering of the ops over whole sequences: ONNX functions made of standard operators.

Attention works on tiles: queries of one sequence with all the keys that they reach. All tiles of a
step form one batched product, padded to the keys of the tile that reaches most, so steps of
sequences of similar length waste least. Masked keys add exact zeros.

As in `export.ops.lowering_cpu`, a row's bits do not depend on what shares its step. ONNX Runtime
sums up to 256 products at once if there are at most 64 columns, then adds up the next 256. It
splits columns among threads only if a product has more columns than rows. Therefore scores are
computed for up to 64 keys at a time and values for up to 64 channels, no tile has fewer than 64
rows, and a tile's keys begin at a multiple of 256 in their sequence.

Dimensions: B sequences, T tokens, D hidden, U tiles, S queries of a tile, W pieces of keys, C keys
of a piece, N query heads, K key-value heads, G = N / K, H head dimension, E slices of a head,
X = W * C keys.
"""

# Names are bound when the source is parsed into ONNX, so types here are tensors, not Python values.
# mypy: ignore-errors
# ruff: noqa: N802, D103

from onnxscript import script
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import TensorType

from export.ops.lowering_cpu import DOMAIN, MASKED, MICROSOFT, QueryTiles, RmsNorm

MOST_QUERIES = 128
"""Most queries per tile: more would share one copy of the keys but waste more at sequence ends."""
VALUE_SLICE = 64
"""Most channels of a head that one product of weights and values takes."""
SUM_CHUNK = 64
"""Rows that `ChunkSums` adds up at once."""


@script(DOMAIN, default_opset=op)
def KeyPieces(cu_seqlens, rows, owner, first, back: int, ahead: int):
    """Return the packed rows of each tile's keys [U, W, C] and a mask [U, S, 1, W * C].

    The mask is 0 in reach (q - back <= k <= q + ahead), else very negative.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    start = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    align = op.Constant(value_ints=[256])
    widest = op.Constant(value_ints=[64])
    sixteen = op.Constant(value_ints=[16])
    behind = op.Constant(value_int=back)
    beyond = op.Constant(value_int=ahead)
    cu = op.Cast(cu_seqlens, to=7)
    starts = op.Gather(cu, owner)
    lengths = op.Gather(cu, owner + step) - starts
    size = op.Shape(rows, start=1, end=2)
    begin = op.Max(first - behind, zero) / align * align
    end = op.Min(first + size + beyond, lengths)
    extent = op.ReduceMax(end - begin, keepdims=1)
    pieces = (extent + widest - one) / widest
    width = (extent + pieces * sixteen - one) / (pieces * sixteen) * sixteen
    keys = op.Range(start, op.Squeeze(pieces * width), step)
    keys = op.Unsqueeze(begin, one) + op.Unsqueeze(keys, zero)  # [U, X]
    last = op.Unsqueeze(lengths - one, one)
    key_rows = op.Unsqueeze(starts, one) + op.Min(keys, last)
    queries = op.Unsqueeze(first, one) + op.Unsqueeze(op.Range(start, op.Squeeze(size), step), zero)
    queries = op.Unsqueeze(queries, two)  # [U, S, 1]
    near = op.Unsqueeze(op.And(keys <= last, keys >= zero), one)
    keys = op.Unsqueeze(keys, one)  # [U, 1, X]
    reached = op.And(near, op.And(keys >= queries - behind, keys <= queries + beyond))
    mask = op.Where(reached, op.Constant(value_float=0.0), op.Constant(value_float=MASKED))
    minus = op.Constant(value_ints=[-1])
    shape = op.Concat(minus, pieces, width, axis=0)
    return op.Reshape(key_rows, shape), op.Unsqueeze(mask, two)


@script(DOMAIN, default_opset=op)
def TileScores(query, key, rows, key_rows, num_kv_heads, num_groups, scale: float):
    """Return [K, U, S, G, X]: scaled products of queries [T, N * H] and keys [T, K * H]."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    minus = op.Constant(value_ints=[-1])
    split = op.Reshape(query, op.Concat(zero, num_kv_heads, num_groups, minus, axis=0))
    tiles = op.Gather(op.Transpose(split, perm=[1, 0, 2, 3]), rows, axis=1)  # [K, U, S, G, H]
    head = op.Shape(tiles, start=0, end=2)
    flat = op.Concat(head, one, minus, op.Shape(tiles, start=4, end=5), axis=0)
    heads = op.Transpose(
        op.Reshape(key, op.Concat(zero, num_kv_heads, minus, axis=0)), perm=[1, 0, 2]
    )
    pieces = op.Gather(heads, key_rows, axis=1)  # [K, U, W, C, H]
    scores = MICROSOFT.FusedMatMul(op.Reshape(tiles, flat), pieces, transB=1, alpha=scale)
    scores = op.Transpose(scores, perm=[0, 1, 3, 2, 4])  # [K, U, S * G, W, C]
    return op.Reshape(scores, op.Concat(op.Shape(tiles, start=0, end=4), minus, axis=0))


@script(DOMAIN, default_opset=op)
def TileValues(scores, mask, value, key_rows, token_places, num_kv_heads, num_slices):
    """Return [T, N * H]: the softmax of masked scores [K, U, S, G, X], times values [T, K * H]."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    minus = op.Constant(value_ints=[-1])
    weights = op.Softmax(scores + mask, axis=-1)
    head, keys = op.Shape(scores, start=1, end=2), op.Shape(scores, start=4, end=5)
    weights = op.Reshape(weights, op.Concat(num_kv_heads, one, head, minus, keys, axis=0))
    slices = op.Reshape(value, op.Concat(zero, num_kv_heads * num_slices, minus, axis=0))
    flat_rows = op.Reshape(key_rows, op.Concat(zero, minus, axis=0))
    values = op.Gather(op.Transpose(slices, perm=[1, 0, 2]), flat_rows, axis=1)
    shape = op.Concat(num_kv_heads, num_slices, head, keys, minus, axis=0)
    tiles = op.MatMul(weights, op.Reshape(values, shape))  # [K, E, U, S * G, H / E]
    groups = op.Shape(scores, start=3, end=4)
    shape = op.Concat(
        num_kv_heads, num_slices, minus, groups, op.Shape(tiles, start=4, end=5), axis=0
    )
    tokens = op.Gather(op.Reshape(tiles, shape), token_places, axis=2)  # [K, E, T, G, H / E]
    tokens = op.Transpose(tokens, perm=[2, 0, 3, 1, 4])
    return op.Reshape(tokens, op.Concat(zero, minus, axis=0))


@script(DOMAIN, default_opset=op)
def TileSequences(cu_seqlens, num_heads: int, num_kv_heads: int, back: int, ahead: int):
    """List the tiles of a step and the keys of each; see `QueryTiles` and `KeyPieces`."""
    one = op.Constant(value_ints=[1])
    kv_heads = op.Reshape(op.Constant(value_int=num_kv_heads), one)
    groups = op.Reshape(op.Constant(value_int=num_heads), one) / kv_heads
    least = (op.Constant(value_ints=[64]) + groups - one) / groups
    most = op.Constant(value_ints=[MOST_QUERIES])
    # Not read from the shape of a layer's own tensor, so that layers share their tiles.
    num_tokens = op.Cast(op.Gather(cu_seqlens, op.Constant(value_ints=[-1])), to=7)
    rows, owner, first, token_places = DOMAIN.QueryTiles(cu_seqlens, num_tokens, least, most)
    key_rows, mask = DOMAIN.KeyPieces(cu_seqlens, rows, owner, first, back=back, ahead=ahead)
    return rows, token_places, key_rows, mask, kv_heads, groups


@script(DOMAIN, default_opset=op)
def PackedAttention(
    query, key, value, cu_seqlens, num_heads: int, num_kv_heads: int, num_slices: int, back: int,
    ahead: int, scale: float,
) -> TensorType:  # fmt: skip
    rows, token_places, key_rows, mask, kv_heads, groups = DOMAIN.TileSequences(
        cu_seqlens, num_heads=num_heads, num_kv_heads=num_kv_heads, back=back, ahead=ahead
    )
    scores = DOMAIN.TileScores(query, key, rows, key_rows, kv_heads, groups, scale=scale)
    slices = op.Reshape(op.Constant(value_int=num_slices), op.Constant(value_ints=[1]))
    return DOMAIN.TileValues(scores, mask, value, key_rows, token_places, kv_heads, slices)


@script(DOMAIN, default_opset=op)
def PackedAttentionSoftcap(
    query, key, value, cu_seqlens, num_heads: int, num_kv_heads: int, num_slices: int, back: int,
    ahead: int, scale: float, softcap: float,
) -> TensorType:  # fmt: skip
    rows, token_places, key_rows, mask, kv_heads, groups = DOMAIN.TileSequences(
        cu_seqlens, num_heads=num_heads, num_kv_heads=num_kv_heads, back=back, ahead=ahead
    )
    scores = DOMAIN.TileScores(query, key, rows, key_rows, kv_heads, groups, scale=scale)
    cap = op.Constant(value_float=softcap)
    capped = op.Tanh(scores / cap) * cap
    slices = op.Reshape(op.Constant(value_int=num_slices), op.Constant(value_ints=[1]))
    return DOMAIN.TileValues(capped, mask, value, key_rows, token_places, kv_heads, slices)


@script(DOMAIN, default_opset=op)
def ChunkSums(x, cu_seqlens) -> tuple[TensorType, TensorType]:
    """Add up each sequence's rows in chunks of 64 with a product with ones.

    Returns the sums [U, D], packed in sequence order, and the offsets of each sequence's sums.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    size = op.Constant(value_ints=[SUM_CHUNK])
    rows, owner, first, _ = DOMAIN.QueryTiles(cu_seqlens, op.Shape(x, start=0, end=1), size, size)
    cu = op.Cast(cu_seqlens, to=7)
    starts = op.Slice(cu, zero, op.Constant(value_ints=[-1]))
    lengths = op.Slice(cu, one, op.Constant(value_ints=[9223372036854775807])) - starts
    left = op.Unsqueeze(op.Gather(lengths, owner) - first, one)  # [U, 1]
    offsets = op.Range(
        op.Constant(value_int=0), op.Constant(value_int=SUM_CHUNK), op.Constant(value_int=1)
    )
    ones = op.Unsqueeze(op.CastLike(op.Unsqueeze(offsets, zero) < left, x), one)
    # A product with a single row runs another kernel, whose results differ in bits.
    ones = op.Expand(ones, op.Constant(value_ints=[1, 2, 1]))  # [U, 2, 64]
    sums = op.Gather(op.MatMul(ones, op.Gather(x, rows)), op.Constant(value_int=0), axis=1)
    ends = op.CumSum((lengths + size - one) / size, op.Constant(value_int=0))
    return sums, op.Concat(zero, ends, axis=0)


FUNCTIONS = (
    QueryTiles, KeyPieces, TileScores, TileValues, TileSequences, PackedAttention,
    PackedAttentionSoftcap, ChunkSums, RmsNorm,
)  # fmt: skip
"""The ops and everything they call."""
