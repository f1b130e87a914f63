"""The least that work must cost on a card: operations and bytes, counted from shapes alone.

A decode step reads every weight of the matrices once, whatever the number of its rows, and of each
row the keys and values in reach; so its floor is bytes over the rate at which the card copies. A
prompt, or a text to embed, is products of matrices; so its floor is operations over the rate of one
large product. What is left out makes floors lower, never higher: activations, norms, block tables,
padding, and everything that is done twice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from beam_gemma.model.config import GemmaConfig
from benchmarks.gpu import machines
from benchmarks.rate import Operations

WEIGHT_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8.5, "int4": 4.5}
"""Of a weight by precision; with a scale of 16 bits for each 32 where it is quantized."""
CACHE_BYTES = {"fp32": 4}
"""Of a number in a cache; two where nothing else is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a card was measured to do."""

    operations_per_sec: float
    """Of one large product of matrices, in the precision that the model computes in."""
    bytes_per_sec: float
    """Read and written, of a copy within the card."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """The least time that some work takes, in seconds."""

    prefill: float
    """Set by operations."""
    decode: float
    """Set by bytes."""

    @property
    def seconds(self) -> float:
        """Both, one after the other."""
        return self.prefill + self.decode


def weight_bytes(config: GemmaConfig, precision: str) -> int:
    """Return the bytes of all matrices that a decode step reads."""
    operations = Operations.of(config)
    return int((operations.layers + operations.head) // 2 * WEIGHT_BITS[precision] / 8)


def cache_bytes(config: GemmaConfig, num_tokens: int, precision: str) -> int:
    """Return the bytes of the keys and values that a token reads, itself included."""
    return (
        machines.cache_bytes(config, num_tokens) // machines.BYTES * CACHE_BYTES.get(precision, 2)
    )


def attention_operations(config: GemmaConfig, start: int, end: int) -> int:
    """Return the operations of queries and keys, weights and values, for positions of one row."""
    pairs = 0
    for kind in config.layer_types:
        window = config.window(kind)
        pairs += _sum_of_reach(end, window) - _sum_of_reach(start, window)
    return 4 * config.num_attention_heads * config.head_dim * pairs


def num_decode_steps(new_tokens: Sequence[int], slots: int) -> int:
    """Return the fewest decode steps; the first token of each row comes of its prompt's step."""
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
        config: Of the model.
        rows: Tokens of each prompt, and how many new ones.
        slots: Rows of a decode step at most.
        precision: Of the weights.
        rates: Of the card.
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
    """Return the operations of scoring labels of one token behind prompts with a shared start.

    What is shared is computed once; a label's logit is a product with one row of the head.
    """
    per_token = Operations.of(config)
    total = shared * per_token.layers + attention_operations(config, 0, shared)
    for length in own:
        total += length * per_token.layers
        total += attention_operations(config, shared, shared + length)
        total += 2 * config.hidden_size * labels
    return total


def _sum_of_reach(num_tokens: int, window: int | None) -> int:
    """Return how many keys the queries at the first positions of a row reach, all together."""
    near = num_tokens if window is None else min(num_tokens, window)
    return near * (near + 1) // 2 + (num_tokens - near) * (window or 0)
