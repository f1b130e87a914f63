"""Choice of the next token of one row from its logits.

A draw depends on its own row alone: its uniform number comes from a counter-based generator that is
keyed by (seed, row key) and whose counter is the position. Neither the other rows of a batch, nor
their order, nor a retry can change the draw.

Probabilities are summed in float64. Over a whole vocabulary they are computed in float32, which is
four times faster and off by less than one part in a million; over a few candidates, in float64.

Dimensions: C candidates, K most likely ones among them.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from beam_gemma.errors import OptionsError

FIRST_NUCLEUS = 1024
"""Candidates sorted at first when `top_p` alone cuts the distribution; most nuclei are smaller."""
RUN = 512
"""Candidates per partial sum in a draw from a whole vocabulary; only one run is searched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Options for choosing each next token and for ending a completion.

    Example:
        >>> SamplingParams(max_tokens=32).temperature
        0.0
        >>> SamplingParams(top_p=1.5)
        Traceback (most recent call last):
        beam_gemma.errors.OptionsError: top_p: expected above 0 and at most 1, got 1.5
    """

    max_tokens: int = 256
    """Maximum length of the completion, in tokens."""
    temperature: float = 0.0
    """Divisor of the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Number of most likely tokens to draw from; 0 for all."""
    top_p: float = 1.0
    """Total probability of the tokens to draw from: the fewest most likely ones that reach it."""
    seed: int = 0
    """Seed of every draw, combined with the row's key and the position."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, besides the model's own."""
    ignore_eos: bool = False
    """True to ignore the model's own end tokens and continue up to `max_tokens`."""

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
    """Return the id of one row's next token; among equal logits the lowest id wins.

    Args:
        params: The sampling options.
        logits: Logits of the candidates: the highest ones of the row, or all of them.
        ids: Token ids of the candidates, in the same order.
        key: Key that identifies the row among all rows of a job.
        position: Position of the chosen token, counted from the start of the prompt.
    """
    if params.temperature == 0:
        return int(ids[logits == logits.max()].min())
    uniform = uniform_at(params.seed, key, position)
    if params.top_k:
        order = _most_likely(logits, ids, params.top_k)
        mass = _unnormalized(logits[order].astype(np.float64), params.temperature)
        total = mass.sum()
    elif params.top_p < 1:
        order, mass, total = _sort_until_nucleus(params, logits, ids)
    else:
        return int(ids[_draw_from_all(_unnormalized(logits, params.temperature), uniform)])
    cumulative = np.cumsum(mass, dtype=np.float64)
    nucleus = cumulative[: 1 + cumulative.searchsorted(params.top_p * total)]
    return int(ids[order[_place(nucleus, uniform * nucleus[-1])]])


def uniform_at(seed: int, key: str, position: int) -> float:
    """Return a row's uniform number in [0, 1) at a position; a hash is the counter-based RNG."""
    counter = f"{seed}\0{position}\0{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(counter, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _unnormalized(logits: Float[np.ndarray, " C"], temperature: float) -> Float[np.ndarray, " C"]:
    """Return exp(logit / temperature), scaled so that the highest value is 1."""
    mass = logits - logits.max()
    mass /= temperature
    return np.exp(mass, out=mass)


def _most_likely(
    logits: Float32[np.ndarray, " C"], ids: Int64[np.ndarray, " C"], count: int
) -> Int64[np.ndarray, " K"]:
    """Return the indices of the `count` most likely candidates, in order; do not sort the rest."""
    count = min(count, len(logits))
    lowest = np.partition(logits, len(logits) - count)[len(logits) - count]
    kept = np.flatnonzero(logits >= lowest)  # more than `count` where logits are equal
    return kept[np.lexsort((ids[kept], -logits[kept]))][:count]


def _sort_until_nucleus(
    params: SamplingParams, logits: Float32[np.ndarray, " C"], ids: Int64[np.ndarray, " C"]
) -> tuple[Int64[np.ndarray, " K"], Float32[np.ndarray, " K"], np.float64]:
    """Return indices and mass of enough top candidates to cover `top_p`, and the total mass."""
    every = _unnormalized(logits, params.temperature)
    total = every.sum(dtype=np.float64)
    count = FIRST_NUCLEUS
    while True:
        order = _most_likely(logits, ids, count)
        mass = every[order]
        if len(order) == len(logits) or mass.sum(dtype=np.float64) > params.top_p * total:
            return order, mass, total
        count *= 8


def _draw_from_all(mass: Float32[np.ndarray, " C"], uniform: float) -> int:
    """Return the index where the running sum of mass passes the share `uniform` of the total."""
    sums = np.add.reduceat(mass, np.arange(0, len(mass), RUN), dtype=np.float64).cumsum()
    target = uniform * sums[-1]
    run = _place(sums, target)
    if run:
        target -= sums[run - 1]
    begin = run * RUN
    return begin + _place(np.cumsum(mass[begin : begin + RUN], dtype=np.float64), target)


def _place(cumulative: Float64[np.ndarray, " C"], target: float) -> int:
    """Return the first index whose cumulative sum is above the target."""
    # Rounding may lift the target to the total; then the last index with mass is returned.
    last = cumulative.searchsorted(cumulative[-1])
    return int(min(cumulative.searchsorted(target, side="right"), last))
