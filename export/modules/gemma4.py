"""A layer of Gemma 4 and of EmbeddingGemma 2.

The formulas follow `Gemma4TextDecoderLayer` of transformers 5.23.

Dimensions: T tokens, D hidden, P width of per-layer embeddings.
"""

from typing import Any

import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig
from export.modules.experts import Experts, Router
from export.modules.layers import Attend, Layer, RMSNorm, Rotation
from export.modules.per_layer import PerLayerGate


class Gemma4Layer(Layer, PerLayerGate):
    """Attention and feed-forward, experts beside it, a per-layer embedding, and a factor."""

    def __init__(self, config: GemmaConfig, layer: int, inner: torch.dtype | None) -> None:
        super().__init__(config, layer, inner)
        self.layer_scalar = nn.Parameter(torch.empty(1))
        self.has_experts = config.num_experts is not None
        if config.hidden_size_per_layer_input is not None:
            self.add_gate(config)
        if self.has_experts:
            dim, epsilon = config.hidden_size, config.rms_norm_eps
            self.router, self.experts = Router(config), Experts(config)
            self.post_feedforward_layernorm_1 = RMSNorm(dim, epsilon)
            self.post_feedforward_layernorm_2 = RMSNorm(dim, epsilon)
            self.pre_feedforward_layernorm_2 = RMSNorm(dim, epsilon)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend, *inputs: Any) -> Tensor:
        """Return the residual stream [T, D].

        Args:
            x: The residual stream [T, D].
            rotation: Rotation of the layer's type.
            attend: The attention over the layer's caches.
            inputs: The layer's embeddings [T, P], or nothing.
        """
        x = super().forward(x, rotation, attend)
        for embeddings in inputs:
            x = x + self.gated(x, embeddings)
        return x * self.layer_scalar.to(x.dtype)

    def fed_forward(self, x: Tensor) -> Tensor:
        """Return the residual stream [T, D] after the feed-forward and the experts."""
        if not self.has_experts:
            return super().fed_forward(x)
        wide = self.mlp(self.pre_feedforward_layernorm(x, self.inner))
        dense = self.post_feedforward_layernorm_1(wide, x.dtype)
        ids, weights = self.router(x)
        chosen = self.experts(self.pre_feedforward_layernorm_2(x, self.inner), ids, weights)
        total = dense + self.post_feedforward_layernorm_2(chosen, x.dtype)
        return x + self.post_feedforward_layernorm(total, x.dtype)
