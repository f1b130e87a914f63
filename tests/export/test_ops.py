"""The custom ops: the eager reference against masks written out, each lowering against it."""

import numpy as np
import onnxruntime
import pytest
import torch

from export.ops import lowering_cpu, lowering_cuda
from export.ops.reference import NO_WINDOW, ragged_attention, rms_norm
from tests.doubles.attention_cases import BLOCK, CASES, Case
from tests.doubles.op_sessions import op_session


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_cpu_lowering_equals_the_formula(name: str, threads: int) -> None:
    case = CASES[name]
    inputs = case.inputs()
    output, key_cache, value_cache = run_lowering(case, inputs, threads)
    expected = case.eager(inputs)
    # float32 against float64, values of order 1.
    np.testing.assert_allclose(output, expected[0], rtol=0, atol=4e-6)
    np.testing.assert_array_equal(key_cache, expected[1].astype(np.float32))
    np.testing.assert_array_equal(value_cache, expected[2].astype(np.float32))


def test_negative_slots_are_not_written() -> None:
    case = Case()
    inputs = case.inputs()
    inputs["slot_mapping"][2] = -1
    _, key_cache, value_cache = run_lowering(case, inputs, threads=1)
    _, expected_keys, expected_values = case.eager(inputs)
    # Block 0 belongs to nobody: the lowering may leave zeros there.
    np.testing.assert_array_equal(key_cache[:, 1:], expected_keys[:, 1:].astype(np.float32))
    np.testing.assert_array_equal(value_cache[:, 1:], expected_values[:, 1:].astype(np.float32))
    assert not np.array_equal(inputs["key_cache"], key_cache)


def test_what_is_not_written_poisons_nobody() -> None:
    """Every table is padded with block 0, so a skipped NaN must not end up there."""
    case = Case()
    inputs = case.inputs()
    inputs["slot_mapping"][2] = -1
    inputs["key"][2] = inputs["value"][2] = np.nan
    output, key_cache, value_cache = run_lowering(case, inputs, threads=1)
    for array in (output, key_cache, value_cache):
        assert np.isfinite(array).all()


@pytest.mark.parametrize(
    ("window", "last_keys", "reach"),
    [
        (NO_WINDOW, [0, 1, 2, 3], ["1000", "1100", "1110", "1111"]),
        (2, [0, 1, 2, 3], ["1000", "1100", "0110", "0011"]),
        (NO_WINDOW, [0, 2, 2, 3], ["1000", "1110", "1110", "1111"]),
        (2, [0, 3, 3, 3], ["1000", "1111", "0111", "0011"]),
    ],
)
def test_reach_is_the_matrix(window: int, last_keys: list[int], reach: list[str]) -> None:
    """With zero queries a token gets the mean of the values it reaches."""
    values = np.eye(4, dtype=np.float32)
    zeros = torch.zeros(4, 4)
    output, _, _ = ragged_attention(
        zeros, zeros, torch.from_numpy(values), torch.zeros(1, 1, BLOCK, 4),
        torch.zeros(1, 1, BLOCK, 4), torch.tensor([0, 4]), torch.tensor([0]), torch.tensor([[0]]),
        torch.arange(4), torch.tensor([0]), torch.arange(4) - window + 1, torch.tensor(last_keys),
        1, 1, window, 1.0, 0.0, "cpu",
    )  # fmt: skip
    expected = np.array([[int(c) for c in row] for row in reach], np.float32)
    np.testing.assert_allclose(output, expected / expected.sum(1, keepdims=True), atol=1e-7)


def test_a_slot_out_of_reach_may_hold_anything() -> None:
    case = Case(new=(3,), past=(2,), starts=(0,))
    inputs = case.inputs()
    clean = case.eager(inputs)[0]
    last_block = inputs["block_table"][0, 0]
    inputs["key_cache"][:, last_block, 5:] = 1e30
    inputs["value_cache"][:, last_block, 5:] = -1e30
    np.testing.assert_array_equal(case.eager(inputs)[0], clean)
    # float32; the huge values meet a weight of exactly zero.
    np.testing.assert_allclose(run_lowering(case, inputs, 1)[0], clean, rtol=0, atol=4e-6)


def test_cuda_layout_holds_the_same_numbers() -> None:
    case = Case(num_heads=8, num_kv_heads=4, head_dim=256, window=30)
    inputs = case.inputs()
    output, keys, _ = case.eager(inputs)
    tensors = {name: torch.from_numpy(a) for name, a in inputs.items()}
    for name in ("key_cache", "value_cache"):
        tensors[name] = tensors[name].permute(1, 2, 0, 3).contiguous()
    floats = [t.double() if t.is_floating_point() else t for t in tensors.values()]
    cuda = ragged_attention(*floats, 8, 4, 30, 256**-0.5, 0.0, "cuda")
    np.testing.assert_array_equal(cuda[0].numpy(), output)
    assert cuda[1].shape == (64, BLOCK, 4, 256)
    slot = inputs["slot_mapping"][0]
    token = keys[:, slot // BLOCK, slot % BLOCK].reshape(4, 256)
    np.testing.assert_array_equal(cuda[1][slot // BLOCK, slot % BLOCK].numpy(), token)


def test_cuda_lowering_is_one_paged_attention_node() -> None:
    """Input positions of `com.microsoft::PagedAttention` 1, by ONNX Runtime's own schema."""
    body = lowering_cuda.RaggedAttention.to_function_proto()
    [node] = [n for n in body.node if n.op_type == "PagedAttention"]
    assert node.domain == "com.microsoft"
    schema = next(
        s
        for s in onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema()
        if s.name == "PagedAttention"
    )
    bound = {i.name: given for i, given in zip(schema.inputs, node.input, strict=False) if given}
    assert bound == {
        "query": "query",
        "key": "key",
        "value": "value",
        "key_cache": "key_cache",
        "value_cache": "value_cache",
        "cumulative_sequence_length": "cu_seqlens",
        "past_seqlens": "past_seqlens",
        "block_table": "block_table",
        "slot_mapping": "slot_mapping",
        "attention_metadata": "attention_metadata",
    }
    assert {a.name for a in node.attribute} <= set(schema.attributes)


def test_rms_norm_equals_the_formula() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((5, 48)), rng.standard_normal(48)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
    eager = rms_norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-6, torch.float64).numpy()
    np.testing.assert_allclose(eager, expected, rtol=0, atol=1e-12)
    feeds = {"x": x.astype(np.float32), "weight": weight.astype(np.float32)}
    session = op_session("RmsNorm", {"epsilon": 1e-6}, feeds, [lowering_cpu.RmsNorm])
    [lowered] = session.run(None, feeds)
    # float32.
    np.testing.assert_allclose(lowered, expected, rtol=0, atol=2e-6)


def run_lowering(case: Case, inputs: dict[str, np.ndarray], threads: int) -> list[np.ndarray]:
    """Run the ONNX function of the op in ONNX Runtime."""
    return case.lowered("RaggedAttention", num_threads=threads)(inputs)
