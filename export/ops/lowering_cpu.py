"""CPU lowering of the custom ops: ONNX functions made of standard operators.

Attention runs over *items*. An item pairs a tile of queries of one sequence with a chunk of 64 keys
of its context, if any query of the tile reaches any of the keys. A step costs as much as its items,
so a long prompt or context does not slow down other sequences. The items of all sequences form one
batched product; the scores of a tile's items are put side by side for its softmax.

A row's result must be bit-identical whatever shares its step. Matrix products can break this,
because ONNX Runtime splits a sum of products by the shape and the number of threads. It sums up to
256 products at once if there are at most 64 columns, up to 64 products for any number of columns,
and uses another kernel for a single row. Therefore queries are multiplied with 64 keys at a time
and weights with 64 values, never with a single query row, and a product with ones adds up the
partial results.

Each function is one step of `ragged_attention` (formula: `export.ops.reference`). ONNX Runtime
inlines the functions and computes what layers share, such as indices and masks, only once;
therefore shapes come from attributes, not from a layer's own tensors.

Dimensions: B sequences, T new tokens, U tiles, S queries of a tile, I items, W chunks in a table
row, M blocks in a table row, P cache blocks, N query heads, K key-value heads, G = N / K, H head
dimension.
"""

# Names are bound when the source is parsed into ONNX, so types here are tensors, not Python values.
# mypy: ignore-errors
# ruff: noqa: N802, D103

from onnxscript import script
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import TensorType
from onnxscript.values import Opset

from beam_gemma.model.signature import CONTEXT_ALIGNMENT

DOMAIN = Opset("beam_gemma", 1)
MICROSOFT = Opset("com.microsoft", 1)
MASKED = -3.0e38


@script(DOMAIN, default_opset=op)
def StoreTokens(cache, tokens, slot_mapping, num_kv_heads, block_size):
    """Write tokens [T, K * H] into cache [K, P, block, H] at flat slots [T]; skip negative ones."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_ints=[1])
    column = op.Constant(value_ints=[1, -1, 1])
    slots = op.Cast(slot_mapping, to=7)
    keep = op.Reshape(slots >= zero, column)
    slots = op.Reshape(op.Max(slots, zero), column)
    extent = op.Concat(num_kv_heads, op.Shape(slot_mapping), one, axis=0)
    heads = op.Range(zero, op.Squeeze(num_kv_heads), op.Constant(value_int=1))
    indices = op.Concat(
        op.Expand(op.Reshape(heads, op.Constant(value_ints=[-1, 1, 1])), extent),
        op.Expand(slots / block_size, extent),
        op.Expand(op.Mod(slots, block_size), extent),
        axis=2,
    )
    minus = op.Constant(value_ints=[-1])
    shape = op.Concat(op.Constant(value_ints=[0]), num_kv_heads, minus, axis=0)
    values = op.Transpose(op.Reshape(tokens, shape), perm=[1, 0, 2])
    # A skipped token leaves zeros in block 0, which no table reads.
    values = op.Where(keep, values, op.CastLike(op.Constant(value_float=0.0), values))
    return op.ScatterND(cache, indices, values)


@script(DOMAIN, default_opset=op)
def GatherContext(cache, item_blocks):
    """Read the chunk of each item: [K, P, block, H] by [I, 64 / block] -> [K, I, 64, H]."""
    head = op.Concat(op.Shape(cache, start=0, end=1), op.Shape(item_blocks, start=0, end=1), axis=0)
    shape = op.Concat(head, op.Constant(value_ints=[64]), op.Shape(cache, start=3, end=4), axis=0)
    return op.Reshape(op.Gather(cache, item_blocks, axis=1), shape)


@script(DOMAIN, default_opset=op)
def QueryTiles(cu_seqlens, num_tokens, least_queries, most_queries):
    """Cut each sequence's new tokens into tiles of one size, at most `most_queries`.

    Returns the packed row of each query [U, S], with a sequence's last row repeated past its end;
    each tile's sequence [U] and first query [U]; and each token's index [T] in [U * S].
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    start = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    cu = op.Cast(cu_seqlens, to=7)
    starts = op.Slice(cu, zero, op.Constant(value_ints=[-1]))
    ends = op.Slice(cu, one, op.Constant(value_ints=[9223372036854775807]))
    lengths = ends - starts
    longest = op.ReduceMax(lengths, keepdims=1)
    parts = (longest + most_queries - one) / most_queries
    size = op.Max((longest + parts - one) / parts, least_queries)
    tiles = (lengths + size - one) / size
    tile_ends = op.CumSum(tiles, start)
    first_tiles = tile_ends - tiles
    ids = op.Range(start, op.ReduceMax(tile_ends, keepdims=0), step)
    passed = op.Unsqueeze(ids, one) >= op.Unsqueeze(tile_ends, zero)
    owner = op.ReduceSum(op.Cast(passed, to=7), one, keepdims=0)  # [U]
    first = (ids - op.Gather(first_tiles, owner)) * size
    offsets = op.Unsqueeze(op.Range(start, op.Squeeze(size), step), zero)
    within = op.Unsqueeze(first, one) + offsets
    last = op.Unsqueeze(op.Gather(lengths, owner) - one, one)
    rows = op.Unsqueeze(op.Gather(starts, owner), one) + op.Min(within, last)
    tokens = op.Range(start, op.Squeeze(num_tokens), step)
    after = op.Unsqueeze(tokens, one) >= op.Unsqueeze(ends, zero)
    sequence = op.ReduceSum(op.Cast(after, to=7), one, keepdims=0)  # [T]
    places = tokens + op.Gather(first_tiles * size - starts, sequence)
    return rows, owner, first, places


