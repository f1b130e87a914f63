"""`expert_mlp`: the feed-forwards of experts, of which each token has chosen a few.

For a token x that has chosen experts e with weights w[e]:

    out = sum over its e of w[e] * down[e] (gelu(gate[e] x) * (up[e] x))

GELU is in its tanh form. A token's experts are added up in the order in which it has chosen them.

Dimensions: T tokens, D hidden, E experts, F an expert's feed-forward, k experts of a token.
"""

import torch
from torch import Tensor


@torch.library.custom_op("beam_gemma::expert_mlp", mutates_args=())
def expert_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, weights: Tensor
) -> Tensor:
    """Return the weighted sum [T, D] of what a token's experts make of it.

    Args:
        x: [T, D].
        gate_up: [E, 2F, D], the gates of each expert above its other products.
        down: [E, D, F].
        expert_ids: [T, k], int64, different ones for each token.
        weights: [T, k], in float32 or wider.
    """
    each = x.new_zeros(*expert_ids.shape, x.shape[1])
    for expert in sorted({*expert_ids.flatten().tolist()}):
        tokens, choices = torch.where(expert_ids == expert)
        gate, up = (x[tokens] @ gate_up[expert].T).chunk(2, dim=1)
        inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
        each[tokens, choices] = inner @ down[expert].T
    return (each * weights[:, :, None]).sum(dim=1).to(x.dtype)


@expert_mlp.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    del gate_up, down, expert_ids, weights
    return torch.empty_like(x)
