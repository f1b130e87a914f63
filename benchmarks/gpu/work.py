"""The workload of the GPU benchmark: token ids and lengths, the same for all systems.

Ids are random, because they do not affect the amount of work; end tokens are ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from beam_gemma.model.graph_tensors import Device

SEED = 20261122


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Numbers and sizes that determine the amount of work."""

    requests: int = 256
    lengths: tuple[int, int] = (100, 1024)
    """Bounds of prompt and completion lengths in tokens, both included."""
    shared: int = 512
    rows: int = 2000
    own: tuple[int, int] = (16, 64)
    """Bounds of the number of a row's own tokens after the shared ones."""
    labels: int = 3
    texts: int = 4000
    median: int = 128
    longest: int = 2048
    slots: int = 256
    prefill_tokens: int = 8192
    """Token budget of one of our steps."""
    their_batch: int = 128
    their_tokens: int = 65_536
    """Most tokens in a padded batch of the other systems."""


FULL_SCALE = Scale()
SMOKE = Scale(
    requests=6, lengths=(5, 12), shared=20, rows=8, own=(2, 6), texts=8, median=12, longest=40,
    slots=4, prefill_tokens=64, their_batch=3, their_tokens=128,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The work and settings that a system gets."""

    model: str
    """Exported model folder."""
    shapes: str
    """Folder with the shapes as a Hugging Face `config.json`."""
    device: Device
    dtype: str
    prompts: list[list[int]]
    new_tokens: list[int] = field(default_factory=list)
    """Number of new tokens per prompt; only for completions."""
    label_ids: list[int] = field(default_factory=list)
    scale: Scale

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Job":
        """Return the job that `asdict` turned into these values."""
        scale = {n: tuple(v) if isinstance(v, list) else v for n, v in values["scale"].items()}
        return cls(**{**values, "scale": Scale(**scale)})


def completions(vocab_size: int, scale: Scale) -> tuple[list[list[int]], list[int]]:
    """Return prompts, and the number of new tokens for each."""
    rng = np.random.default_rng(SEED)
    low, high = scale.lengths
    lengths, new = rng.integers(low, high + 1, (2, scale.requests)).tolist()
    return [_ids(rng, n, vocab_size) for n in lengths], new


def classifications(vocab_size: int, scale: Scale) -> tuple[list[list[int]], list[int]]:
    """Return prompts with a shared start, and the ids of the labels."""
    rng = np.random.default_rng(SEED)
    shared = _ids(rng, scale.shared, vocab_size)
    low, high = scale.own
    lengths = rng.integers(low, high + 1, scale.rows).tolist()
    labels = rng.choice(np.arange(3, vocab_size), scale.labels, replace=False).tolist()
    return [shared + _ids(rng, n, vocab_size) for n in lengths], labels


def texts(vocab_size: int, scale: Scale) -> list[list[int]]:
    """Return texts of log-normal lengths."""
    rng = np.random.default_rng(SEED)
    lengths = np.exp(rng.normal(np.log(scale.median), 0.9, scale.texts))
    return [_ids(rng, n, vocab_size) for n in lengths.clip(3, scale.longest).astype(int).tolist()]


def _ids(rng: np.random.Generator, number: int, vocab_size: int) -> list[int]:
    return rng.integers(3, vocab_size, number).tolist()
