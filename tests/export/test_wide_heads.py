"""Heads of more than 256 channels on the CPU: formula, and a row's bits in any company.

A product sums at most 256 channels at once, so heads are cut into slices (`lowering_wide`).
"""

import itertools

import numpy as np
import pytest

from export.ops.lowering_wide import slices_of
from tests.doubles.attention_cases import Case
from tests.doubles.packed_cases import PackedCase

CASES = {
    "grouped queries": Case(num_heads=8, num_kv_heads=2, head_dim=512),
    "one query head for each key head": Case(num_heads=2, num_kv_heads=2, head_dim=512),
    "one key head": Case(num_heads=4, num_kv_heads=1, head_dim=512),
    "window": Case(num_heads=4, num_kv_heads=2, head_dim=512, window=30),
    "slices of 160": Case(head_dim=320),
    "three slices": Case(num_heads=3, num_kv_heads=3, head_dim=576),
    "table without its first blocks": Case(
        head_dim=512, window=60, past=(0, 300, 200), starts=(0, 128, 0)
    ),
    "one token alone": Case(new=(1,), past=(77,), starts=(0,), num_heads=2, num_kv_heads=2,
                            head_dim=512),
    "long chunks": Case(new=(300, 2), past=(0, 0), starts=(0, 0), head_dim=512),
}  # fmt: skip
PACKED = {
    "two-sided": PackedCase(head_dim=512),
    "causal window": PackedCase(num_heads=4, num_kv_heads=2, head_dim=512, back=29, ahead=0),
    "one query head for each key head": PackedCase(num_heads=2, num_kv_heads=2, head_dim=512),
    "slices of 160": PackedCase(head_dim=320, back=50, ahead=50),
    "long": PackedCase(lengths=(700, 3, 330), head_dim=512, back=256, ahead=256),
}
THREADS = [2, 16]
"""Numbers of threads of a sequence alone, compared with all sequences together on one."""


def test_heads_are_cut_evenly_and_as_rarely_as_may_be() -> None:
    assert {dim: slices_of(dim) for dim in (64, 256, 258, 320, 512, 514, 576, 768)} == {
        64: 1, 256: 1, 258: 2, 320: 2, 512: 2, 514: 257, 576: 3, 768: 3,
    }  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_ragged_attention_equals_the_formula(name: str, threads: int) -> None:
    case = CASES[name]
    inputs = case.inputs()
    output, keys, values = case.lowered("RaggedAttention", num_threads=threads)(inputs)
    expected = case.eager(inputs)
    # float32 against float64, values of order 1.
    np.testing.assert_allclose(output, expected[0], rtol=0, atol=4e-6)
    np.testing.assert_array_equal(keys, expected[1].astype(np.float32))
    np.testing.assert_array_equal(values, expected[2].astype(np.float32))


@pytest.mark.parametrize("name", CASES)
def test_cached_attention_has_the_bits_of_the_layer_that_wrote(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    output, keys, values = case.lowered("RaggedAttention")(inputs)
    inputs |= {"key_cache": keys, "value_cache": values}
    np.testing.assert_array_equal(case.lowered("CachedAttention")(inputs)[0], output)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("name", ["grouped queries", "three slices", "long chunks", "window"])
def test_chunks_and_company_change_no_bit(name: str, chunk: int, threads: int) -> None:
    """Each sequence alone, in chunks, with a table that is wider than it need be."""
    case = CASES[name]
    inputs = case.written()
    [together] = case.lowered("CachedAttention")(inputs)
    lowered = case.lowered("CachedAttention", num_threads=threads)
    ends = inputs["cu_seqlens"]
    for b, (start, end) in enumerate(itertools.pairwise(ends)):
        own = {n: inputs[n][b : b + 1] for n in ("block_table", "context_starts")}
        own["block_table"] = np.pad(own["block_table"], [(0, 0), (0, 4 * chunk)])
        for first in {start, start + (end - start) // 2 // chunk * chunk}:
            rows = slice(first, min(first + chunk, end))
            own |= {n: inputs[n][rows] for n in ("query", "first_keys", "last_keys")}
            own["cu_seqlens"] = np.array([0, rows.stop - rows.start], np.int32)
            np.testing.assert_array_equal(lowered(inputs | own)[0], together[rows])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", PACKED)
def test_packed_attention_equals_the_formula(name: str, threads: int) -> None:
    case = PACKED[name]
    inputs = case.inputs()
    [output] = case.session(threads).run(None, inputs)
    # float32 against float64, values of order 1.
    np.testing.assert_allclose(output, case.eager(inputs), rtol=0, atol=4e-6)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", PACKED)
def test_a_packed_sequence_attends_alike_in_any_company(name: str, threads: int) -> None:
    case = PACKED[name]
    inputs = case.inputs()
    [together] = case.session(1).run(None, inputs)
    session = case.session(threads)
    for start, end in itertools.pairwise(inputs["cu_seqlens"]):
        own = {n: inputs[n][start:end] for n in ("query", "key", "value")}
        [alone] = session.run(None, own | {"cu_seqlens": np.array([0, end - start], np.int32)})
        np.testing.assert_array_equal(alone, together[start:end])