@script(DOMAIN, default_opset=op)
def Reach(context_starts, first_keys, last_keys, rows, owner, num_chunks):
    """Return a key mask [U, S, 1, W * 64] and flags [U, W] of chunks that any query reaches.

    reach(q, k) = first_keys[q] <= k <= last_keys[q]; the mask is 0 in reach, else very negative.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    start = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    chunk = op.Constant(value_int=CONTEXT_ALIGNMENT)
    begin = op.Unsqueeze(op.Gather(op.Cast(context_starts, to=7), owner), one)  # [U, 1]
    first = op.Gather(op.Cast(first_keys, to=7), rows)  # [U, S]
    last = op.Gather(op.Cast(last_keys, to=7), rows)  # [U, S]
    count = op.Squeeze(num_chunks)
    chunks = begin + op.Unsqueeze(op.Range(start, count, step) * chunk, zero)  # [U, W]
    near = chunks <= op.ReduceMax(last, one, keepdims=1)
    chunks_reached = op.And(near, chunks + chunk > op.ReduceMin(first, one, keepdims=1))
    keys = begin + op.Unsqueeze(op.Range(start, count * chunk, step), zero)
    keys = op.Unsqueeze(keys, one)  # [U, 1, W * 64]
    keys_reached = op.And(keys <= op.Unsqueeze(last, two), keys >= op.Unsqueeze(first, two))
    mask = op.Where(keys_reached, op.Constant(value_float=0.0), op.Constant(value_float=MASKED))
    return op.Unsqueeze(mask, two), chunks_reached


@script(DOMAIN, default_opset=op)
def Items(reached, owner, block_table, num_chunks):
    """List an item for each tile and chunk that `reached` [U, W] marks.

    Returns each item's tile [I], index in [U * W] and blocks [I, 64 / block]; and for each tile and
    chunk [U, W] its item, or the tile's first item if it has none.
    """
    one = op.Constant(value_ints=[1])
    step = op.Constant(value_int=1)
    minus = op.Constant(value_ints=[-1])
    places = op.Reshape(op.NonZero(op.Reshape(reached, minus)), minus)
    tiles = places / num_chunks
    rows = op.Gather(owner, tiles) * num_chunks + op.Mod(places, num_chunks)
    chunks = op.Shape(block_table, start=0, end=1) * num_chunks
    blocks = op.Gather(op.Reshape(block_table, op.Concat(chunks, minus, axis=0)), rows)
    marks = op.Cast(reached, to=7)
    counts = op.ReduceSum(marks, one, keepdims=1)
    first = op.CumSum(counts, op.Constant(value_int=0)) - counts
    return tiles, places, blocks, op.Max(first + op.CumSum(marks, step) - step, first)


@script(DOMAIN, default_opset=op)
def Scores(query, keys, item_rows, num_kv_heads, num_groups, scale: float):
    """Return [K, I, S * G, 64]: scaled products of queries [T, N * H] and keys [K, I, 64, H]."""
    minus = op.Constant(value_ints=[-1])
    zero = op.Constant(value_ints=[0])
    split = op.Reshape(query, op.Concat(zero, num_kv_heads, num_groups, minus, axis=0))
    heads = op.Transpose(split, perm=[1, 0, 2, 3])  # [K, T, G, H]
    padded = op.Gather(heads, item_rows, axis=1)  # [K, I, S, G, H]
    items = op.Shape(item_rows, start=0, end=1)
    flat = op.Concat(num_kv_heads, items, minus, op.Shape(keys, start=3, end=4), axis=0)
    return MICROSOFT.FusedMatMul(op.Reshape(padded, flat), keys, transB=1, alpha=scale)


@script(DOMAIN, default_opset=op)
def Weights(scores, mask, item_of_place, places):
    """Return [K, I, S * G, 64]: the softmax over all keys of a tile, split into its items.

    A chunk without an item repeats another item of its tile, fully masked.
    """
    minus = op.Constant(value_ints=[-1])
    kv_heads = op.Shape(scores, start=0, end=1)
    wide = op.Gather(scores, item_of_place, axis=1)  # [K, U, W, S * G, 64]
    wide = op.Transpose(wide, perm=[0, 1, 3, 2, 4])
    tile, keys = op.Shape(mask, start=0, end=2), op.Shape(mask, start=3, end=4)
    rows = op.Reshape(wide, op.Concat(kv_heads, tile, minus, keys, axis=0))
    weights = op.Reshape(op.Softmax(rows + mask, axis=-1), op.Shape(wide))
    weights = op.Transpose(weights, perm=[0, 1, 3, 2, 4])  # [K, U, W, S * G, 64]
    item = op.Shape(scores, start=2, end=4)
    return op.Gather(op.Reshape(weights, op.Concat(kv_heads, minus, item, axis=0)), places, axis=1)


@script(DOMAIN, default_opset=op)
def WeightedValues(weights, values, reached, item_of_place, num_groups):
    """Return [U * S, N * H]: weights [K, I, S * G, 64] times values [K, I, 64, H].

    A product with ones adds up the items of a tile; chunks without an item have zeros.
    """
    minus = op.Constant(value_ints=[-1])
    kv_heads = op.Shape(values, start=0, end=1)
    dim = op.Shape(values, start=3, end=4)
    products = op.MatMul(weights, values)  # [K, I, S * G, H]
    items = op.Shape(products, start=1, end=2)
    flat = op.Reshape(products, op.Concat(kv_heads, items, minus, axis=0))
    parts = op.Gather(flat, item_of_place, axis=1)  # [K, U, W, S * G * H]
    ones = op.Unsqueeze(op.CastLike(reached, values), op.Constant(value_ints=[1]))
    ones = op.Expand(ones, op.Constant(value_ints=[1, 2, 1]))  # [U, 2, W]
    total = op.MatMul(ones, parts)  # [K, U, 2, S * G * H], both rows alike
    total = op.Gather(total, op.Constant(value_int=0), axis=2)
    total = op.Reshape(total, op.Concat(kv_heads, minus, num_groups, dim, axis=0))
    total = op.Transpose(total, perm=[1, 0, 2, 3])  # [U * S, K, G, H]
    return op.Reshape(total, op.Concat(minus, kv_heads * num_groups * dim, axis=0))


@script(DOMAIN, default_opset=op)
def ListItems(
    query, cu_seqlens, block_table, context_starts, first_keys, last_keys, num_groups, block_size,
    query_tile: int,
):  # fmt: skip
    """List the step's items: what each of them reads, and where its results go."""
    one = op.Constant(value_ints=[1])
    # A product with a single row runs another kernel, whose results differ in bits.
    least = op.Where(op.Equal(num_groups, one), op.Constant(value_ints=[2]), one)
    most = op.Reshape(op.Constant(value_int=query_tile), one)
    rows, owner, _, token_places = DOMAIN.QueryTiles(
        cu_seqlens, op.Shape(query, start=0, end=1), least, most
    )
    chunk = op.Constant(value_int=CONTEXT_ALIGNMENT)
    num_chunks = op.Shape(block_table, start=1, end=2) * block_size / chunk
    mask, reached = DOMAIN.Reach(context_starts, first_keys, last_keys, rows, owner, num_chunks)
    tiles, places, blocks, items = DOMAIN.Items(reached, owner, block_table, num_chunks)
    return tiles, rows, mask, blocks, reached, items, places, token_places


