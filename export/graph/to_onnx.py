"""Exports a PyTorch module as an ONNX graph without loading weights into memory.

The module is built and traced under fake tensors, so a 27B model exports on a laptop. Weights are
attached later as references to files (`export.graph.weights`).
"""

import inspect
import math
import typing
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset23 as op
from onnxscript.optimizer import optimize
from onnxscript.values import OnnxFunction, Op
from torch._subclasses.fake_tensor import FakeTensorMode

from beam_gemma.model.graph_tensors import StateTensor, Tensor
from beam_gemma.model.signature import QUERY_TILE, Signature
from export.modules.decoder import RMSNorm, Rotary
from export.modules.source_encoder import SourceEmbedder, SourceEncoder
from export.modules.vision import LayerNorm
from export.ops import lowering_cpu, lowering_cuda, lowering_packed, lowering_recurrent
from export.ops.lowering_packed import SUM_CHUNK, VALUE_SLICE
from export.ops.reference import NO_WINDOW

OPSET = 23
TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
TENSOR_TYPES = [
    f"tensor({kind})" for kind in ("float", "bfloat16", "float16", "int32", "int64", "bool")
]
VISION_LOWERINGS: dict[str, tuple[OnnxFunction[..., Any], ...]] = {
    "cpu": (lowering_cpu.VisionAttention, lowering_cpu.RmsNorm),
    "cuda": (lowering_cuda.VisionAttention, lowering_cuda.RmsNorm, lowering_cuda.HalfRmsNorm),
}
DECODER_LOWERINGS = {"cpu": lowering_cpu.FUNCTIONS, "cuda": lowering_cuda.FUNCTIONS}


def trace(build: Callable[[], torch.nn.Module], signature: Signature) -> ir.Model:
    """Export a module as the graph that `signature` describes.

    Args:
        build: Function that makes a module with `GemmaDecoder`'s `forward`; called under fake
            tensors.
        signature: Inputs, state and outputs of the graph.

    Returns:
        A graph whose parameters are initializers without a value, named as in the module; those
        that an encoder shares with its decoder have the decoder's names.
    """
    with FakeTensorMode(), warnings.catch_warnings():
        # Hide deprecation warnings from inside the exporter.
        warnings.simplefilter("ignore")
        module = _typed(build(), signature.dtype).eval()
        sizes = _Sizes()
        step = {t.name: sizes.example(t) for t in signature.step_inputs()}
        state = {t.input_name: sizes.example(t) for t in signature.state_tensors()}
        program = torch.export.export(
            module,
            (step, state),
            dynamic_shapes=(
                {t.name: _dynamic(t.shape) for t in signature.step_inputs()},
                {t.input_name: _dynamic(t.shape) for t in signature.state_tensors()},
            ),
            strict=False,
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verify=False,
            verbose=False,
            input_names=[*step, *state],
            output_names=_output_names(signature),
            custom_translation_table=_translations(signature.device),
        )
    assert exported is not None
    finished = _finished(exported.model, signature, {n for n, _ in module.named_parameters()})
    if isinstance(module, SourceEncoder | SourceEmbedder):
        _rename(finished, module.stored_name)
    return finished


def _finished(model: ir.Model, signature: Signature, parameters: set[str]) -> ir.Model:
    """Optimize the graph, then add the bodies of its custom ops.

    The order matters: the optimizer must see neither fake values nor the bodies of custom ops.
    """
    for name in parameters & set(model.graph.initializers):
        model.graph.initializers[name].const_value = None
    optimize(model)
    model.opset_imports.update({"beam_gemma": 1, "com.microsoft": 1})
    for function in _lowering(signature):
        body = ir.serde.deserialize_function(function.to_function_proto())
        model.functions[body.identifier()] = body
    _name_dimensions(model, signature)
    model.producer_name = "beam_gemma"
    return model


def _rename(model: ir.Model, stored_name: Callable[[str], str]) -> None:
    """Give initializers the names that a checkpoint has for them."""
    for name, value in list(model.graph.initializers.items()):
        if (stored := stored_name(name)) != name:
            del model.graph.initializers[name]
            value.name = stored
            model.graph.initializers[stored] = value


def _lowering(signature: Signature) -> Iterable[OnnxFunction[..., Any]]:
    """Return the bodies of the custom ops in a graph."""
    if signature.head == "vision":
        return VISION_LOWERINGS[signature.device]
    if signature.head in ("embed", "encode") and signature.device == "cpu":
        return lowering_packed.FUNCTIONS
    if signature.has_recurrent_state:
        device = signature.device
        return (*DECODER_LOWERINGS[device], *lowering_recurrent.FUNCTIONS[device])
    return DECODER_LOWERINGS[signature.device]


