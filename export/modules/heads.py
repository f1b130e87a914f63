"""The output heads: candidates for the next token, or scores of given tokens.

Dimensions: R packed positions that need a head, Q positions that need a probability, Y targets,
V vocabulary, N rows, U columns.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.signature import Signature
from export.ops.reference import column_maxima, even_parts

Named = dict[str, Tensor]
NEVER = -1e30
"""Logit of a token that is never chosen: its probability is 0 at any temperature in use. An
infinite one would make NaN in the sort keys of `token_choice`."""


def generate_head(logits: Tensor, probability_rows: Tensor, signature: Signature) -> Named:
    """Return the outputs of the `generate` head for logits [R, V]; probability_rows is [Q]."""
    top = torch.topk(logits, signature.candidates)
    return {
        "topk_logits": top.values,
        "topk_ids": top.indices,
        "top_probability": top_probability(logits.index_select(0, probability_rows), "cpu"),
        "logits": logits,
    }


def suppressed(
    logits: Tensor, token_ids: tuple[int, ...], finish: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return logits [R, V] in which some tokens can never be chosen, and how to finish them.

    Unfinished, these tokens have the lowest number of the type, which no product reaches. A cap
    would lift it, so that finishing puts `NEVER` in its place.

    Args:
        logits: [R, V], output of the last product.
        token_ids: The tokens.
        finish: Converts logits to float32 and caps them if the model has a cap.
    """
    lowest = torch.finfo(logits.dtype).min
    places = torch.tensor([token_ids]).expand(logits.shape[0], -1)
    values = torch.tensor([[lowest] * len(token_ids)], dtype=logits.dtype).expand_as(places)

    def finish_all(chosen: Tensor) -> Tensor:
        return torch.where(chosen <= lowest, NEVER, finish(chosen))

    return logits.scatter(1, places, values), finish_all


def score_head(target_logits: Tensor, logits: Tensor, device: Device) -> Named:
    """Return the outputs of the `score` head for target_logits [Y] and logits [Q, V]."""
    return {
        "target_logits": target_logits,
        "top_logits": _maxima(logits, device),
        "top_probability": top_probability(logits, device),
    }


def top_probability(logits: Tensor, device: Device) -> Tensor:
    """Return the largest probability of each row of logits [Q, V], as [Q].

    The sum has two levels of about sqrt(V) terms: one pass over 262,144 float32 terms has an error
    of 6e-5. On the CPU, ONNX Runtime computes exponentials and sums with the same bits in every
    batch only in a softmax over whole rows and in a product with more than one row.
    """
    vocab = logits.shape[1]
    outer = next(n for n in range(math.isqrt(vocab), 0, -1) if vocab % n == 0)
    parts = logits.reshape(-1, vocab // outer)
    # A softmax's largest weight is 1 / sum(exp(x - max(x))).
    sums = _maxima(torch.softmax(parts, dim=1), device).reciprocal().view(-1, outer)
    shares = torch.softmax(_maxima(parts, device).view(-1, outer), dim=1)
    if device == "cuda":
        return _maxima(shares, device) / (shares * sums).sum(dim=1)
    ones = torch.ones(outer, 2, dtype=logits.dtype)
    total = torch.cat([shares * sums] * 2) @ ones
    return shares.amax(dim=1) / total[: logits.shape[0], 0]


def _maxima(x: Tensor, device: Device) -> Tensor:
    """Return the maximum of each row of x [N, U], as [N].

    ONNX Runtime's own reduction on CUDA needs cuDNN, which nothing else in a decoder needs.
    """
    if device == "cuda":
        while (parts := even_parts(x.shape[1])) > 1:
            x = column_maxima(x, parts)
    return x.reshape(-1) if x.shape[1] == 1 else x.amax(dim=1)