@script(DOMAIN, default_opset=op)
def ScoreCached(
    query, key_cache, cu_seqlens, block_table, context_starts, first_keys, last_keys, num_kv_heads,
    num_groups, block_size, query_tile: int, scale: float,
):  # fmt: skip
    """List the step's items, read each item's keys and score them."""
    tiles, rows, mask, blocks, reached, items, places, token_places = DOMAIN.ListItems(
        query, cu_seqlens, block_table, context_starts, first_keys, last_keys, num_groups,
        block_size, query_tile=query_tile,
    )  # fmt: skip
    keys = DOMAIN.GatherContext(key_cache, blocks)
    item_rows = op.Gather(rows, tiles)
    scores = DOMAIN.Scores(query, keys, item_rows, num_kv_heads, num_groups, scale=scale)
    return scores, mask, blocks, reached, items, places, token_places


@script(DOMAIN, default_opset=op)
def StoreAndScore(
    query, key, value, key_cache, value_cache, cu_seqlens, block_table, slot_mapping,
    context_starts, first_keys, last_keys, num_heads: int, num_kv_heads: int, block_size: int,
    query_tile: int, scale: float,
):  # fmt: skip
    """Write the new tokens, list the step's items, read each item's keys and score them."""
    one = op.Constant(value_ints=[1])
    kv_heads = op.Reshape(op.Constant(value_int=num_kv_heads), one)
    groups = op.Reshape(op.Constant(value_int=num_heads), one) / kv_heads
    block = op.Reshape(op.Constant(value_int=block_size), one)
    key_out = DOMAIN.StoreTokens(key_cache, key, slot_mapping, kv_heads, block)
    value_out = DOMAIN.StoreTokens(value_cache, value, slot_mapping, kv_heads, block)
    scores, mask, blocks, reached, items, places, token_places = DOMAIN.ScoreCached(
        query, key_out, cu_seqlens, block_table, context_starts, first_keys, last_keys, kv_heads,
        groups, block, query_tile=query_tile, scale=scale,
    )  # fmt: skip
    return scores, mask, blocks, reached, items, places, token_places, groups, key_out, value_out


