"""CPU lowering of `expert_mlp`: a loop over the experts that a step has chosen.

Pairs of a token and one of its experts are sorted by expert. Each expert that has any computes its
tokens in two products, and the weights of the others are not read. A product with a single row runs
another kernel, whose results differ in bits, so each expert computes its first token twice.

A row's bits must not depend on how many tokens share its expert. ONNX Runtime does not pack these
weights, as they are none of the graph's constants inside the loop. It sums up to 128 products at
once if a thread computes more than 64 columns, and splits columns among threads as long as there
are more of them than rows; the experts of Gemma 4 have 1,408 and 2,816. The weighted sum of a
token's experts is a product of its own.

Dimensions: T tokens, D hidden, E experts, F an expert's feed-forward, k experts of a token, P = T *
k pairs.
"""

# Names are bound when the source is parsed into ONNX, so types here are tensors, not Python values.
# mypy: ignore-errors
# ruff: noqa: N802

from onnxscript import script
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import TensorType

from export.ops.lowering_cpu import DOMAIN


@script(DOMAIN, default_opset=op)
def SortedPairs(expert_ids, num_experts: int):
    """Sort the pairs of tokens [T, k] and experts by expert, then by token.

    Returns the token of each pair [P], the place of each pair among the sorted ones [P], the
    experts that have any, and where the pairs of each expert start and end [E].
    """
    start = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    flat = op.Reshape(expert_ids, op.Constant(value_ints=[-1]))
    count = op.Shape(flat)
    keys = flat * count + op.Range(start, op.Squeeze(count), step)
    _, order = op.TopK(keys, count, axis=-1, largest=0, sorted=1)
    _, places = op.TopK(order, count, axis=-1, largest=0, sorted=1)
    tokens = order / op.Shape(expert_ids, start=1, end=2)
    experts = op.Range(start, op.Constant(value_int=num_experts), step)
    is_own = op.Equal(op.Unsqueeze(flat, op.Constant(value_ints=[1])), experts)
    counts = op.ReduceSum(op.Cast(is_own, to=7), op.Constant(value_ints=[0]), keepdims=0)
    ends = op.CumSum(counts, start)
    chosen = op.Reshape(op.NonZero(counts), op.Constant(value_ints=[-1]))
    return tokens, places, chosen, ends - counts, ends


@script(DOMAIN, default_opset=op)
def OneExpert(x, gate_up, down):
    """Return what one expert makes of x [N, D]; its matrices are [2F, D] and [D, F]."""
    zero = op.Constant(value_ints=[0])
    doubled = op.Concat(op.Slice(x, zero, op.Constant(value_ints=[1])), x, axis=0)
    gate, up = op.Split(op.Gemm(doubled, gate_up, transB=1), axis=1, num_outputs=2)
    inner = op.Gelu(gate, approximate="tanh") * up
    found = op.Gemm(inner, down, transB=1)
    last = op.Constant(value_ints=[9223372036854775807])
    return op.Slice(found, op.Constant(value_ints=[1]), last)


@script(DOMAIN, default_opset=op)
def ExpertLoop(x, gate_up, down, expert_ids, weights, num_experts: int) -> TensorType:
    """Return the weighted sum [T, D] of what a token's experts make of it."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    tokens, places, chosen, starts, ends = DOMAIN.SortedPairs(expert_ids, num_experts=num_experts)
    results = op.SequenceEmpty()
    for i in range(op.Size(chosen)):
        expert = op.Gather(chosen, i)
        begin = op.Unsqueeze(op.Gather(starts, expert), zero)
        end = op.Unsqueeze(op.Gather(ends, expert), zero)
        own = op.Gather(x, op.Slice(tokens, begin, end))
        found = DOMAIN.OneExpert(own, op.Gather(gate_up, expert), op.Gather(down, expert))
        results = op.SequenceInsert(results, found)
    pairs = op.Gather(op.ConcatFromSequence(results, axis=0), places)
    shape = op.Concat(op.Shape(expert_ids), op.Constant(value_ints=[-1]), axis=0)
    shares = op.Expand(op.Unsqueeze(weights, one), op.Constant(value_ints=[1, 2, 1]))
    total = op.MatMul(shares, op.Reshape(pairs, shape))  # [T, 2, D], both rows alike
    return op.Gather(total, op.Constant(value_int=0), axis=1)


FUNCTIONS = (SortedPairs, OneExpert, ExpertLoop)
"""The op and what it calls."""
