"""Ways to draw, for the host and for a graph."""

from dataclasses import dataclass
from unittest import mock

import numpy as np

from beam_gemma.engine import sampling
from beam_gemma.engine.sampling import SamplingParams


@dataclass(frozen=True)
class Draw:
    """How one row chooses; every number is one of float32."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float


def draws(count: int, seed: int) -> list[Draw]:
    """Return draws of all kinds; some greedy, some at the ends of their ranges."""
    rng = np.random.default_rng(seed)
    return [
        Draw(
            temperature=float(np.float32(rng.choice([0.0, 0.3, 1.0, 2.5]))),
            top_k=int(rng.choice([1, 2, 5, 40, 64])),
            top_p=float(np.float32(rng.choice([1e-6, 0.5, 0.9, 1.0]))),
            uniform=float(np.float32(rng.choice([0.0, 1 - 2**-24, rng.random(), rng.random()]))),
        )
        for _ in range(count)
    ]


def arrays(cases: list[Draw]) -> dict[str, np.ndarray]:
    """Return the inputs of a graph that chooses."""
    return {
        "temperatures": np.array([c.temperature for c in cases], np.float32),
        "uniforms": np.array([c.uniform for c in cases], np.float32),
        "top_ks": np.array([c.top_k if c.temperature else 0 for c in cases], np.int32),
        "top_ps": np.array([c.top_p for c in cases], np.float32),
    }


def chosen(case: Draw, logits: np.ndarray) -> int:
    """Return what the host chooses."""
    params = SamplingParams(temperature=case.temperature, top_k=case.top_k, top_p=case.top_p)
    with mock.patch.object(sampling, "uniform_at", return_value=case.uniform):
        return sampling.sample(params, logits, np.arange(len(logits)), key="", position=0)
