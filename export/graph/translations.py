"""Translations of torch ops to ONNX: the project's custom ops, and a few of PyTorch's own.

Each function takes a torch op's arguments and records the nodes that take its place.
"""

import inspect
import math
import typing
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset23 as op
from onnxscript.values import OnnxFunction, Op

from beam_gemma.model.signature import QUERY_TILE, WIDEST_FLASH_HEAD
from export.ops import (
    lowering_cpu,
    lowering_cuda,
    lowering_expert_loop,
    lowering_experts,
    lowering_packed,
    lowering_recurrent,
    lowering_wide,
)
from export.ops.lowering_packed import SUM_CHUNK, VALUE_SLICE
from export.ops.lowering_wide import WIDEST_SLICE, slices_of
from export.ops.reference import NO_WINDOW

TENSOR_TYPES = [
    f"tensor({kind})" for kind in ("float", "bfloat16", "float16", "int32", "int64", "bool")
]


def translations(device: str) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the device's translations of torch ops, added to PyTorch's own table."""
    import_module("export.ops.cached_attention")  # registers an op that not all models import
    return {
        torch.ops.beam_gemma.ragged_attention.default: (
            _attention_cpu if device == "cpu" else _attention_cuda
        ),
        torch.ops.beam_gemma.cached_attention.default: (
            _cached_attention_cpu if device == "cpu" else _cached_attention_cuda
        ),
        torch.ops.beam_gemma.expert_mlp.default: (
            _expert_mlp_cpu if device == "cpu" else _expert_mlp_cuda
        ),
        torch.ops.beam_gemma.span_attention.default: _span_attention,
        torch.ops.beam_gemma.source_attention.default: _source_attention,
        torch.ops.beam_gemma.packed_attention.default: _packed_attention,
        torch.ops.beam_gemma.packed_sum.default: _packed_sum,
        torch.ops.beam_gemma.padded_attention.default: _padded_attention,
        torch.ops.beam_gemma.column_maxima.default: _column_maxima,
        torch.ops.beam_gemma.vision_attention.default: _vision_attention,
        torch.ops.beam_gemma.rms_norm.default: _rms_norm_cpu if device == "cpu" else _rms_norm_cuda,
        torch.ops.beam_gemma.rotate.default: _rotate,
        torch.ops.beam_gemma.linear_recurrence.default: _linear_recurrence,
        torch.ops.beam_gemma.padded_recurrence.default: _padded_recurrence,
        torch.ops.aten.linear.default: _linear,
        torch.ops.aten.index_put.default: _index_put,
    }


def _node(function: OnnxFunction[..., Any]) -> Op:
    """Return an op that records a call of `function` as one node, without its body.

    The exporter inlines any body that it sees when it changes the opset version.
    """
    schema = onnx.defs.OpSchema
    attribute_types = {int: schema.AttrType.INT, float: schema.AttrType.FLOAT}
    signature = inspect.signature(function.function)
    inputs, attributes = [], []
    for name, parameter in signature.parameters.items():
        kind = attribute_types.get(parameter.annotation)
        if kind is None:
            inputs.append(schema.FormalParameter(name, "T"))
        else:
            attributes.append(schema.Attribute(name, kind, "", required=True))
    num_outputs = len(typing.get_args(signature.return_annotation)) or 1
    return Op(
        function.opset,
        function.name,
        schema(
            function.name,
            function.opset.domain,
            1,
            inputs=inputs,
            outputs=[schema.FormalParameter(f"output_{i}", "T") for i in range(num_outputs)],
            type_constraints=[("T", TENSOR_TYPES, "")],
            attributes=attributes,
        ),
    )


def _attention_cpu(  # type: ignore[no-untyped-def]
    query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    context_starts, first_keys, last_keys, num_heads: int, num_kv_heads: int, window: int,
    scale: float, softcap: float, layout: str, attention_metadata=None,
):  # fmt: skip
    del past_seqlens, window, layout, attention_metadata
    inputs = (
        query, key, value, key_cache, value_cache, cu_seqlens, block_table, slot_mapping,
        context_starts, first_keys, last_keys,
    )  # fmt: skip
    functions = (
        lowering_cpu.RaggedAttention, lowering_cpu.RaggedAttentionSoftcap,
        lowering_wide.WideRaggedAttention,
    )  # fmt: skip
    return _paged(functions, inputs, key_cache, num_heads, num_kv_heads, scale, softcap)


def _paged(  # type: ignore[no-untyped-def]
    functions, inputs, key_cache, num_heads: int, num_kv_heads: int, scale: float, softcap: float
):
    """Record attention over paged caches by the plain function, or that with a cap or wide heads.

    No Gemma has both: only the scores of Gemma 2 have a cap, and its heads have 256 channels.
    """
    plain, capped, wide = functions
    _, _, block_size, head_dim = key_cache.shape
    shape = {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "block_size": block_size,
        "query_tile": QUERY_TILE, "scale": scale,
    }  # fmt: skip
    if head_dim > WIDEST_SLICE:
        _check_no_cap(softcap)
        return _node(wide)(*inputs, **shape, num_slices=slices_of(head_dim))
    if softcap:
        return _node(capped)(*inputs, **shape, softcap=softcap)
    return _node(plain)(*inputs, **shape)


def _check_no_cap(softcap: float) -> None:
    assert not softcap, f"heads of more than {WIDEST_SLICE} channels cannot have a soft cap"


def _attention_cuda(  # type: ignore[no-untyped-def]
    query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    context_starts, first_keys, last_keys, num_heads: int, num_kv_heads: int, window: int,
    scale: float, softcap: float, layout: str, attention_metadata=None,
):  # fmt: skip
    del layout, context_starts, first_keys, last_keys
    return _node(lowering_cuda.RaggedAttention)(
        query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table,
        slot_mapping, _bounds(query, num_heads, attention_metadata),
        num_heads=num_heads, num_kv_heads=num_kv_heads, scale=scale, softcap=softcap,
        window=-1 if window == NO_WINDOW else window,
    )  # fmt: skip


def _cached_attention_cpu(  # type: ignore[no-untyped-def]
    query, key, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, no_slots,
    context_starts, first_keys, last_keys, num_heads: int, num_kv_heads: int, window: int,
    scale: float, softcap: float, layout: str, attention_metadata=None,
):  # fmt: skip
    del key, past_seqlens, no_slots, window, layout, attention_metadata
    inputs = (
        query, key_cache, value_cache, cu_seqlens, block_table, context_starts, first_keys,
        last_keys,
    )  # fmt: skip
    functions = (
        lowering_cpu.CachedAttention, lowering_cpu.CachedAttentionSoftcap,
        lowering_wide.WideCachedAttention,
    )  # fmt: skip
    return _paged(functions, inputs, key_cache, num_heads, num_kv_heads, scale, softcap)


def _cached_attention_cuda(  # type: ignore[no-untyped-def]
    query, key, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, no_slots,
    context_starts, first_keys, last_keys, num_heads: int, num_kv_heads: int, window: int,
    scale: float, softcap: float, layout: str, attention_metadata=None,
):  # fmt: skip
    del layout, context_starts, first_keys, last_keys
    return _node(lowering_cuda.CachedAttention)(
        query, key, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, no_slots,
        _bounds(query, num_heads, attention_metadata),
        num_heads=num_heads, num_kv_heads=num_kv_heads, scale=scale, softcap=softcap,
        window=-1 if window == NO_WINDOW else window, is_causal=1,
    )  # fmt: skip


def _bounds(query, num_heads: int, attention_metadata):  # type: ignore[no-untyped-def]
    """Return the bounds that a CUDA attention node takes; see `WIDEST_FLASH_HEAD`."""
    return None if query.shape[1] // num_heads > WIDEST_FLASH_HEAD else attention_metadata


def _expert_mlp_cpu(x, gate_up, down, expert_ids, weights):  # type: ignore[no-untyped-def]
    return _node(lowering_expert_loop.ExpertLoop)(
        x, gate_up, down, expert_ids, weights, num_experts=gate_up.shape[0],
        num_hidden_slices=slices_of(gate_up.shape[2], lowering_expert_loop.WIDEST_SLICE),
        num_inner_slices=slices_of(down.shape[2], lowering_expert_loop.WIDEST_SLICE),
    )  # fmt: skip


def _expert_mlp_cuda(x, gate_up, down, expert_ids, weights):  # type: ignore[no-untyped-def]
    count, width = gate_up.shape[0], down.shape[1]
    numbers = op.Constant(value=onnx.numpy_helper.from_array(np.arange(count).reshape(-1, 1, 1)))
    ones: Any = op.Constant(value_floats=[1.0] * count)
    ones = op.CastLike(ones, x)
    total = _node(lowering_experts.ExpertMlp)(
        x, gate_up, down, expert_ids, weights, numbers, op.Unsqueeze(ones, _ints(0)),
        to=x.dtype.value,
    )  # fmt: skip
    total.dtype = x.dtype  # ONNX cannot infer the type of a node that it does not know
    return op.Reshape(total, _ints(-1, width))


def _span_attention(  # type: ignore[no-untyped-def]
    output, query, key, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, rows,
    no_slots, is_inside, places, num_heads: int, num_kv_heads: int, window: int, scale: float,
    softcap: float, attention_metadata,
):  # fmt: skip
    inside = _node(lowering_cuda.CachedAttention)(
        op.Gather(query, rows), op.Gather(key, rows), key_cache, value_cache, cu_seqlens,
        past_seqlens, block_table, no_slots, attention_metadata,
        num_heads=num_heads, num_kv_heads=num_kv_heads, scale=scale, softcap=softcap,
        window=-1 if window == NO_WINDOW else window, is_causal=0,
    )  # fmt: skip
    inside.dtype = query.dtype  # ONNX cannot infer the type of a node that it does not know
    return op.Where(is_inside, op.Gather(inside, places), output)


def _source_attention(  # type: ignore[no-untyped-def]
    query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    rows, places, num_heads: int, num_kv_heads: int, scale: float, softcap: float,
    attention_metadata,
):  # fmt: skip
    output, *caches = _node(lowering_cuda.RaggedAttention)(
        op.Gather(query, rows), key, value, key_cache, value_cache, cu_seqlens, past_seqlens,
        block_table, slot_mapping, attention_metadata,
        num_heads=num_heads, num_kv_heads=num_kv_heads, scale=scale, softcap=softcap, window=-1,
    )  # fmt: skip
    output.dtype = query.dtype  # ONNX cannot infer the type of a node that it does not know
    return op.Gather(output, places), *caches


def _packed_attention(  # type: ignore[no-untyped-def]
    query, key, value, cu_seqlens, num_heads: int, num_kv_heads: int, back: int, ahead: int,
    scale: float, softcap: float,
):  # fmt: skip
    head_dim = key.shape[1] // num_kv_heads
    inputs = (query, key, value, cu_seqlens)
    shape = {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "back": back, "ahead": ahead,
        "num_slices": math.ceil(head_dim / VALUE_SLICE), "scale": scale,
    }  # fmt: skip
    if head_dim > WIDEST_SLICE:
        _check_no_cap(softcap)
        node = _node(lowering_wide.WidePackedAttention)
        return node(*inputs, **shape, num_score_slices=slices_of(head_dim))
    if softcap:
        return _node(lowering_packed.PackedAttentionSoftcap)(*inputs, **shape, softcap=softcap)
    return _node(lowering_packed.PackedAttention)(*inputs, **shape)


def _padded_attention(  # type: ignore[no-untyped-def]
    query, key, value, mask, rows, places, num_heads: int, num_kv_heads: int, scale: float,
    softcap: float,
):  # fmt: skip
    width = query.shape[1]
    output = _node(lowering_cuda.PaddedAttention)(
        op.Gather(query, rows), op.Gather(key, rows), op.Gather(value, rows), mask,
        num_heads=num_heads, num_kv_heads=num_kv_heads, scale=scale, softcap=softcap,
    )  # fmt: skip
    return op.Gather(op.Reshape(output, _ints(-1, width)), places)


def _packed_sum(x, cu_seqlens, longest: int):  # type: ignore[no-untyped-def]
    """Sum chunks of rows, then chunks of these sums, until each sequence is one row."""
    chunk_sums = _node(lowering_packed.ChunkSums)
    while True:
        x, cu_seqlens = chunk_sums(x, cu_seqlens)
        longest = math.ceil(longest / SUM_CHUNK)
        if longest == 1:
            return x


def _column_maxima(x, parts: int):  # type: ignore[no-untyped-def]
    return op.Max(*op.Split(x, axis=1, num_outputs=parts))


def _vision_attention(  # type: ignore[no-untyped-def]
    query, key, value, num_patches: int, num_heads: int, scale: float, num_keys: int = 0
):
    width = query.shape[1]
    of_queries = _ints(-1, num_patches, width) if num_patches else _ints(1, -1, width)
    of_keys = _ints(-1, num_keys, width) if num_keys else of_queries
    rows = (op.Reshape(query, of_queries), op.Reshape(key, of_keys), op.Reshape(value, of_keys))
    output = _node(lowering_cpu.VisionAttention)(*rows, num_heads=num_heads, scale=scale)
    return op.Reshape(output, _ints(-1, width))


def _rms_norm_cpu(x, weight, epsilon: float, dtype: int):  # type: ignore[no-untyped-def]
    del dtype
    return _node(lowering_cpu.RmsNorm)(x, weight, epsilon=epsilon)


def _rms_norm_cuda(x, weight, epsilon: float, dtype: int):  # type: ignore[no-untyped-def]
    is_half = x.dtype == dtype == ir.DataType.FLOAT16
    function = lowering_cuda.HalfRmsNorm if is_half else lowering_cuda.RmsNorm
    return _node(function)(x, weight, epsilon=epsilon, to=dtype)


def _rotate(x, cos, sin, num_heads: int):  # type: ignore[no-untyped-def]
    """Rotate all tokens as one sequence in a batch of one."""
    width, half = x.shape[1], cos.shape[2]
    tables = (op.Reshape(table, _ints(1, -1, half)) for table in (cos, sin))
    # 0 stands for all channels of a head.
    part = 0 if 2 * half * num_heads == width else 2 * half
    rotated = op.RotaryEmbedding(
        op.Reshape(x, _ints(1, -1, width)),
        *tables,
        num_heads=num_heads,
        rotary_embedding_dim=part,
    )
    return op.Reshape(rotated, _ints(-1, width))


def _linear_recurrence(inputs, log_decay, initial, owner, is_first):  # type: ignore[no-untyped-def]
    function = lowering_recurrent.LinearRecurrence
    return _node(function)(inputs, log_decay, initial, owner, is_first)


def _padded_recurrence(inputs, log_decay, initial, token_places):  # type: ignore[no-untyped-def]
    width = inputs.shape[2]
    one: Any = op.Constant(value_float=1.0)
    ones = op.Expand(one, op.Shape(inputs))
    states = op.Unsqueeze(initial, _ints(2, 3))
    hidden, last = _node(lowering_recurrent.PaddedRecurrence)(
        inputs, log_decay, states, ones, num_channels=width
    )
    hidden.dtype = last.dtype = inputs.dtype  # ONNX cannot infer them
    return op.Gather(op.Reshape(hidden, _ints(-1, width)), token_places)


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=values)


def _linear(x, weight, bias=None):  # type: ignore[no-untyped-def]
    """Use Gemm, which takes weights as [out, in] like checkpoints, without a transposed copy."""
    return op.Gemm(x, weight, bias, transB=1)


def _index_put(x, indices, values, accumulate: bool = False):  # type: ignore[no-untyped-def]
    """Write whole rows; PyTorch's own translation expands them to a shape known at run time."""
    [rows] = indices
    assert not accumulate
    return op.ScatterND(x, op.Unsqueeze(rows, _ints(-1)), values)
