"""CPU lowering of `expert_mlp`: a loop over the experts that a step has chosen.

Pairs of a token and one of its experts are sorted by expert. Each expert that has any computes its
tokens in two products, and the weights of the others are not read. A product with a single row runs
another kernel, whose results differ in bits, so each expert computes its first token twice.

A row's bits must not depend on how many tokens share its expert. ONNX Runtime does not pack these
weights, as they are none of the graph's constants inside the loop. It cuts longer sums of them
where the rows, columns and threads suggest, but never one of at most 128 products. So each product
sums slices of at most so many channels, whose results are added up. The weighted sum of a token's
experts is a product of its own, in the order of the experts' numbers.

Dimensions: T tokens, D hidden, E experts, F an expert's feed-forward, k experts of a token, P = T *
k pairs, S slices of a row.
"""

# Names are bound when the source is parsed into ONNX, so types here are tensors, not Python values.
# mypy: ignore-errors
# ruff: noqa: N802

from onnxscript import script
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import TensorType

from export.ops.lowering_cpu import DOMAIN, MICROSOFT

WIDEST_SLICE = 128
"""Most products that are summed at once."""


@script(DOMAIN, default_opset=op)
def SortedPairs(expert_ids, num_experts: int):
    """Sort the pairs of tokens [T, k] and experts by expert, then by token.

    Returns the token of each sorted pair [P]; for each token, its pairs by their place among the
    sorted ones, and by their place in `expert_ids` [P]; the experts that have any; and where the
    pairs of each expert start and end [E].
    """
    start = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    flat = op.Reshape(expert_ids, op.Constant(value_ints=[-1]))
    count = op.Shape(flat)
    keys = flat * count + op.Range(start, op.Squeeze(count), step)
    _, order = op.TopK(keys, count, axis=-1, largest=0, sorted=1)
    tokens = order / op.Shape(expert_ids, start=1, end=2)
    by_token = tokens * count + op.Range(start, op.Squeeze(count), step)
    _, places = op.TopK(by_token, count, axis=-1, largest=0, sorted=1)
    experts = op.Range(start, op.Constant(value_int=num_experts), step)
    is_own = op.Equal(op.Unsqueeze(flat, op.Constant(value_ints=[1])), experts)
    counts = op.ReduceSum(op.Cast(is_own, to=7), op.Constant(value_ints=[0]), keepdims=0)
    ends = op.CumSum(counts, start)
    chosen = op.Reshape(op.NonZero(counts), op.Constant(value_ints=[-1]))
    return tokens, places, op.Gather(order, places), chosen, ends - counts, ends


@script(DOMAIN, default_opset=op)
def SlicedProduct(x, weights, slices):
    """Return x [N, K] by weights [M, K] as a sum over slices of K: [N, M]."""
    zero = op.Constant(value_ints=[0])
    shape = op.Concat(zero, slices, op.Constant(value_ints=[-1]), axis=0)
    parts = MICROSOFT.FusedMatMul(
        op.Reshape(x, shape), op.Reshape(weights, shape), transB=1, transBatchA=1, transBatchB=1
    )  # [S, N, M]
    return op.ReduceSum(parts, zero, keepdims=0)


@script(DOMAIN, default_opset=op)
def OneExpert(x, gate_up, down, hidden_slices, inner_slices):
    """Return what one expert makes of x [N, D]; its matrices are [2F, D] and [D, F]."""
    zero = op.Constant(value_ints=[0])
    doubled = op.Concat(op.Slice(x, zero, op.Constant(value_ints=[1])), x, axis=0)
    gate, up = op.Split(
        DOMAIN.SlicedProduct(doubled, gate_up, hidden_slices), axis=1, num_outputs=2
    )
    inner = op.Gelu(gate, approximate="tanh") * up
    found = DOMAIN.SlicedProduct(inner, down, inner_slices)
    last = op.Constant(value_ints=[9223372036854775807])
    return op.Slice(found, op.Constant(value_ints=[1]), last)


@script(DOMAIN, default_opset=op)
def ExpertLoop(
    x, gate_up, down, expert_ids, weights, num_experts: int, num_hidden_slices: int,
    num_inner_slices: int,
) -> TensorType:  # fmt: skip
    """Return the weighted sum [T, D] of what a token's experts make of it."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    hidden_slices = op.Reshape(op.Constant(value_int=num_hidden_slices), one)
    inner_slices = op.Reshape(op.Constant(value_int=num_inner_slices), one)
    tokens, places, choices, chosen, starts, ends = DOMAIN.SortedPairs(
        expert_ids, num_experts=num_experts
    )
    results = op.SequenceEmpty()
    for i in range(op.Size(chosen)):
        expert = op.Gather(chosen, i)
        begin = op.Unsqueeze(op.Gather(starts, expert), zero)
        end = op.Unsqueeze(op.Gather(ends, expert), zero)
        own = op.Gather(x, op.Slice(tokens, begin, end))
        found = DOMAIN.OneExpert(
            own, op.Gather(gate_up, expert), op.Gather(down, expert), hidden_slices, inner_slices
        )
        results = op.SequenceInsert(results, found)
    pairs = op.Gather(op.ConcatFromSequence(results, axis=0), places)
    shape = op.Concat(op.Shape(expert_ids), op.Constant(value_ints=[-1]), axis=0)
    flat = op.Reshape(weights, op.Constant(value_ints=[-1]))
    sorted_weights = op.Reshape(op.Gather(flat, choices), op.Shape(expert_ids))
    shares = op.Expand(op.Unsqueeze(sorted_weights, one), op.Constant(value_ints=[1, 2, 1]))
    total = op.MatMul(shares, op.Reshape(pairs, shape))  # [T, 2, D], both rows alike
    return op.Gather(total, op.Constant(value_int=0), axis=1)


FUNCTIONS = (SortedPairs, SlicedProduct, OneExpert, ExpertLoop)
"""The op and what it calls."""
