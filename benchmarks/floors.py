"""Lower bounds on the time of work on a card, from operations and bytes counted from shapes.

A decode step reads every matrix weight once, for any number of rows, and the keys and values in
reach of each row; its floor is bytes divided by the card's copy rate. Prompts and texts to embed
are products of matrices; their floor is operations divided by the rate of one large product.
Activations, norms, block tables, padding and repeated work are left out, which makes floors lower,
never higher.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from beam_gemma.model.config import GemmaConfig
from benchmarks.gpu import machines
from benchmarks.rate import Operations, pair_operations

WEIGHT_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8.5, "int4": 4.5}
"""Bits per weight by precision; if quantized, including a 16-bit scale per 32 weights."""
CACHE_BYTES = {"fp32": 4}
"""Bytes per number in a cache by precision; 2 for all others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Measured rates of a card."""

    operations_per_sec: float
    """Operations per second of one large matrix product in the model's precision."""
    bytes_per_sec: float
    """Bytes read plus bytes written per second in a copy within the card's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """The least possible time of some work, in seconds."""

    prefill: float
    """Time of the prompts, from operations."""
    decode: float
    """Time of the decode steps, from bytes."""

    @property
    def seconds(self) -> float:
        """Sum of prefill and decode."""
        return self.prefill + self.decode


def weight_bytes(config: GemmaConfig, precision: str) -> int:
    """Return the bytes of all matrices that a decode step reads."""
    operations = Operations.of(config)
    return int((operations.layers + operations.head) // 2 * WEIGHT_BITS[precision] / 8)


def cache_bytes(config: GemmaConfig, num_tokens: int, precision: str) -> int:
    """Return the bytes of keys and values that a token reads, including its own."""
    return (
        machines.cache_bytes(config, num_tokens) // machines.BYTES * CACHE_BYTES.get(precision, 2)
    )


def attention_operations(config: GemmaConfig, start: int, end: int) -> int:
    """Return the attention operations of a row's positions from `start` to `end`, exclusive."""
    pairs = 0
    for kind in config.layer_types:
        window = config.window(kind)
        pairs += _sum_of_reach(end, window) - _sum_of_reach(start, window)
    return pair_operations(config) * pairs


def num_decode_steps(new_tokens: Sequence[int], slots: int) -> int:
    """Return the fewest decode steps; the prompt's step chooses the first token of each row."""
    steps = [new - 1 for new in new_tokens]
    return max(*steps, -(-sum(steps) // slots), 0)


def generate_floor(
    config: GemmaConfig,
    rows: Sequence[tuple[int, int]],
    *,
    slots: int,
    precision: str,
    rates: Rates,
) -> Floor:
    """Return the floor of completing rows.

    Args:
        config: The model's architecture.
        rows: Numbers of prompt tokens and of new tokens of each row.
        slots: Most rows of a decode step.
        precision: Precision of the weights.
        rates: Measured rates of the card.
    """
    per_token = Operations.of(config)
    operations = sum(
        prompt * per_token.layers + per_token.head + attention_operations(config, 0, prompt)
        for prompt, _ in rows
    )
    num_bytes = num_decode_steps([new for _, new in rows], slots) * weight_bytes(config, precision)
    written = cache_bytes(config, 1, precision)
    for prompt, new in rows:
        contexts = range(prompt + 1, prompt + new)
        num_bytes += sum(cache_bytes(config, n, precision) + written for n in contexts)
    return Floor(
        prefill=operations / rates.operations_per_sec, decode=num_bytes / rates.bytes_per_sec
    )


def classify_operations(config: GemmaConfig, shared: int, own: Iterable[int], labels: int) -> int:
    """Return the operations of scoring single-token labels after prompts with a shared start.

    The shared start is computed once; a label's logit is a product with one row of the head.
    """
    per_token = Operations.of(config)
    total = shared * per_token.layers + attention_operations(config, 0, shared)
    for length in own:
        total += length * per_token.layers
        total += attention_operations(config, shared, shared + length)
        total += 2 * config.hidden_size * labels
    return total


def _sum_of_reach(num_tokens: int, window: int | None) -> int:
    """Return the total number of keys that the queries of a row's first tokens reach."""
    near = num_tokens if window is None else min(num_tokens, window)
    return near * (near + 1) // 2 + (num_tokens - near) * (window or 0)