@script(DOMAIN, default_opset=op)
def Attend(scores, mask, value_cache, blocks, reached, items, places, token_places, groups):
    """Return [T, N * H]: softmax of masked scores, times values, packed again."""
    weights = DOMAIN.Weights(scores, mask, items, places)
    # `nothing` is zero but depends on `weights`, so values are read after the keys' memory is
    # free, while it is still in the processor's cache.
    nothing = op.Shape(weights, start=1, end=2) - op.Shape(blocks, start=0, end=1)
    late_blocks = blocks + op.CastLike(nothing, blocks)
    values = DOMAIN.GatherContext(value_cache, late_blocks)
    padded = DOMAIN.WeightedValues(weights, values, reached, items, groups)
    return op.Gather(padded, token_places)


@script(DOMAIN, default_opset=op)
def RaggedAttention(
    query, key, value, key_cache, value_cache, cu_seqlens, block_table, slot_mapping,
    context_starts, first_keys, last_keys, num_heads: int, num_kv_heads: int, block_size: int,
    query_tile: int, scale: float,
) -> tuple[TensorType, TensorType, TensorType]:  # fmt: skip
    scores, mask, blocks, reached, items, places, token_places, groups, key_out, value_out = (
        DOMAIN.StoreAndScore(
            query, key, value, key_cache, value_cache, cu_seqlens, block_table, slot_mapping,
            context_starts, first_keys, last_keys, num_heads=num_heads,
            num_kv_heads=num_kv_heads, block_size=block_size, query_tile=query_tile, scale=scale,
        )
    )  # fmt: skip
    output = DOMAIN.Attend(
        scores, mask, value_out, blocks, reached, items, places, token_places, groups
    )
    return output, key_out, value_out


