"""The ops over whole sequences: the reference against masks written out, the lowering against it.

A sequence's result must be the same bits in any company, which tests here show for the ops alone.
"""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.ops.lowering_packed import FUNCTIONS
from export.ops.reference import NO_WINDOW, packed_attention, packed_sum
from tests.doubles.op_sessions import session_of
from tests.doubles.packed_cases import PackedCase

CASES = {
    "two-sided": PackedCase(),
    "two-sided window": PackedCase(back=40, ahead=40),
    "causal": PackedCase(ahead=0),
    "causal window": PackedCase(back=29, ahead=0),
    "own token alone": PackedCase(back=0, ahead=0),
    "ahead alone": PackedCase(back=0),
    "uneven": PackedCase(back=7, ahead=90),
    "one query head for each key head": PackedCase(num_heads=4, num_kv_heads=4, head_dim=16),
    "grouped queries": PackedCase(num_heads=8, num_kv_heads=4, head_dim=128, back=50, ahead=50),
    "softcap": PackedCase(softcap=0.7, back=50, ahead=50, head_dim=64),
    "long": PackedCase(lengths=(700, 3, 900), back=256, ahead=256),
    "one token": PackedCase(lengths=(1,), num_heads=1, head_dim=16),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_formula(name: str, threads: int) -> None:
    case = CASES[name]
    inputs = case.inputs()
    [output] = case.session(threads).run(None, inputs)
    # float32 against float64, values of order 1.
    np.testing.assert_allclose(output, case.eager(inputs), rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("back", "ahead", "reach"),
    [
        (NO_WINDOW, NO_WINDOW, ["1111", "1111", "1111", "1111"]),
        (1, 1, ["1100", "1110", "0111", "0011"]),
        (NO_WINDOW, 0, ["1000", "1100", "1110", "1111"]),
        (1, 0, ["1000", "1100", "0110", "0011"]),
        (0, 2, ["1110", "0111", "0011", "0001"]),
    ],
)
def test_reach_is_the_matrix(back: int, ahead: int, reach: list[str]) -> None:
    """With zero queries a token gets the mean of the values it reaches."""
    zeros = torch.zeros(5, 4)
    values = torch.eye(5, 4)  # the last row is another sequence
    cu_seqlens = torch.tensor([0, 4, 5])
    output = packed_attention(zeros, zeros, values, cu_seqlens, 1, 1, back, ahead, 1.0, 0.0)
    expected = np.array([[int(c) for c in row] for row in reach], np.float32)
    np.testing.assert_allclose(output[:4], expected / expected.sum(1, keepdims=True), atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("name", CASES)
def test_a_sequence_attends_alike_in_any_company(name: str, threads: int) -> None:
    case = CASES[name]
    inputs = case.inputs()
    session = case.session(threads)
    [together] = session.run(None, inputs)
    ends = inputs["cu_seqlens"]
    for start, end in itertools.pairwise(ends):
        own = {n: inputs[n][start:end] for n in ("query", "key", "value")}
        [alone] = session.run(None, own | {"cu_seqlens": np.array([0, end - start], np.int32)})
        np.testing.assert_array_equal(alone, together[start:end])


@pytest.mark.parametrize("back", [40, NO_WINDOW])
def test_nothing_of_another_sequence_is_reached(back: int) -> None:
    case = PackedCase(back=back, ahead=back)
    inputs = case.inputs()
    session = case.session(1)
    [clean] = session.run(None, inputs)
    start, end = 43, 343  # the fourth sequence
    for name in ("query", "key", "value"):
        inputs[name][start:end] = np.nan
    [output] = session.run(None, inputs)
    assert np.isnan(output[start:end]).all()
    others = np.r_[0:start, end : len(output)]
    np.testing.assert_array_equal(output[others], clean[others])


def sum_session(
    inputs: dict[str, np.ndarray], longest: int, num_threads: int
) -> onnxruntime.InferenceSession:
    """Return `packed_sum` as the exporter lowers it: chunks of 64 until a sequence is one."""
    nodes, names = [], [*inputs]
    while longest > 1:
        outputs = [f"{name}_" for name in names]
        nodes.append(onnx.helper.make_node("ChunkSums", names, outputs, domain="beam_gemma"))
        names, longest = outputs, -(-longest // 64)
    return session_of(nodes, inputs, FUNCTIONS, num_threads=num_threads, outputs=names[:1])


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("lengths", [(5, 1, 64, 65, 3), (1,), (700, 4097, 2, 5000)])
def test_sums_are_alike_in_any_company(lengths: tuple[int, ...], threads: int) -> None:
    x = np.random.default_rng(0).standard_normal((sum(lengths), 48), np.float32)
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    inputs = {"x": x, "cu_seqlens": cu_seqlens}
    session = sum_session(inputs, max(64, *lengths), threads)
    [sums] = session.run(None, inputs)
    double, ends = torch.from_numpy(x).double(), torch.from_numpy(cu_seqlens)
    expected = packed_sum(double, ends, max(lengths)).numpy()
    # float32 sums of up to 5,000 terms of order 1.
    np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-4)
    for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        own = {"x": x[start:end], "cu_seqlens": np.array([0, end - start], np.int32)}
        [alone] = session.run(None, own)
        np.testing.assert_array_equal(alone[0], sums[b])
