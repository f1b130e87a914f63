"""A graph for CUDA, made into one that the CPU provider runs.

What is proven that way is everything but the kernels themselves. So little is changed, and all of
it is listed here: `RaggedAttention` and `CachedAttention` get the project's CPU
lowering behind a change of the cache's layout, and 16-bit floats become float32, which the CPU
provider has kernels for. A node or a type that is not listed is refused, since nobody would know
then what a test proves.

Inputs, outputs and state keep their names and shapes; `state` gives the buffers.

Dimensions: B sequences, T new tokens, P cache blocks, M blocks in a table row, K key-value heads,
H head dimension.
"""

# The types of parameters of ONNX functions are tensors, not Python values.
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import script
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import TensorType
from onnxscript.values import Opset

from beam_gemma.model.graph_tensors import Table
from beam_gemma.model.signature import QUERY_TILE, Signature
from export.checkpoints.tensors import NUMPY_DTYPES
from export.ops import lowering_cpu
from export.ops.reference import NO_WINDOW

TESTS = Opset("beam_gemma_tests", 1)
DOMAIN = lowering_cpu.DOMAIN
BLOCK = 16
"""The CPU's blocks, of which a block for CUDA is several in a row."""

KEPT = {
    "": {
        "Abs", "Add", "And", "Attention", "Cast", "CastLike", "Clip", "Concat", "Constant", "Conv",
        "Cos", "CumSum", "Div", "Equal", "Exp", "Expand", "Gather", "GatherElements", "Gelu",
        "Gemm", "Greater", "GreaterOrEqual", "IsNaN", "LayerNormalization", "Less", "LessOrEqual",
        "Log", "MatMul", "Max", "Min", "Mul", "Neg", "Not", "Or", "RMSNormalization", "Range",
        "Reciprocal", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape",
        "RotaryEmbedding", "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sin", "Slice",
        "Softmax", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose",
        "Unsqueeze", "Where",
    },
    "com.microsoft": {
        "FusedMatMul", "GatherBlockQuantized", "LinearAttention", "MatMulNBits",
        "MultiHeadAttention",
    },
    "beam_gemma": {
        "CodedExpertMlp", "ExpertMlp", "HalfRmsNorm", "PaddedAttention", "PaddedRecurrence",
        "RmsNorm", "VisionAttention", "WeightedPairs",
    },
}  # fmt: skip
"""What stays as it is, by domain."""
LOWERED = {
    ("RaggedAttention", True): "PagedAttention",
    ("CachedAttention", True): "ReadingAttention",
    ("CachedAttention", False): "TwoSidedAttention",
}
"""Functions for CUDA alone, whether they are causal, and what takes their place."""
NUM_INPUTS = {"CachedAttention": 8, "RaggedAttention": 9}
"""How many inputs what takes their place has: all but the bounds in host memory."""
RETYPED = {ir.DataType.BFLOAT16: ir.DataType.FLOAT, ir.DataType.FLOAT16: ir.DataType.FLOAT}
"""What every value and every `Cast` is changed to."""


def cuda_on_cpu(model: ir.Model) -> ir.Model:
    """Change a graph for CUDA in place, so that the CPU provider runs it; return it."""
    for function in model.functions.values():
        for node in function:
            # The functions that are for CUDA alone go; what they are made of has its own test.
            if function.name not in NUM_INPUTS:
                _check(node)
    for node in list(model.graph):
        if node.domain == "beam_gemma" and node.op_type in NUM_INPUTS:
            _lower(node)
        else:
            _check(node)
            _retype_cast(node)
    for name in NUM_INPUTS:
        model.functions.pop(("beam_gemma", name, ""), None)
    for source in (*lowering_cpu.FUNCTIONS, *FUNCTIONS):
        function = ir.serde.deserialize_function(source.to_function_proto())
        model.functions.setdefault(function.identifier(), function)
    model.opset_imports[TESTS.domain] = 1
    _retype_values(model)
    return model


def cuda_file_on_cpu(source: Path, target: Path, tables: Sequence[Table] = ()) -> Path:
    """Write a graph file for CUDA, with its weights, as one that the CPU provider runs.

    Args:
        source: The file.
        target: The new file.
        tables: Those of its inputs that are to be weights.
    """
    model = ir.load(source)
    for table in tables:
        value = next(value for value in model.graph.inputs if value.name == table.name)
        numbers = table_numbers(table, source.parent)
        value.const_value = ir.tensor(numbers, value.dtype, name=table.name)
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    onnx.save(ir.to_proto(cuda_on_cpu(model)), target)
    return target


def table_numbers(table: Table, folder: Path) -> np.ndarray:
    """Return the numbers of a table of a model folder, with the type that the file has."""
    kind = NUMPY_DTYPES[table.dtype]
    count = math.prod(table.shape)
    numbers = np.fromfile(folder / table.file, kind, count=count, offset=table.offset)
    return numbers.reshape(table.shape)


