"""CUDA lowering of `expert_mlp`: all experts compute all tokens.

Which experts a step's tokens choose is known on the device alone, and a captured graph has fixed
sizes, so no product may depend on it. Each weight is read once in a step. What an expert makes of a
token that has not chosen it becomes zero by `Where`, since 0 times infinity is not 0.

The experts' matrices stay as checkpoints have them. ONNX Runtime takes [E, 2F, D] by [T, D] as one
product, while [T, D] by [E, 2F, D] would be many, whose addresses it copies to the device. It adds
up the leading dimension of a tensor in an order that varies, so a product with ones adds up the
experts.

Coded matrices (`export.graph.quantize`) have experts side by side: the second product adds them up
itself.

Dimensions: T tokens, D hidden, E experts, F an expert's feed-forward, k experts of a token, J
blocks of codes.
"""

# Names are bound when the source is parsed into ONNX, so types here are tensors, not Python values.
# mypy: ignore-errors
# ruff: noqa: N802

from onnxscript import script
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import TensorType

from export.ops.lowering_cuda import DOMAIN, MICROSOFT


@script(DOMAIN, default_opset=op)
def WeightedPairs(gate, up, shares, to: int) -> TensorType:
    """Return gelu(gate) * up * shares, and 0 where a share is 0; `shares` is float32."""
    zero = op.Constant(value_float=0.0)
    inner = op.Gelu(gate, approximate="tanh") * up * op.Cast(shares, to=to)
    return op.Where(op.Equal(shares, zero), op.Cast(zero, to=to), inner)


@script(DOMAIN, default_opset=op)
def ExpertMlp(x, gate_up, down, expert_ids, weights, numbers, ones, to: int) -> TensorType:
    """Return the weighted sum of what a token's experts make of it, [1, T * D].

    Args:
        x: [T, D].
        gate_up: [E, 2F, D].
        down: [E, D, F].
        expert_ids: [T, k].
        weights: [T, k], in float32.
        numbers: [E, 1, 1], of the experts.
        ones: [1, E].
        to: Type of x.
    """
    zero = op.Constant(value_float=0.0)
    last = op.Constant(value_ints=[-1])
    chosen = op.Where(op.Equal(numbers, expert_ids), weights, zero)  # [E, T, k]
    shares = op.Unsqueeze(op.ReduceSum(chosen, last, keepdims=0), op.Constant(value_ints=[1]))
    wide = MICROSOFT.FusedMatMul(gate_up, x, transB=1)  # [E, 2F, T]
    gate, up = op.Split(wide, axis=1, num_outputs=2)
    inner = DOMAIN.WeightedPairs(gate, up, shares, to=to)
    each = MICROSOFT.FusedMatMul(inner, down, transA=1, transB=1)  # [E, T, D]
    return op.MatMul(ones, op.Reshape(each, op.Constant(value_ints=[0, -1])))


@script(DOMAIN, default_opset=op)
def CodedExpertMlp(
    x, gate_up_codes, gate_up_scales, down_codes, down_scales, expert_ids, weights, numbers, rows,
    gate_up_size: int, hidden_size: int, inner_size: int, gate_up_bits: int, down_bits: int,
    block_size: int, to: int,
) -> TensorType:  # fmt: skip
    """Return the weighted sum of what a token's experts make of it, [T, D].

    Args:
        x: [T, D].
        gate_up_codes: Of a matrix [E * 2F, D], with its scales.
        gate_up_scales: [E * 2F, J].
        down_codes: Of a matrix [D, E * F], with its scales.
        down_scales: [D, J].
        expert_ids: [T, k].
        weights: [T, k], in float32.
        numbers: [E, 1, 1], of the experts.
        rows: Shape [-1, E, 2F].
        gate_up_size: E * 2F.
        hidden_size: D.
        inner_size: E * F.
        gate_up_bits: Bits per number of the first matrix.
        down_bits: Bits per number of the second matrix.
        block_size: Numbers that share a scale.
        to: Type of x.
    """
    zero = op.Constant(value_float=0.0)
    last = op.Constant(value_ints=[-1])
    of_token = op.Unsqueeze(expert_ids, op.Constant(value_ints=[1]))  # [T, 1, k]
    experts = op.Squeeze(numbers, last)  # [E, 1]
    shares = op.Where(
        op.Equal(experts, of_token), op.Unsqueeze(weights, op.Constant(value_ints=[1])), zero
    )  # [T, E, k]
    shares = op.ReduceSum(shares, last, keepdims=1)
    wide = MICROSOFT.MatMulNBits(
        x, gate_up_codes, gate_up_scales, N=gate_up_size, K=hidden_size, bits=gate_up_bits,
        block_size=block_size,
    )  # fmt: skip
    gate, up = op.Split(op.Reshape(wide, rows), axis=2, num_outputs=2)
    inner = DOMAIN.WeightedPairs(gate, up, shares, to=to)
    return MICROSOFT.MatMulNBits(
        op.Reshape(inner, op.Constant(value_ints=[0, -1])), down_codes, down_scales,
        N=hidden_size, K=inner_size, bits=down_bits, block_size=block_size,
    )  # fmt: skip


FUNCTIONS = (WeightedPairs, ExpertMlp, CodedExpertMlp)
"""The op in both forms, and what it calls."""
