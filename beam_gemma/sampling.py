"""Choosing the next token of one row from its logits.

A draw depends on the row alone: its one uniform number comes from a counter-based generator, keyed
by (seed, row key), whose counter is the position. So neither the other rows of a batch, nor their
order, nor a retry can change it.

Dimensions: C candidates, K most likely ones among them.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from beam_gemma.errors import OptionsError

FIRST_NUCLEUS = 1024
"""Candidates sorted at first when `top_p` alone cuts the distribution; most nuclei are smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose each next token, and when to stop."""

    max_tokens: int = 256
    """Longest completion, in tokens."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw among this many of the most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens that have this much probability together."""
    seed: int = 0
    """Of every draw, together with the row's key and the position."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, besides the model's own."""
    ignore_eos: bool = False
    """Go on to `max_tokens` where the model would end."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise OptionsError(f"max_tokens: expected at least 1, got {self.max_tokens}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise OptionsError(
                f"temperature: expected a finite number of at least 0, got {self.temperature}"
            )
        if self.top_k < 0:
            raise OptionsError(f"top_k: expected at least 0 (0 for all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise OptionsError(f"top_p: expected above 0 and at most 1, got {self.top_p}")


def needs_logits(params: SamplingParams, candidates: int) -> bool:
    """Return whether a draw needs the whole distribution, not only the top `candidates`."""
    return params.temperature > 0 and not 1 <= params.top_k <= candidates


def sample(
    params: SamplingParams,
    logits: Float32[np.ndarray, " C"],
    ids: Int64[np.ndarray, " C"],
    *,
    key: str,
    position: int,
) -> int:
    """Return the id of one row's next token; equal logits go by the lowest id.

    Args:
        params: How to choose.
        logits: Of the candidates: the highest ones of the row, or all of them.
        ids: Of the candidates, in the same order.
        key: Names the row among all rows of a job.
        position: Of the token that is chosen, counted from the start of the prompt.
    """
    if params.temperature == 0:
        return int(ids[logits == logits.max()].min())
    if params.top_k:
        order = _most_likely(logits, ids, params.top_k)
        mass = _unnormalized(params, logits[order])
        total = mass.sum()
    elif params.top_p < 1:
        order, mass, total = _sort_until_nucleus(params, logits, ids)
    else:
        return int(ids[_draw(_unnormalized(params, logits), params, key, position)])
    nucleus = 1 + int(np.searchsorted(np.cumsum(mass), params.top_p * total))
    return int(ids[order[_draw(mass[:nucleus], params, key, position)]])


def _unnormalized(
    params: SamplingParams, logits: Float32[np.ndarray, " C"]
) -> Float64[np.ndarray, " C"]:
    """Return exp(logit / temperature) up to a factor that keeps the highest at 1."""
    mass = logits.astype(np.float64)
    mass -= mass.max()
    mass /= params.temperature
    return np.exp(mass, out=mass)


def _most_likely(
    logits: Float32[np.ndarray, " C"], ids: Int64[np.ndarray, " C"], count: int
) -> Int64[np.ndarray, " K"]:
    """Return where the `count` most likely candidates are, in order, without sorting the rest."""
    count = min(count, len(logits))
    lowest = np.partition(logits, len(logits) - count)[len(logits) - count]
    kept = np.flatnonzero(logits >= lowest)  # more than `count` where logits are equal
    return kept[np.lexsort((ids[kept], -logits[kept]))][:count]


def _sort_until_nucleus(
    params: SamplingParams, logits: Float32[np.ndarray, " C"], ids: Int64[np.ndarray, " C"]
) -> tuple[Int64[np.ndarray, " K"], Float64[np.ndarray, " K"], np.float64]:
    """Return order and mass of enough of the most likely candidates, and the mass of all."""
    every = _unnormalized(params, logits)
    total = every.sum()
    count = FIRST_NUCLEUS
    while True:
        order = _most_likely(logits, ids, count)
        mass = every[order]
        if len(order) == len(logits) or mass.sum() >= params.top_p * total:
            return order, mass, total
        count *= 8


def _draw(mass: Float64[np.ndarray, " C"], params: SamplingParams, key: str, position: int) -> int:
    """Return an index with a probability in proportion to its mass, by the inverse of the sum."""
    digest = hashlib.blake2b(f"{params.seed}\0{key}".encode(), digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(digest, "little"), counter=position)
    cumulative = np.cumsum(mass)
    drawn = np.random.Generator(philox).random() * cumulative[-1]
    # The product may round up to the whole sum, which the last candidate with mass reaches.
    last = np.searchsorted(cumulative, cumulative[-1])
    return int(min(np.searchsorted(cumulative, drawn, side="right"), last))
