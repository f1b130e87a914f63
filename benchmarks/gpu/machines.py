"""Calculates which GPU has memory for which model, and the cost of a million rows.

    python -m benchmarks.gpu.machines

Prints the tables of `docs/dataflow.md`. Weights take two bytes per parameter, or the size of their
blocks in int8 and int4 (`export.graph.quantize`). A row's cache holds a key and a value of two
bytes per number for each layer with a cache, key-value head and token; a layer with a window keeps
only the window's tokens. Weights and caches together stay within the share of memory allowed for
weights; a large table of per-layer embeddings lies in host memory.
"""

import math

from beam_gemma.dataflow.gpus import GPUS, WEIGHTS_FRACTION, Gpu, smallest_gpu
from beam_gemma.jobs.estimate import Estimate, Means, Sample, Throughput
from beam_gemma.jobs.profiles import profiles
from beam_gemma.model.config import GemmaConfig
from benchmarks.table import table
from export.checkpoints.newer_sizes import NEWER_SIZES
from export.checkpoints.released_sizes import SIZES, Size
from export.checkpoints.tensors import TABLE
from export.graph.quantize import BITS, CodedMatrix, keeps_numbers

BYTES = 2
"""Bytes per number in bfloat16 or float16."""
ROW_TOKENS = 2048
"""Tokens of a prompt with its completion."""
EXAMPLE_PRICE = 0.10
"""Example price in US dollars per worker hour; not a real offer."""
WORK = {"generate": (500, 100), "score": (200, 0), "embed": (200, 0)}
"""Computed prompt tokens and completion tokens of an example row, by head."""
MODELS = (*SIZES, *NEWER_SIZES)
FITTING = [gpu for gpu in GPUS.values() if gpu.has_bfloat16]


def weight_bytes(size: Size, precision: str = "bf16") -> int:
    """Return the bytes of a model's weights."""
    return sum(
        num_bytes(name, shape, BITS.get(precision)) for name, shape in size.tensor_shapes().items()
    )


def num_bytes(name: str, shape: tuple[int, ...], bits: int | None) -> int:
    """Return the bytes of a tensor; only matrices are quantized, and not all of them."""
    if bits is None or len(shape) == 1 or keeps_numbers(name):
        return BYTES * math.prod(shape)
    matrix = CodedMatrix.of(name, bits, shape)
    blocks = math.prod(matrix.shape_of(matrix.scales))
    return math.prod(matrix.shape_of(matrix.codes)) + BYTES * blocks


def table_bytes(size: Size, precision: str = "bf16") -> int:
    """Return the bytes of a model's table of per-layer embeddings; 0 for a model without one."""
    shape = size.tensor_shapes().get(TABLE)
    return 0 if shape is None else num_bytes(TABLE, shape, BITS.get(precision))


def cache_bytes(config: GemmaConfig, num_tokens: int) -> int:
    """Return the bytes of a sequence's keys and values."""
    total = 0
    for group in config.groups:
        per_token = 2 * config.num_kv_heads_of(group) * config.head_dim_of(group) * BYTES
        cells = min(num_tokens, config.window(group) or num_tokens)
        total += len(config.cached_layers_of(group)) * per_token * cells
    return total


def num_rows(gpu: Gpu, size: Size) -> int:
    """Return the number of sequences that fit beside a model's weights; 0 if these do not fit."""
    weights = weight_bytes(size), table_bytes(size)
    if not gpu.holds(*weights):
        return 0
    left = gpu.memory_gib * 2**30 * WEIGHTS_FRACTION - gpu.held(*weights)
    return int(left // cache_bytes(size.config, row_tokens(size)))


def row_tokens(size: Size) -> int:
    """Return the assumed length of a row in tokens: `ROW_TOKENS` or the model's maximum."""
    return min(ROW_TOKENS, size.config.max_position_embeddings)


def fit_table() -> str:
    """Return the table of models and GPUs."""
    header = ["model", "weights, GB", "cache of a row, MB"]
    header += [f"{gpu.name}, {gpu.memory_gib} GiB" for gpu in FITTING]
    rows = []
    for size in MODELS:
        if size.config.use_bidirectional_attention:
            continue  # encoders keep no cache and run on the CPU
        fits = [num_rows(gpu, size) for gpu in FITTING]
        cells = [f"{n:,}" if n else "no" for n in fits]
        cache = cache_bytes(size.config, row_tokens(size))
        rows.append([size.name, f"{weight_bytes(size) / 1e9:.1f}", f"{cache / 1e6:.1f}", *cells])
    return table(header, rows)


def precision_table() -> str:
    """Return a table of each precision's weight size and the smallest GPU that holds it."""
    rows = []
    for size in MODELS:
        if size.config.use_bidirectional_attention:
            continue
        cells = []
        for precision in ("bf16", "fp16", *BITS):
            weights = weight_bytes(size, precision)
            smallest = smallest_gpu(precision, weights, table_bytes(size, precision))
            assert smallest is not None
            cells.append(f"{weights / 1e9:.1f}, {smallest.name.removeprefix('nvidia-')}")
        rows.append([size.name, *cells])
    return table(["model", "bf16", "fp16", *BITS], rows)


def cost_table() -> str:
    """Return a table of the cost of a million rows for each measured profile."""
    header = ["model", "task", "machine", "prompt tok/s", "completion tok/s", "tokens of a row",
              "worker hours, 1M rows", f"at {EXAMPLE_PRICE:.2f} USD an hour"]  # fmt: skip
    rows = []
    for profile in profiles():
        prompt, completion = WORK[profile.head]
        rates = (profile.prompt_tokens_per_sec, profile.completion_tokens_per_sec)
        throughput = Throughput(
            prompt_tokens_per_sec=rates[0],
            completion_tokens_per_sec=rates[1],
            origin=profile.origin,
        )
        estimate = million_rows(prompt, completion, throughput)
        rows.append([
            profile.model, profile.head, profile.machine,
            *("" if rate is None else f"{rate:g}" for rate in rates),
            f"{prompt} + {completion}", f"{estimate.worker_hours:,.0f}", f"{estimate.cost:,.0f}",
        ])  # fmt: skip
    return table(header, rows)


def million_rows(prompt: int, completion: int, throughput: Throughput) -> Estimate:
    """Return the estimate for a million rows of the same length."""
    means = Means(
        throughput=throughput,
        num_workers=None,
        worker_price=EXAMPLE_PRICE,
        completion_tokens=float(completion),
    )
    sample = Sample(lengths=[prompt], sequences=[((0,) * prompt,)])
    return Estimate(sample=sample, means=means, num_rows=1_000_000, is_counted=True)


def main() -> None:
    """Print all tables."""
    print(fit_table(), precision_table(), cost_table(), sep="\n\n")


if __name__ == "__main__":
    main()