def _typed(module: torch.nn.Module, dtype: str) -> torch.nn.Module:
    """Convert the module's matrices to a dtype; weights of norms and frequencies keep theirs."""
    for child in module.modules():
        if not isinstance(child, RMSNorm | LayerNorm | Rotary):
            for name, parameter in child.named_parameters(recurse=False):
                parameter = torch.nn.Parameter(parameter.to(TORCH_DTYPES[dtype]))
                setattr(child, name, parameter)
    return module


class _Sizes:
    """Distinct example sizes for a signature's letters, so the exporter never merges two."""

    def __init__(self) -> None:
        self._sizes = {"B": 3, "B1": 4}

    def example(self, tensor: Tensor | StateTensor) -> torch.Tensor:
        shape = [
            dim if isinstance(dim, int) else self._sizes.setdefault(dim, 11 + 2 * len(self._sizes))
            for dim in tensor.shape
        ]
        return torch.zeros(shape, dtype=TORCH_DTYPES[tensor.dtype])


def _dynamic(shape: tuple[int | str, ...]) -> dict[int, Any]:
    return {i: torch.export.Dim.DYNAMIC for i, dim in enumerate(shape) if isinstance(dim, str)}


def _output_names(signature: Signature) -> list[str]:
    return [
        *(tensor.name for tensor in signature.outputs()),
        *(tensor.output_name for tensor in signature.state_tensors()),
    ]


def _name_dimensions(model: ir.Model, signature: Signature) -> None:
    """Replace the exporter's symbols by the signature's letters throughout the graph."""
    shapes = {t.name: t.shape for t in (*signature.step_inputs(), *signature.outputs())}
    for state in signature.state_tensors():
        shapes |= dict.fromkeys((state.input_name, state.output_name), state.shape)
    letters: dict[str, str] = {}
    for value in model.graph.inputs:
        for symbol, letter in zip(value.shape or (), shapes[value.name or ""], strict=True):
            if isinstance(symbol, ir.SymbolicDim) and isinstance(letter, str):
                letters[str(symbol.value)] = letter
    for value in _values(model):
        if value.shape is not None and not value.shape.frozen:
            for axis, symbol in enumerate(value.shape):
                if isinstance(symbol, ir.SymbolicDim):
                    value.shape[axis] = letters.get(str(symbol.value), symbol.value)
    for value in model.graph.outputs:
        value.shape = ir.Shape(shapes[value.name or ""])


def _values(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _translations(device: str) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the device's translations of torch ops, added to PyTorch's own table."""
    return {
        torch.ops.beam_gemma.ragged_attention.default: (
            _attention_cpu if device == "cpu" else _attention_cuda
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
    shape = {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "block_size": key_cache.shape[2],
        "query_tile": QUERY_TILE, "scale": scale,
    }  # fmt: skip
    if softcap:
        return _node(lowering_cpu.RaggedAttentionSoftcap)(*inputs, **shape, softcap=softcap)
    return _node(lowering_cpu.RaggedAttention)(*inputs, **shape)


def _attention_cuda(  # type: ignore[no-untyped-def]
    query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    context_starts, first_keys, last_keys, num_heads: int, num_kv_heads: int, window: int,
    scale: float, softcap: float, layout: str, attention_metadata=None,
):  # fmt: skip
    del layout, context_starts, first_keys, last_keys
    return _node(lowering_cuda.RaggedAttention)(
        query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table,
        slot_mapping, attention_metadata,
        num_heads=num_heads, num_kv_heads=num_kv_heads, scale=scale, softcap=softcap,
        window=-1 if window == NO_WINDOW else window,
    )  # fmt: skip


def _span_attention(  # type: ignore[no-untyped-def]
    output, query, key, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, rows,
    no_slots, is_inside, places, num_heads: int, num_kv_heads: int, window: int, scale: float,
    softcap: float, attention_metadata,
):  # fmt: skip
    inside = _node(lowering_cuda.SpanAttention)(
        op.Gather(query, rows), op.Gather(key, rows), key_cache, value_cache, cu_seqlens,
        past_seqlens, block_table, no_slots, attention_metadata,
        num_heads=num_heads, num_kv_heads=num_kv_heads, scale=scale, softcap=softcap,
        window=-1 if window == NO_WINDOW else window,
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
    shape = {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "back": back, "ahead": ahead,
        "num_slices": math.ceil(key.shape[1] / num_kv_heads / VALUE_SLICE), "scale": scale,
    }  # fmt: skip
    if softcap:
        node = _node(lowering_packed.PackedAttentionSoftcap)
        return node(query, key, value, cu_seqlens, **shape, softcap=softcap)
    return _node(lowering_packed.PackedAttention)(query, key, value, cu_seqlens, **shape)


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
    query, key, value, num_patches: int, num_heads: int, scale: float
):
    width = query.shape[1]
    rows = (op.Reshape(x, _ints(-1, num_patches, width)) for x in (query, key, value))
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
