"""Attention over caches that another layer has written: formula, lowering, and company."""

import numpy as np
import pytest
import torch

from export.ops import lowering_cuda
from export.ops.cached_attention import cached_attention
from tests.doubles.attention_cases import CASES, Case


def formula(case: Case, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the attention of each token, one query head after the other, in float64."""
    groups = case.num_heads // case.num_kv_heads
    query = inputs["query"].astype(float).reshape(-1, case.num_heads, case.head_dim)
    output = np.zeros_like(query)
    for b, (start, end) in enumerate(zip(*both_ends(inputs["cu_seqlens"]), strict=True)):
        keys, values = (
            inputs[cache][:, inputs["block_table"][b]]
            .astype(float)
            .reshape(case.num_kv_heads, -1, case.head_dim)
            for cache in ("key_cache", "value_cache")
        )
        for t in range(start, end):
            positions = inputs["context_starts"][b] + np.arange(keys.shape[1])
            reached = (positions >= inputs["first_keys"][t]) & (positions <= inputs["last_keys"][t])
            for n in range(case.num_heads):
                scores = keys[n // groups, reached] @ query[t, n] * case.head_dim**-0.5
                if case.softcap:
                    scores = np.tanh(scores / case.softcap) * case.softcap
                weights = np.exp(scores - scores.max())
                output[t, n] = weights @ values[n // groups, reached] / weights.sum()
    return output.reshape(inputs["query"].shape)


def both_ends(cu_seqlens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the start and the end of each sequence."""
    return cu_seqlens[:-1], cu_seqlens[1:]


@pytest.mark.parametrize("name", CASES)
def test_eager_reference_equals_the_formula(name: str) -> None:
    case = CASES[name]
    inputs = case.written()
    tensors = {n: torch.from_numpy(a) for n, a in inputs.items()}
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    del tensors["value"]
    tensors["slot_mapping"] = torch.full_like(tensors["slot_mapping"], -1)
    heads, scale = (case.num_heads, case.num_kv_heads), case.head_dim**-0.5
    expected = formula(case, inputs)
    for layout in ("cpu", "cuda"):
        if layout == "cuda":
            for cache in ("key_cache", "value_cache"):
                tensors[cache] = tensors[cache].permute(1, 2, 0, 3).contiguous()
        output = cached_attention(
            *tensors.values(), *heads, case.window, scale, case.softcap, layout
        )
        # float64.
        np.testing.assert_allclose(output.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_cpu_lowering_equals_the_formula(name: str, threads: int) -> None:
    case = CASES[name]
    inputs = case.written()
    [output] = case.lowered("CachedAttention", num_threads=threads)(inputs)
    # float32 against float64, values of order 1.
    np.testing.assert_allclose(output, formula(case, inputs), rtol=0, atol=4e-6)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_token_attends_alike_alone_and_in_company(name: str, threads: int) -> None:
    """Alone, each token is a sequence of its own, as where only some rows of a step go on."""
    case = CASES[name]
    inputs = case.written()
    [output] = case.lowered("CachedAttention")(inputs)
    alone = case.lowered("CachedAttention", num_threads=threads)
    starts, ends = both_ends(inputs["cu_seqlens"])
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for t in {start, (start + end) // 2, end - 1}:
            own = {n: inputs[n][t : t + 1] for n in ("query", "first_keys", "last_keys")}
            own |= {n: inputs[n][b : b + 1] for n in ("block_table", "context_starts")}
            own["cu_seqlens"] = np.array([0, 1], np.int32)
            np.testing.assert_array_equal(alone(inputs | own)[0][0], output[t])


@pytest.mark.parametrize("rows", [(4, 5, 42), (0, 3, 4, 5, 6, 20, 41, 42), (42, 5)])
def test_chosen_tokens_attend_as_sequences_of_their_own(rows: tuple[int, ...]) -> None:
    case = Case(num_heads=8, num_kv_heads=4, head_dim=64)
    inputs = case.written()
    chosen = np.array(rows)
    owners = np.repeat(np.arange(3), case.new)[chosen]
    own = {n: inputs[n][chosen] for n in ("query", "first_keys", "last_keys")}
    own |= {n: inputs[n][owners] for n in ("block_table", "context_starts")}
    own["cu_seqlens"] = np.arange(len(rows) + 1, dtype=np.int32)
    lowered = case.lowered("CachedAttention", num_threads=2)
    np.testing.assert_array_equal(lowered(inputs | own)[0], lowered(inputs)[0][chosen])


@pytest.mark.parametrize("name", CASES)
def test_it_attends_as_the_layer_that_wrote_the_caches(name: str) -> None:
    """Bit for bit: the two ops share all but the writes."""
    case = CASES[name]
    inputs = case.inputs()
    output, keys, values = case.lowered("RaggedAttention")(inputs)
    inputs |= {"key_cache": keys, "value_cache": values}
    np.testing.assert_array_equal(case.lowered("CachedAttention")(inputs)[0], output)


def test_what_other_sequences_hold_reaches_nobody() -> None:
    case = Case(num_heads=8, num_kv_heads=4)
    inputs = case.written()
    lowered = case.lowered("CachedAttention")
    [clean] = lowered(inputs)
    for cache in ("key_cache", "value_cache"):
        inputs[cache][:, inputs["block_table"][1]] = np.nan
        inputs[cache][:, 0] = 0.0  # the block that pads tables
    [output] = lowered(inputs)
    assert np.isnan(output[5]).all()
    others = np.r_[0:5, 6:43]
    np.testing.assert_array_equal(output[others], clean[others])


def test_cuda_lowering_takes_the_caches_as_they_are() -> None:
    """`PagedAttention` gets `key` for the values too; all slots are -1, so it writes neither."""
    body = lowering_cuda.CachedAttention.to_function_proto()
    [node] = [n for n in body.node if n.op_type == "PagedAttention"]
    assert list(node.input[:8]) == [
        "query", "key", "key", "key_cache", "value_cache", "cu_seqlens", "past_seqlens",
        "block_table",
    ]  # fmt: skip
    assert (node.input[10], node.input[16]) == ("slot_mapping", "attention_metadata")
    [is_causal] = [a for a in node.attribute if a.name == "is_causal"]
    assert is_causal.ref_attr_name == "is_causal"
    assert len(node.output) == 1
