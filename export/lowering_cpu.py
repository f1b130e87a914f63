"""CPU lowering of the custom ops: ONNX functions made of standard operators.

Every function is one thought of `ragged_attention` (see `export.ops` for the formula). ONNX Runtime
inlines them and then computes what layers have in common, such as masks and indices, once.

A row's result must not depend on what shares its step, to the last bit, and matrix products are
where that breaks. So every product here contracts at most 128 elements, never has a single query
row, and partial results are added up by a product with ones, whose order of summation is fixed.

Dimensions: B sequences, T new tokens, S longest chunk of the step, A slices of a cache, C channels
of a slice, P cache blocks, M blocks in a table row, J keys in reach (M * block), K key-value heads,
G query heads of one key-value head, D slices of a head, H head dimension, W 128-key chunks.
"""

# Names are bound when the source is parsed into ONNX, so types here are tensors, not Python values.
# mypy: ignore-errors
# ruff: noqa: N802, D103

from onnxscript import script
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import TensorType
from onnxscript.values import Opset

DOMAIN = Opset("beam_gemma", 1)
MASKED = -3.0e38


@script(DOMAIN, default_opset=op)
def StoreTokens(cache, tokens, slot_mapping):
    """Write tokens [T, A, C] into cache [A, P, block, C] at flat slots [T]; skip where negative."""
    one = op.Constant(value_ints=[1])
    slices = op.Shape(cache, start=0, end=1)
    block_size = op.Shape(cache, start=2, end=3)
    slots = op.Cast(slot_mapping, to=7)
    keep = op.Reshape(slots >= op.Constant(value_int=0), op.Constant(value_ints=[1, -1, 1]))
    slots = op.Reshape(op.Max(slots, op.Constant(value_int=0)), op.Constant(value_ints=[1, -1, 1]))
    extent = op.Concat(slices, op.Shape(tokens, start=0, end=1), one, axis=0)
    slice_ids = op.Range(op.Constant(value_int=0), op.Squeeze(slices), op.Constant(value_int=1))
    slice_ids = op.Reshape(slice_ids, op.Constant(value_ints=[-1, 1, 1]))
    indices = op.Concat(
        op.Expand(slice_ids, extent),
        op.Expand(slots / block_size, extent),
        op.Expand(op.Mod(slots, block_size), extent),
        axis=2,
    )
    # A skipped token leaves zeros in block 0, which no table reads.
    values = op.Transpose(tokens, perm=[1, 0, 2])
    values = op.Where(keep, values, op.CastLike(op.Constant(value_float=0.0), values))
    return op.ScatterND(cache, indices, values)


@script(DOMAIN, default_opset=op)
def GatherContext(cache, block_table):
    """Read the blocks of each sequence: [A, P, block, C] by [B, M] -> [A, B, J, C]."""
    blocks = op.Gather(cache, block_table, axis=1)  # [A, B, M, block, C]
    head = op.Shape(blocks, start=0, end=2)
    tail = op.Shape(blocks, start=4, end=5)
    return op.Reshape(blocks, op.Concat(head, op.Constant(value_ints=[-1]), tail, axis=0))


@script(DOMAIN, default_opset=op)
def PaddedRows(cu_seqlens, num_tokens, group_size):
    """Return for each sequence and chunk position [B, S] the packed row; past its end, any row.

    S is the longest chunk, and at least 2 where one query head has a key head of its own: a product
    with a single row runs another kernel, with other bits.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    cu = op.Cast(cu_seqlens, to=7)
    starts = op.Slice(cu, zero, op.Constant(value_ints=[-1]))
    lengths = op.Slice(cu, one, op.Constant(value_ints=[9223372036854775807])) - starts
    least = op.Where(op.Equal(group_size, one), op.Constant(value_ints=[2]), one)
    longest = op.Squeeze(op.Max(op.ReduceMax(lengths, zero, keepdims=1), least))
    steps = op.Range(op.Constant(value_int=0), longest, op.Constant(value_int=1))
    rows = op.Unsqueeze(starts, one) + op.Unsqueeze(steps, zero)
    return op.Min(rows, num_tokens - one)


@script(DOMAIN, default_opset=op)
def PackedRows(cu_seqlens, num_tokens, padded_width):
    """Return for each packed token [T] its row in the flattened [B * S] padding."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    cu = op.Cast(cu_seqlens, to=7)
    starts = op.Slice(cu, zero, op.Constant(value_ints=[-1]))
    ends = op.Slice(cu, one, op.Constant(value_ints=[9223372036854775807]))
    tokens = op.Range(op.Constant(value_int=0), op.Squeeze(num_tokens), op.Constant(value_int=1))
    after = op.Cast(op.Unsqueeze(tokens, one) >= op.Unsqueeze(ends, zero), to=7)
    owner = op.ReduceSum(after, one, keepdims=0)
    return owner * padded_width + tokens - op.Gather(starts, owner, axis=0)


