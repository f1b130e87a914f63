"""A recurrence over the tokens of each sequence, channel by channel.

    h[t] = exp(log_decay[t]) * h[t - 1] + inputs[t]

Before a sequence's first token, h is its row of `initial`. Source: `rnn_scan` in `torch/layers.py`
of `recurrentgemma` 1.0.1, which goes from token to token in float32 as well; so where a sequence is
cut into steps changes no bit.

`linear_recurrence` takes packed sequences, on the CPU; `padded_recurrence` takes them side by side,
on CUDA.

Dimensions: B sequences, T new tokens, C channels, L places of a sequence.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("beam_gemma::linear_recurrence", mutates_args=())
def linear_recurrence(
    inputs: Tensor, log_decay: Tensor, initial: Tensor, owner: Tensor, is_first: Tensor
) -> Tensor:
    """Return h [T, C].

    Args:
        inputs: [T, C], float32 or wider.
        log_decay: [T, C], at most 0.
        initial: [B, C], h before the first new token of each sequence.
        owner: [T], the sequence of each token.
        is_first: [T], whether a token is the first new one of its sequence.
    """
    hidden = torch.empty_like(inputs)
    last = initial[0]
    for t, decay in enumerate(torch.exp(log_decay)):
        if is_first[t]:
            last = initial[owner[t]]
        last = decay * last + inputs[t]
        hidden[t] = last
    return hidden


@linear_recurrence.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(args[0])


@torch.library.custom_op("beam_gemma::padded_recurrence", mutates_args=())
def padded_recurrence(
    inputs: Tensor, log_decay: Tensor, initial: Tensor, token_places: Tensor
) -> Tensor:
    """Return h [T, C].

    Args:
        inputs: [B, L, C], float32 or wider; 0 after a sequence's end.
        log_decay: [B, L, C], at most 0; 0 after a sequence's end.
        initial: [B, C], h before the first token of each sequence.
        token_places: [T], place of each packed token among these B * L places.
    """
    hidden = torch.empty_like(inputs)
    last = initial
    for i, decay in enumerate(torch.exp(log_decay).unbind(1)):
        last = decay * last + inputs[:, i]
        hidden[:, i] = last
    return hidden.flatten(0, 1)[token_places]


@padded_recurrence.register_fake
def _(*args: Any) -> Tensor:
    inputs, _, _, token_places = args
    return inputs.new_empty(token_places.shape[0], inputs.shape[2])