@script(DOMAIN, default_opset=op)
def RaggedAttentionSoftcap(
    query, key, value, key_cache, value_cache, cu_seqlens, block_table, slot_mapping,
    context_starts, first_keys, last_keys, num_heads: int, num_kv_heads: int, block_size: int,
    query_tile: int, scale: float, softcap: float,
) -> tuple[TensorType, TensorType, TensorType]:  # fmt: skip
    scores, mask, blocks, reached, items, places, token_places, groups, key_out, value_out = (
        DOMAIN.StoreAndScore(
            query, key, value, key_cache, value_cache, cu_seqlens, block_table, slot_mapping,
            context_starts, first_keys, last_keys, num_heads=num_heads,
            num_kv_heads=num_kv_heads, block_size=block_size, query_tile=query_tile, scale=scale,
        )
    )  # fmt: skip
    cap = op.Constant(value_float=softcap)
    capped = op.Tanh(scores / cap) * cap
    output = DOMAIN.Attend(
        capped, mask, value_out, blocks, reached, items, places, token_places, groups
    )
    return output, key_out, value_out


@script(DOMAIN, default_opset=op)
def CachedAttention(
    query, key_cache, value_cache, cu_seqlens, block_table, context_starts, first_keys, last_keys,
    num_heads: int, num_kv_heads: int, block_size: int, query_tile: int, scale: float,
) -> TensorType:  # fmt: skip
    one = op.Constant(value_ints=[1])
    kv_heads = op.Reshape(op.Constant(value_int=num_kv_heads), one)
    groups = op.Reshape(op.Constant(value_int=num_heads), one) / kv_heads
    block = op.Reshape(op.Constant(value_int=block_size), one)
    scores, mask, blocks, reached, items, places, token_places = DOMAIN.ScoreCached(
        query, key_cache, cu_seqlens, block_table, context_starts, first_keys, last_keys, kv_heads,
        groups, block, query_tile=query_tile, scale=scale,
    )  # fmt: skip
    return DOMAIN.Attend(
        scores, mask, value_cache, blocks, reached, items, places, token_places, groups
    )


@script(DOMAIN, default_opset=op)
def CachedAttentionSoftcap(
    query, key_cache, value_cache, cu_seqlens, block_table, context_starts, first_keys, last_keys,
    num_heads: int, num_kv_heads: int, block_size: int, query_tile: int, scale: float,
    softcap: float,
) -> TensorType:  # fmt: skip
    one = op.Constant(value_ints=[1])
    kv_heads = op.Reshape(op.Constant(value_int=num_kv_heads), one)
    groups = op.Reshape(op.Constant(value_int=num_heads), one) / kv_heads
    block = op.Reshape(op.Constant(value_int=block_size), one)
    scores, mask, blocks, reached, items, places, token_places = DOMAIN.ScoreCached(
        query, key_cache, cu_seqlens, block_table, context_starts, first_keys, last_keys, kv_heads,
        groups, block, query_tile=query_tile, scale=scale,
    )  # fmt: skip
    cap = op.Constant(value_float=softcap)
    capped = op.Tanh(scores / cap) * cap
    return DOMAIN.Attend(
        capped, mask, value_cache, blocks, reached, items, places, token_places, groups
    )


@script(DOMAIN, default_opset=op)
def RmsNorm(x, weight, epsilon: float) -> TensorType:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)


@script(DOMAIN, default_opset=op)
def VisionAttention(query, key, value, num_heads: int, scale: float) -> TensorType:
    """Attend with [pictures, patches, D]: each picture is one sequence of a batch."""
    return MICROSOFT.MultiHeadAttention(query, key, value, num_heads=num_heads, scale=scale)


FUNCTIONS = (
    StoreTokens, GatherContext, QueryTiles, Reach, Items, Scores, Weights, WeightedValues,
    ListItems, ScoreCached, StoreAndScore, Attend, RaggedAttention, RaggedAttentionSoftcap, RmsNorm,
)  # fmt: skip
"""The ops and everything they call."""
CACHED = (CachedAttention, CachedAttentionSoftcap)
"""Ops that only some graphs have, made of the same."""