def state(signature: Signature, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return zeroed state buffers of a changed graph, for sizes by the signature's letters."""
    return {
        t.input_name: np.zeros(
            [sizes[d] if isinstance(d, str) else d for d in t.shape],
            np.float32 if t.dtype in ("bfloat16", "float16") else t.dtype,
        )
        for t in signature.state_tensors()
    }


def _check(node: ir.Node) -> None:
    assert node.op_type in KEPT.get(node.domain, ()), f"unlisted: {node.domain} {node.op_type}"


def _lower(node: ir.Node) -> None:
    """Make a node of CUDA's attention one of the CPU's."""
    is_causal = node.attributes.pop("is_causal", ir.AttrInt64("is_causal", 1)).as_int() == 1
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    assert sorted(values) == ["num_heads", "num_kv_heads", "scale", "softcap", "window"], values
    window = NO_WINDOW if values["window"] == -1 else values["window"]
    num_inputs = NUM_INPUTS[node.op_type]
    node.domain = TESTS.domain
    node.op_type = LOWERED[node.op_type, is_causal] + ("Softcap" if values["softcap"] else "")
    node.attributes["window"] = ir.AttrInt64("window", window)
    if not values["softcap"]:
        del node.attributes["softcap"]
    node.resize_inputs(num_inputs)


def _retype_cast(node: ir.Node) -> None:
    if "to" in node.attributes and (kind := ir.DataType(node.attributes["to"].as_int())) in RETYPED:
        node.attributes["to"] = ir.AttrInt64("to", RETYPED[kind].value)


def _retype_values(model: ir.Model) -> None:
    graph = model.graph
    outputs = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        if value.dtype in RETYPED:
            value.dtype = RETYPED[value.dtype]
        tensor = value.const_value
        if tensor is not None and tensor.dtype in RETYPED:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
        elif tensor is not None and isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.tensor(tensor.numpy().copy(), name=value.name)


@script(TESTS, default_opset=op)
def SmallBlocks(cache):  # noqa: N802
    """Return a cache [P, block, K, H] as the CPU has it: [K, P * block / 16, 16, H]."""
    size = op.Constant(value_ints=[-1, BLOCK])
    shape = op.Concat(size, op.Shape(cache, start=2, end=4), axis=0)
    return op.Transpose(op.Reshape(cache, shape), perm=[2, 0, 1, 3])


@script(TESTS, default_opset=op)
def LargeBlocks(cache, like):  # noqa: N802
    """Return what `SmallBlocks` made as [P, block, K, H] again."""
    return op.Reshape(op.Transpose(cache, perm=[1, 2, 0, 3]), op.Shape(like))


@script(TESTS, default_opset=op)
def Owners(cu_seqlens, query):  # noqa: N802
    """Return each token's index [T] and that of its sequence [T]."""
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    first = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    tokens = op.Range(zero, op.Squeeze(op.Shape(query, start=0, end=1)), step)
    tokens = op.CastLike(tokens, cu_seqlens)
    ends = op.Slice(cu_seqlens, one, op.Constant(value_ints=[9223372036854775807]))
    passed = op.Unsqueeze(tokens, one) >= op.Unsqueeze(ends, first)
    return tokens, op.ReduceSum(op.Cast(passed, to=7), one, keepdims=0)


@script(TESTS, default_opset=op)
def SmallTables(cache, block_table, cu_seqlens, past_seqlens, query):  # noqa: N802
    """Return tables [B, M * block / 16] of small blocks, and the position of each token [T]."""
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    minus = op.Constant(value_ints=[-1])
    count = op.Shape(cache, start=1, end=2) / op.Constant(value_ints=[BLOCK])
    offsets = op.CastLike(op.Range(zero, op.Squeeze(count), step), block_table)
    wide = op.Unsqueeze(block_table, minus) * op.CastLike(count, block_table) + offsets
    table = op.Reshape(wide, op.Concat(op.Shape(block_table, start=0, end=1), minus, axis=0))
    tokens, owner = TESTS.Owners(cu_seqlens, query)
    starts = op.Gather(cu_seqlens, owner)
    return table, tokens - starts + op.Gather(past_seqlens, owner)


@script(TESTS, default_opset=op)
def LastKeys(cu_seqlens, past_seqlens, query):  # noqa: N802
    """Return the last position [T] of each token's sequence."""
    minus = op.Constant(value_ints=[-1])
    one = op.Constant(value_ints=[1])
    starts = op.Slice(cu_seqlens, op.Constant(value_ints=[0]), minus)
    ends = op.Slice(cu_seqlens, one, op.Constant(value_ints=[9223372036854775807]))
    _, owner = TESTS.Owners(cu_seqlens, query)
    return op.Gather(past_seqlens + ends - starts, owner) + op.CastLike(minus, past_seqlens)


@script(TESTS, default_opset=op)
def PagedAttention(  # noqa: N802
    query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    num_heads: int, num_kv_heads: int, window: int, scale: float,
) -> tuple[TensorType, TensorType, TensorType]:  # fmt: skip
    """Attend over blocks in CUDA's layout."""
    table, last = TESTS.SmallTables(key_cache, block_table, cu_seqlens, past_seqlens, query)
    reach = op.Constant(value_int=window) - op.Constant(value_int=1)
    first = last - op.CastLike(reach, last)
    output, keys, values = DOMAIN.RaggedAttention(
        query, key, value, TESTS.SmallBlocks(key_cache), TESTS.SmallBlocks(value_cache),
        cu_seqlens, table, slot_mapping, past_seqlens - past_seqlens, first, last,
        num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=BLOCK, query_tile=QUERY_TILE,
        scale=scale,
    )  # fmt: skip
    return (
        output, TESTS.LargeBlocks(keys, key_cache), TESTS.LargeBlocks(values, value_cache)
    )  # fmt: skip


@script(TESTS, default_opset=op)
def PagedAttentionSoftcap(  # noqa: N802
    query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    num_heads: int, num_kv_heads: int, window: int, scale: float, softcap: float,
) -> tuple[TensorType, TensorType, TensorType]:  # fmt: skip
    """Attend over blocks in CUDA's layout, with a softcap."""
    table, last = TESTS.SmallTables(key_cache, block_table, cu_seqlens, past_seqlens, query)
    reach = op.Constant(value_int=window) - op.Constant(value_int=1)
    first = last - op.CastLike(reach, last)
    output, keys, values = DOMAIN.RaggedAttentionSoftcap(
        query, key, value, TESTS.SmallBlocks(key_cache), TESTS.SmallBlocks(value_cache),
        cu_seqlens, table, slot_mapping, past_seqlens - past_seqlens, first, last,
        num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=BLOCK, query_tile=QUERY_TILE,
        scale=scale, softcap=softcap,
    )  # fmt: skip
    return (
        output, TESTS.LargeBlocks(keys, key_cache), TESTS.LargeBlocks(values, value_cache)
    )  # fmt: skip


@script(TESTS, default_opset=op)
def ReadingAttention(  # noqa: N802
    query, key, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    num_heads: int, num_kv_heads: int, window: int, scale: float,
) -> TensorType:  # fmt: skip
    """Attend over blocks in CUDA's layout, of which none is written: all slots are -1."""
    output, _, _ = TESTS.PagedAttention(
        query, key, key, key_cache, value_cache, cu_seqlens, past_seqlens, block_table,
        slot_mapping, num_heads=num_heads, num_kv_heads=num_kv_heads, window=window, scale=scale,
    )  # fmt: skip
    return output


@script(TESTS, default_opset=op)
def TwoSidedAttention(  # noqa: N802
    query, key, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    num_heads: int, num_kv_heads: int, window: int, scale: float,
) -> TensorType:  # fmt: skip
    """Attend in both directions over blocks in CUDA's layout."""
    table, own = TESTS.SmallTables(key_cache, block_table, cu_seqlens, past_seqlens, query)
    last = TESTS.LastKeys(cu_seqlens, past_seqlens, query)
    reach = op.Constant(value_int=window) - op.Constant(value_int=1)
    first = own - op.CastLike(reach, own)
    output, _, _ = DOMAIN.RaggedAttention(
        query, key, key, TESTS.SmallBlocks(key_cache), TESTS.SmallBlocks(value_cache),
        cu_seqlens, table, slot_mapping, past_seqlens - past_seqlens, first, last,
        num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=BLOCK, query_tile=QUERY_TILE,
        scale=scale,
    )  # fmt: skip
    return output


@script(TESTS, default_opset=op)
def TwoSidedAttentionSoftcap(  # noqa: N802
    query, key, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    num_heads: int, num_kv_heads: int, window: int, scale: float, softcap: float,
) -> TensorType:  # fmt: skip
    """Attend in both directions over blocks in CUDA's layout, with a softcap."""
    table, own = TESTS.SmallTables(key_cache, block_table, cu_seqlens, past_seqlens, query)
    last = TESTS.LastKeys(cu_seqlens, past_seqlens, query)
    reach = op.Constant(value_int=window) - op.Constant(value_int=1)
    first = own - op.CastLike(reach, own)
    output, _, _ = DOMAIN.RaggedAttentionSoftcap(
        query, key, key, TESTS.SmallBlocks(key_cache), TESTS.SmallBlocks(value_cache),
        cu_seqlens, table, slot_mapping, past_seqlens - past_seqlens, first, last,
        num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=BLOCK, query_tile=QUERY_TILE,
        scale=scale, softcap=softcap,
    )  # fmt: skip
    return output


FUNCTIONS = (
    SmallBlocks, LargeBlocks, Owners, SmallTables, LastKeys, PagedAttention, PagedAttentionSoftcap,
    ReadingAttention, TwoSidedAttention, TwoSidedAttentionSoftcap,
)  # fmt: skip
