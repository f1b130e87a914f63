"""Experts: the op against transformers' own class, its lowering, and a token's bits in company."""

import numpy as np
import pytest
import torch
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from export.ops import lowering_expert_loop
from export.ops.expert_mlp import expert_mlp
from export.ops.lowering_wide import slices_of
from tests.doubles.op_sessions import op_session

Arrays = dict[str, np.ndarray]
SHAPES = {
    "tiny": (8, 3, 48, 24, 40),
    "sums that ONNX Runtime would cut": (6, 2, 320, 48, 70),
    "one expert for each token": (4, 1, 64, 32, 9),
    "Gemma 4 26B-A4B": (3, 2, 2816, 704, 70),
}
"""Experts, experts of a token, hidden size, feed-forward, tokens."""


def inputs(name: str) -> Arrays:
    """Return random inputs of the op."""
    num_experts, top_k, hidden, wide, num_tokens = SHAPES[name]
    rng = np.random.default_rng(3)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)])
    weights = rng.random(ids.shape).astype(np.float32)
    return {
        "x": normal(num_tokens, hidden),
        "gate_up": normal(num_experts, 2 * wide, hidden) * np.float32(hidden**-0.5),
        "down": normal(num_experts, hidden, wide) * np.float32(wide**-0.5),
        "expert_ids": ids,
        "weights": weights / weights.sum(1, keepdims=True),
    }


def eager(given: Arrays) -> np.ndarray:
    """Return the reference in float64."""
    tensors = [torch.from_numpy(a) for a in given.values()]
    return expert_mlp(*(t.double() if t.is_floating_point() else t for t in tensors)).numpy()


def lowered(name: str, num_threads: int):
    """Return a function that runs the CPU's lowering."""
    given = inputs(name)
    widest = lowering_expert_loop.WIDEST_SLICE
    attributes = {
        "num_experts": len(given["down"]),
        "num_hidden_slices": slices_of(given["gate_up"].shape[2], widest),
        "num_inner_slices": slices_of(given["down"].shape[2], widest),
    }
    functions = lowering_expert_loop.FUNCTIONS
    session = op_session("ExpertLoop", attributes, given, functions, num_threads=num_threads)
    return lambda arrays: session.run(None, arrays)[0]


@pytest.mark.parametrize("name", ["tiny", "one expert for each token"])
def test_reference_equals_transformers(name: str) -> None:
    num_experts, top_k, hidden, wide, _ = SHAPES[name]
    given = inputs(name)
    config = Gemma4TextConfig(
        hidden_size=hidden, num_experts=num_experts, moe_intermediate_size=wide,
        top_k_experts=top_k, enable_moe_block=True, experts_implementation="eager",
    )  # fmt: skip
    experts = Gemma4TextExperts(config).double()
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.from_numpy(given["gate_up"]))
        experts.down_proj.copy_(torch.from_numpy(given["down"]))
        x, ids, weights = (torch.from_numpy(given[n]) for n in ("x", "expert_ids", "weights"))
        expected = experts(x.double(), ids, weights.double()).numpy()
    # float64.
    np.testing.assert_allclose(eager(given), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_lowering_equals_the_reference(name: str, threads: int) -> None:
    given = inputs(name)
    # float32 against float64, values of order 1.
    np.testing.assert_allclose(lowered(name, threads)(given), eager(given), rtol=0, atol=4e-6)


@pytest.mark.parametrize("threads", [1, 2, 24, 96])
@pytest.mark.parametrize("name", SHAPES)
def test_a_token_has_the_same_bits_in_any_company(name: str, threads: int) -> None:
    given = inputs(name)
    expected = lowered(name, 1)(given)
    run = lowered(name, threads)
    for rows in (slice(0, 1), slice(3, 6), slice(0, 9), slice(2, 33), slice(None)):
        own = {n: given[n][rows] for n in ("x", "expert_ids", "weights")}
        np.testing.assert_array_equal(run(given | own), expected[rows])
