"""Sums of a weight and the product of a LoRA adapter's factors, slice by slice.

Sources: in PEFT 0.21, `Linear`, `Embedding` and `ParamWrapper` of `tuners/lora/layer.py`.

Dimensions: O rows of a weight, I its columns, E experts, r rank of the adapter.
"""

from collections.abc import Callable

import numpy as np
import torch

from export.checkpoints.tensors import StoredTensor

Rows = Callable[[int, int], np.ndarray]
"""Function that returns rows [start, stop) of a weight's first dimension."""


def summed_rows(weight: StoredTensor, a: StoredTensor, b: StoredTensor, scaling: float) -> Rows:
    """Return the rows of W [O, I] + B [O, r] A [r, I] * scaling."""

    def rows(start: int, stop: int) -> np.ndarray:
        left, right = _float32(b.rows(start, stop)), _whole(a)
        return (_float32(weight.rows(start, stop)) + left @ right * scaling).numpy()

    return rows


def summed_embeddings(
    weight: StoredTensor, a: StoredTensor, b: StoredTensor, scaling: float
) -> Rows:
    """As `summed_rows`, for an embedding, whose factors are those of its transpose."""

    def rows(start: int, stop: int) -> np.ndarray:
        left, right = _whole(b), _whole(a)
        delta = (left @ right[:, start:stop]).T * scaling
        return (_float32(weight.rows(start, stop)) + delta).numpy()

    return rows


def summed_experts(weight: StoredTensor, a: StoredTensor, b: StoredTensor, scaling: float) -> Rows:
    """As `summed_rows`, for a stack of matrices [E, O, I].

    The factors A [E * r, I] hold one expert after the other; in B [O, r * E], experts alternate.
    """
    experts = weight.shape[0]
    rank = a.shape[0] // experts

    def rows(start: int, stop: int) -> np.ndarray:
        right = _float32(a.rows(start * rank, stop * rank)).view(stop - start, rank, -1)
        left = _whole(b).view(b.shape[0], rank, experts)[:, :, start:stop]
        delta = torch.einsum("o r e, e r i -> e o i", left, right) * scaling
        return (_float32(weight.rows(start, stop)) + delta).numpy()

    return rows


def _whole(stored: StoredTensor) -> torch.Tensor:
    return _float32(stored.rows(0, stored.shape[0]))


def _float32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
