"""The tables of the Dataflow page are what the arithmetic says, and that is the caches' own."""

from pathlib import Path

import pytest

from beam_gemma.dataflow.gpus import GPUS
from beam_gemma.model.graph_tensors import PagedState
from beam_gemma.runtime.capacity import block_bytes
from benchmarks.gpu import machines
from export.graph.signatures import decoder_signature

PAGE = (Path(__file__).parents[2] / "docs/dataflow.md").read_text()
BY_NAME = {size.name: size for size in machines.MODELS}


@pytest.mark.parametrize(
    "made", [machines.fit_table, machines.precision_table, machines.cost_table]
)
def test_the_page_has_the_tables(made):
    assert f"\n{made()}\n" in PAGE, "python -m benchmarks.gpu.machines prints them anew"


@pytest.mark.parametrize(
    "name", ["Gemma 1 7B", "Gemma 2 27B", "Gemma 3 4B", "Gemma 4 E2B", "Gemma 4 31B"]
)
@pytest.mark.parametrize("num_blocks", [1, 64, 1000])
def test_a_cache_is_as_large_as_its_blocks(name, num_blocks):
    config = BY_NAME[name].config
    signature = decoder_signature(config, head="generate", device="cuda", dtype="bfloat16")

    def held(state: PagedState) -> int:
        return min(num_blocks, (state.sliding_window or 10**9) // signature.block_size)

    blocks = sum(held(state) * block_bytes(signature, state) for state in signature.paged_states)
    assert machines.cache_bytes(config, num_blocks * signature.block_size) == blocks


def test_what_fits_is_what_a_job_is_not_refused_for():
    for size in machines.MODELS:
        for gpu in machines.FITTING:
            fits = machines.num_rows(gpu, size)
            weights, table = machines.weight_bytes(size), machines.table_bytes(size)
            assert bool(fits) == gpu.holds(weights, table)
            cache = fits * machines.cache_bytes(size.config, machines.row_tokens(size))
            assert not fits or gpu.holds(weights + cache, table)
    assert machines.num_rows(GPUS["nvidia-l4"], BY_NAME["Gemma 3 12B"]) == 0


def test_weights_in_blocks_by_hand():
    """34 bytes for 32 numbers of the embedding, 18 for 32 of the rest in int4."""
    size = BY_NAME["Gemma 3 270M"]
    shapes = size.tensor_shapes()
    embedding = 262144 * 640
    norms = sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    rest = size.num_parameters - embedding - norms
    assert machines.weight_bytes(size, "int8") == (embedding + rest) * 34 // 32 + 2 * norms
    assert machines.weight_bytes(size, "int4") == (embedding * 34 + rest * 18) // 32 + 2 * norms
    assert machines.weight_bytes(size, "fp16") == 2 * size.num_parameters


def test_a_large_table_lies_in_host_memory():
    """Gemma 4 E2B's: 262,144 rows of 35 layers times 256 numbers of 2 bytes."""
    size = BY_NAME["Gemma 4 E2B"]
    weights, table = machines.weight_bytes(size), machines.table_bytes(size)
    assert table == 262144 * 35 * 256 * 2
    assert GPUS["nvidia-l4"].held(weights, table) == weights - table
    assert GPUS["nvidia-a100-80gb"].held(weights, table) == weights
    assert machines.table_bytes(BY_NAME["Gemma 4 31B"]) == 0


def test_a_million_rows_by_hand():
    rates = machines.Throughput(
        prompt_tokens_per_sec=500.0, completion_tokens_per_sec=100.0, origin="measured"
    )
    estimate = machines.million_rows(250, 50, rates)
    assert estimate.worker_hours == pytest.approx(1e6 / 3600, rel=1e-12)
    assert estimate.cost == pytest.approx(1e6 / 3600 * machines.EXAMPLE_PRICE, rel=1e-12)