@script(DOMAIN, default_opset=op)
def ReachMask(past_seqlens, context_starts, last_keys, rows, num_keys, window: int):
    """Return [B, S, 1, J]: 0 where position q reaches position k, else a very negative number.

    reach(q, k) = q - window < k <= last_keys[q]
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    start = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    width = op.Squeeze(op.Shape(rows, start=1, end=2))
    queries = op.Unsqueeze(op.Cast(past_seqlens, to=7), one) + op.Unsqueeze(
        op.Range(start, width, step), zero
    )  # [B, S]
    keys = op.Unsqueeze(op.Cast(context_starts, to=7), one) + op.Unsqueeze(
        op.Range(start, op.Squeeze(num_keys), step), zero
    )  # [B, J]
    keys = op.Unsqueeze(keys, one)
    last = op.Unsqueeze(op.Gather(op.Cast(last_keys, to=7), rows, axis=0), two)
    first = op.Unsqueeze(queries, two) - op.Constant(value_int=window)
    reached = op.And(keys <= last, keys > first)
    mask = op.Where(reached, op.Constant(value_float=0.0), op.Constant(value_float=MASKED))
    return op.Unsqueeze(mask, two)


@script(DOMAIN, default_opset=op)
def QueryKeyScores(query, rows, keys, head_shape, scale: float):
    """Return [K, B, S, G, J]: scaled products, contracted slice by slice.

    query [T, K * G * D * C]; keys [K * D, B, J, C]; head_shape = (K, G, D, C).
    """
    minus = op.Constant(value_ints=[-1])
    kv_heads = op.Slice(head_shape, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]))
    group = op.Slice(head_shape, op.Constant(value_ints=[1]), op.Constant(value_ints=[2]))
    slices = op.Slice(head_shape, op.Constant(value_ints=[2]), op.Constant(value_ints=[3]))
    width = op.Slice(head_shape, op.Constant(value_ints=[3]), op.Constant(value_ints=[4]))
    batch = op.Shape(rows)  # [B, S]
    padded = op.Gather(query * op.Constant(value_float=scale), rows, axis=0)
    padded = op.Reshape(padded, op.Concat(batch, head_shape, axis=0))
    padded = op.Transpose(padded, perm=[2, 4, 0, 1, 3, 5])  # [K, D, B, S, G, C]
    first = op.Slice(batch, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]))
    flat = op.Reshape(padded, op.Concat(kv_heads * slices, first, minus, width, axis=0))
    scores = op.MatMul(flat, op.Transpose(keys, perm=[0, 1, 3, 2]))  # [K * D, B, S * G, J]
    parts = op.Concat(kv_heads, slices, batch, group, minus, axis=0)
    return op.ReduceSum(op.Reshape(scores, parts), op.Constant(value_ints=[1]), keepdims=0)


@script(DOMAIN, default_opset=op)
def WeightedValues(weights, values):
    """Return [B * S, K * G * H]: weights [K, B, S, G, J] times values [K, B, J, H].

    Keys are taken 128 at a time, and the partial sums are added up by a product with ones.
    """
    chunk = op.Constant(value_ints=[128])
    minus = op.Constant(value_ints=[-1])
    heads = op.Shape(weights, start=0, end=1)
    batch = op.Shape(weights, start=1, end=2)
    width = op.Shape(weights, start=2, end=3)
    group = op.Shape(weights, start=3, end=4)
    chunks = op.Shape(weights, start=4, end=5) / chunk
    dim = op.Shape(values, start=3, end=4)
    weights = op.Reshape(weights, op.Concat(heads, batch, width * group, chunks, chunk, axis=0))
    weights = op.Transpose(weights, perm=[0, 1, 3, 2, 4])  # [K, B, W, S * G, 128]
    values = op.Reshape(values, op.Concat(heads, batch, chunks, chunk, dim, axis=0))
    parts = op.Reshape(op.MatMul(weights, values), op.Concat(heads, batch, chunks, minus, axis=0))
    ones = op.Expand(
        op.Constant(value_float=1.0), op.Concat(op.Constant(value_ints=[2]), chunks, axis=0)
    )
    total = op.MatMul(ones, parts)  # [K, B, 2, S * G * H], both rows alike
    total = op.Gather(total, op.Constant(value_int=0), axis=2)
    total = op.Reshape(total, op.Concat(heads, batch, width, group, dim, axis=0))
    total = op.Transpose(total, perm=[1, 2, 0, 3, 4])  # [B, S, K, G, H]
    return op.Reshape(total, op.Concat(batch * width, heads * group * dim, axis=0))


@script(DOMAIN, default_opset=op)
def HeadShape(key_cache, num_heads: int, num_kv_heads: int):
    """Return (K, G, D, C) from the key cache [K * D, P, block, C]."""
    kv_heads = op.Reshape(op.Constant(value_int=num_kv_heads), op.Constant(value_ints=[1]))
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    slices = op.Shape(key_cache, start=0, end=1) / kv_heads
    width = op.Shape(key_cache, start=3, end=4)
    return op.Concat(kv_heads, heads / kv_heads, slices, width, axis=0)


@script(DOMAIN, default_opset=op)
def AsSlices(tokens, cache):
    """Return tokens [T, A * C] as [T, A, C], the shape of the cache's slices."""
    slices = op.Shape(cache, start=0, end=1)
    width = op.Shape(cache, start=3, end=4)
    return op.Reshape(tokens, op.Concat(op.Constant(value_ints=[-1]), slices, width, axis=0))


