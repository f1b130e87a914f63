"""A layer of Gemma 3n: alternating updates of several streams, and residuals of low rank.

The formulas follow `models/gemma3n/modeling_gemma3n.py` of transformers 5.23.

Dimensions: T tokens, S streams, D hidden, P width of per-layer embeddings, F feed-forward.
"""

import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig
from export.modules.layers import Attend, Layer, Rotation
from export.modules.per_layer import PerLayerGate


class AltUpLayer(Layer, PerLayerGate):
    """Attention and feed-forward on one of the streams, which corrects all of them."""

    def __init__(self, config: GemmaConfig, layer: int, inner: torch.dtype | None) -> None:
        super().__init__(config, layer, inner)
        self.add_gate(config)

    def forward(  # type: ignore[override]
        self, x: Tensor, rotation: Rotation, attend: Attend, inputs: Tensor
    ) -> Tensor:
        """Return the streams [T, S, D] of x [T, S, D] and per-layer embeddings [T, P]."""
        raise NotImplementedError


def spread(x: Tensor, projections: nn.ModuleList, active: int) -> Tensor:
    """Return the streams [T, S, D] that embeddings x [T, D] start with."""
    raise NotImplementedError


def merged(x: Tensor, projections: nn.ModuleList, active: int) -> Tensor:
    """Return the residual stream [T, D] of the streams x [T, S, D] after the last layer."""
    raise NotImplementedError
