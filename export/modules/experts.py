"""A mixture of experts: a router that gives each token some of them, and their feed-forwards.

The formulas follow `Gemma4TextRouter` and `Gemma4TextExperts` of transformers 5.23.

Dimensions: T tokens, D hidden, E experts, F an expert's feed-forward, k experts of a token.
"""

import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig
from export.ops.expert_mlp import expert_mlp
from export.ops.reference import rms_norm


class Router(nn.Module):
    """Chooses experts for each token, and their weights, in float32 or wider."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        assert config.top_k_experts is not None
        self.top_k, self.epsilon = config.top_k_experts, config.rms_norm_eps
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.empty(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts [T, k] of tokens x [T, D], the likeliest first, and their weights."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = rms_norm(x, self.scale.to(wide), self.epsilon, wide) * x.shape[1] ** -0.5
        logits = nn.functional.linear(normed, self.proj.weight.to(wide))
        # The softmax of the greatest alone is theirs of all, divided by their sum.
        greatest, ids = torch.topk(logits, self.top_k, dim=-1)
        shares = torch.softmax(greatest, dim=-1)
        factors = self.per_expert_scale.to(wide).index_select(0, ids.flatten())
        return ids, shares * factors.view(-1, self.top_k)


class Experts(nn.Module):
    """The feed-forwards of all experts."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        assert config.moe_intermediate_size is not None
        experts, wide, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * wide, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, wide))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [T, D] of what a token's experts make of x [T, D]."""
        return expert_mlp(x, self.gate_up_proj, self.down_proj, ids, weights)