@script(DOMAIN, default_opset=op)
def Attend(scores, mask, values, cu_seqlens, num_tokens):
    """Return [T, N * H]: softmax of masked scores, times values, packed again."""
    weights = op.Softmax(scores + mask, axis=-1)
    padded = DOMAIN.WeightedValues(weights, values)
    packed = DOMAIN.PackedRows(cu_seqlens, num_tokens, op.Shape(scores, start=2, end=3))
    return op.Gather(padded, packed, axis=0)


@script(DOMAIN, default_opset=op)
def StoreAndScore(
    query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    context_starts, last_keys, num_heads: int, num_kv_heads: int, window: int, scale: float,
):  # fmt: skip
    """Write the new tokens, read each sequence's context and score it."""
    key_out = DOMAIN.StoreTokens(key_cache, DOMAIN.AsSlices(key, key_cache), slot_mapping)
    value_out = DOMAIN.StoreTokens(value_cache, DOMAIN.AsSlices(value, value_cache), slot_mapping)
    keys = DOMAIN.GatherContext(key_out, block_table)
    values = DOMAIN.GatherContext(value_out, block_table)
    shape = DOMAIN.HeadShape(key_cache, num_heads=num_heads, num_kv_heads=num_kv_heads)
    group = op.Slice(shape, op.Constant(value_ints=[1]), op.Constant(value_ints=[2]))
    rows = DOMAIN.PaddedRows(cu_seqlens, op.Shape(query, start=0, end=1), group)
    num_keys = op.Shape(keys, start=2, end=3)
    mask = DOMAIN.ReachMask(past_seqlens, context_starts, last_keys, rows, num_keys, window=window)
    scores = DOMAIN.QueryKeyScores(query, rows, keys, shape, scale=scale)
    return scores, mask, values, key_out, value_out


@script(DOMAIN, default_opset=op)
def RaggedAttention(
    query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    context_starts, last_keys, num_heads: int, num_kv_heads: int, window: int, scale: float,
) -> tuple[TensorType, TensorType, TensorType]:  # fmt: skip
    scores, mask, values, key_out, value_out = DOMAIN.StoreAndScore(
        query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table,
        slot_mapping, context_starts, last_keys,
        num_heads=num_heads, num_kv_heads=num_kv_heads, window=window, scale=scale,
    )  # fmt: skip
    output = DOMAIN.Attend(scores, mask, values, cu_seqlens, op.Shape(query, start=0, end=1))
    return output, key_out, value_out


@script(DOMAIN, default_opset=op)
def RaggedAttentionSoftcap(
    query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    context_starts, last_keys, num_heads: int, num_kv_heads: int, window: int, scale: float,
    softcap: float,
) -> tuple[TensorType, TensorType, TensorType]:  # fmt: skip
    scores, mask, values, key_out, value_out = DOMAIN.StoreAndScore(
        query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table,
        slot_mapping, context_starts, last_keys,
        num_heads=num_heads, num_kv_heads=num_kv_heads, window=window, scale=scale,
    )  # fmt: skip
    cap = op.Constant(value_float=softcap)
    capped = op.Tanh(scores / cap) * cap
    output = DOMAIN.Attend(capped, mask, values, cu_seqlens, op.Shape(query, start=0, end=1))
    return output, key_out, value_out


@script(DOMAIN, default_opset=op)
def RmsNorm(x, weight, epsilon: float) -> TensorType:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)


FUNCTIONS = (
    StoreTokens, GatherContext, PaddedRows, PackedRows, ReachMask, QueryKeyScores, WeightedValues,
    HeadShape, AsSlices, Attend, StoreAndScore, RaggedAttention, RaggedAttentionSoftcap, RmsNorm,
)  # fmt: skip
"""The ops and everything they call."""
