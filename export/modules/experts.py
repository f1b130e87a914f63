"""A mixture of experts: a router that gives each token some of them, and their feed-forwards.

The formulas follow `Gemma4TextRouter` and `Gemma4TextExperts` of transformers 5.23.

Dimensions: T tokens, D hidden, E experts, F an expert's feed-forward, k experts of a token.
"""

import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig


class Router(nn.Module):
    """Chooses experts for each token, and their weights."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.empty(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts [T, k] of tokens x [T, D], and their weights [T, k]."""
        raise NotImplementedError


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
        raise NotImplementedError
