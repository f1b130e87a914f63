"""CPU lowering of attention with heads of more than 256 channels.

ONNX Runtime sums at most 256 products at once, and adds up what is beyond in an order that depends
on the shape and the number of threads (`export.ops.lowering_cpu`). So a wide head is cut into
slices of at most 256 channels. Each slice is scored as if it were a head of its own, and the scores
of a head's slices are added up. Values need no slices here: a product with them sums 64 keys, and
that of whole sequences takes 64 channels at a time already.

The dimensions are those of `lowering_cpu` and `lowering_packed`; here E is the slices of a head
that is scored, and h = H / E.
"""

# Names are bound when the source is parsed into ONNX, so types here are tensors, not Python values.
# mypy: ignore-errors
# ruff: noqa: N802, D103

from onnxscript import script
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import TensorType

from export.ops.lowering_cpu import DOMAIN

WIDEST_SLICE = 256
"""Most channels that are summed at once."""


def slices_of(width: int, widest: int = WIDEST_SLICE) -> int:
    """Return into how many even slices of at most `widest` channels a width is cut."""
    return next(n for n in range(-(-width // widest), width + 1) if width % n == 0)


@script(DOMAIN, default_opset=op)
def SliceQueries(query, num_kv_heads, num_groups, num_slices):
    """Turn query [T, K * G * E * h] to [T, K * E * G * h]: the groups of a slice side by side."""
    zero = op.Constant(value_ints=[0])
    minus = op.Constant(value_ints=[-1])
    shape = op.Concat(zero, num_kv_heads, num_groups, num_slices, minus, axis=0)
    slices = op.Transpose(op.Reshape(query, shape), perm=[0, 1, 3, 2, 4])
    return op.Reshape(slices, op.Concat(zero, minus, axis=0))


@script(DOMAIN, default_opset=op)
def GatherSlices(cache, item_blocks, block_size, num_slices):
    """Read the chunk of each item: [K, P, block, H] by [I, 64 / block] -> [K * E, I, 64, h]."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    minus = op.Constant(value_ints=[-1])
    start = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    width = op.Shape(cache, start=3, end=4) / num_slices
    rows = op.Reshape(cache, op.Concat(zero, minus, width, axis=0))  # [K, P * block * E, h]
    offsets = op.Range(start, op.Squeeze(block_size), step)
    cells = op.Unsqueeze(op.Cast(item_blocks, to=7) * block_size, minus) + offsets
    cells = op.Reshape(cells, op.Concat(zero, minus, axis=0)) * num_slices  # [I, 64]
    slices = op.Range(start, op.Squeeze(num_slices), step)
    slices = op.Reshape(slices, op.Concat(minus, one, one, axis=0))
    keys = op.Gather(rows, op.Unsqueeze(cells, zero) + slices, axis=1)  # [K, E, I, 64, h]
    return op.Reshape(keys, op.Concat(minus, op.Shape(keys, start=2), axis=0))


@script(DOMAIN, default_opset=op)
def AddSlices(scores, num_kv_heads):
    """Add up the scores of each head's slices: [K * E, ..] -> [K, ..]."""
    minus = op.Constant(value_ints=[-1])
    shape = op.Concat(num_kv_heads, minus, op.Shape(scores, start=1), axis=0)
    return op.ReduceSum(op.Reshape(scores, shape), op.Constant(value_ints=[1]), keepdims=0)


@script(DOMAIN, default_opset=op)
def WideCachedAttention(
    query, key_cache, value_cache, cu_seqlens, block_table, context_starts, first_keys, last_keys,
    num_heads: int, num_kv_heads: int, num_slices: int, block_size: int, query_tile: int,
    scale: float,
) -> TensorType:  # fmt: skip
    one = op.Constant(value_ints=[1])
    kv_heads = op.Reshape(op.Constant(value_int=num_kv_heads), one)
    groups = op.Reshape(op.Constant(value_int=num_heads), one) / kv_heads
    slices = op.Reshape(op.Constant(value_int=num_slices), one)
    block = op.Reshape(op.Constant(value_int=block_size), one)
    tiles, rows, mask, blocks, reached, items, places, token_places = DOMAIN.ListItems(
        query, cu_seqlens, block_table, context_starts, first_keys, last_keys, groups, block,
        query_tile=query_tile,
    )  # fmt: skip
    keys = DOMAIN.GatherSlices(key_cache, blocks, block, slices)
    sliced = DOMAIN.SliceQueries(query, kv_heads, groups, slices)
    item_rows = op.Gather(rows, tiles)
    scores = DOMAIN.Scores(sliced, keys, item_rows, kv_heads * slices, groups, scale=scale)
    return DOMAIN.Attend(
        DOMAIN.AddSlices(scores, kv_heads), mask, value_cache, blocks, reached, items, places,
        token_places, groups,
    )  # fmt: skip


@script(DOMAIN, default_opset=op)
def WideRaggedAttention(
    query, key, value, key_cache, value_cache, cu_seqlens, block_table, slot_mapping,
    context_starts, first_keys, last_keys, num_heads: int, num_kv_heads: int, num_slices: int,
    block_size: int, query_tile: int, scale: float,
) -> tuple[TensorType, TensorType, TensorType]:  # fmt: skip
    one = op.Constant(value_ints=[1])
    kv_heads = op.Reshape(op.Constant(value_int=num_kv_heads), one)
    block = op.Reshape(op.Constant(value_int=block_size), one)
    key_out = DOMAIN.StoreTokens(key_cache, key, slot_mapping, kv_heads, block)
    value_out = DOMAIN.StoreTokens(value_cache, value, slot_mapping, kv_heads, block)
    output = DOMAIN.WideCachedAttention(
        query, key_out, value_out, cu_seqlens, block_table, context_starts, first_keys, last_keys,
        num_heads=num_heads, num_kv_heads=num_kv_heads, num_slices=num_slices,
        block_size=block_size, query_tile=query_tile, scale=scale,
    )  # fmt: skip
    return output, key_out, value_out


@script(DOMAIN, default_opset=op)
def WidePackedAttention(
    query, key, value, cu_seqlens, num_heads: int, num_kv_heads: int, num_score_slices: int,
    num_slices: int, back: int, ahead: int, scale: float,
) -> TensorType:  # fmt: skip
    """Attend as `PackedAttention` does, which has `num_slices` for its values too."""
    one = op.Constant(value_ints=[1])
    rows, token_places, key_rows, mask, kv_heads, groups = DOMAIN.TileSequences(
        cu_seqlens, num_heads=num_heads, num_kv_heads=num_kv_heads, back=back, ahead=ahead
    )
    score_slices = op.Reshape(op.Constant(value_int=num_score_slices), one)
    sliced = DOMAIN.SliceQueries(query, kv_heads, groups, score_slices)
    scores = DOMAIN.TileScores(
        sliced, key, rows, key_rows, kv_heads * score_slices, groups, scale=scale
    )
    scores = DOMAIN.AddSlices(scores, kv_heads)
    slices = op.Reshape(op.Constant(value_int=num_slices), one)
    return DOMAIN.TileValues(scores, mask, value, key_rows, token_places, kv_heads, slices)


FUNCTIONS = (
    SliceQueries, GatherSlices, AddSlices, WideCachedAttention, WideRaggedAttention,
    WidePackedAttention,
)  # fmt: skip
"""The ops, and what they call beside functions of `lowering_cpu` and `lowering_packed`."""
