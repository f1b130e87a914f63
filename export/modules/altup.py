"""A layer of Gemma 3n: alternating updates of several streams, and residuals of low rank.

The residual stream of a Gemma 3n is several streams. A layer predicts all of them, computes
attention and feed-forward on the active one, and corrects all of them by what came of it. The
formulas follow `models/gemma3n/modeling_gemma3n.py` of transformers 5.23.

Dimensions: T tokens, S streams, D hidden, P width of per-layer embeddings, F feed-forward.
"""

import math
from collections.abc import Iterable

import ml_dtypes
import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig
from export.modules.layers import (
    Attend,
    Layer,
    RMSNorm,
    Rotation,
    root_mean_square,
    widened,
)
from export.modules.per_layer import PerLayerGate

LEAST_SQUARE = 1e-5
"""Least mean square that a projected stream is divided by."""
HALF_SCALE = 2.0**-10
"""Factor of the last layer's streams before a projection, after which it cancels out. Streams may
exceed 65,504, the largest float16, and a power of two changes no digit."""


class AltUp(nn.Module):
    """Predicts and corrects the streams by coefficients that depend on the token."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        assert config.altup_num_inputs is not None
        num_streams, hidden = config.altup_num_inputs, config.hidden_size
        self.active = config.altup_active_idx
        self.prediction_coefs = nn.Linear(num_streams, num_streams**2, bias=False)
        self.correction_coefs = nn.Linear(num_streams, num_streams, bias=False)
        self.modality_router = nn.Linear(hidden, num_streams, bias=False)
        self.router_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.scales = config.altup_correct_scale
        if self.scales:
            self.correct_output_scale = nn.Parameter(torch.empty(hidden))

    def predicted(self, x: Tensor) -> Tensor:
        """Return the predictions [T, S, D] for streams x [T, S, D]."""
        num_streams = x.shape[1]
        coefficients = self._coefficients(x[:, self.active], self.prediction_coefs)
        return x + coefficients.view(-1, num_streams, num_streams) @ x

    def corrected(self, predictions: Tensor, activated: Tensor) -> Tensor:
        """Return the streams [T, S, D], corrected.

        Args:
            predictions: [T, S, D].
            activated: [T, D], what attention and feed-forward made of the active prediction.
        """
        coefficients = self._coefficients(activated, self.correction_coefs) + 1.0
        innovation = activated - predictions[:, self.active]
        return predictions + coefficients[:, :, None] * innovation[:, None]

    def gating(self, x: Tensor) -> Tensor:
        """Return the stream [T, D] of x [T, S, D] that gates the per-layer embeddings."""
        active = x[:, self.active]
        return active * self.correct_output_scale.to(x.dtype) if self.scales else active

    def _coefficients(self, x: Tensor, matrix: nn.Linear) -> Tensor:
        """Return the product of a matrix with what the router makes of x [T, D]."""
        kind = matrix.weight.dtype
        routed = self.modality_router(self.router_norm(x, kind))
        modalities = torch.tanh(widened(routed) / x.shape[1])
        return matrix(modalities.to(kind)).to(x.dtype)


class LowRank(nn.Module):
    """The learned augmented residual: a product of low rank beside attention."""

    def __init__(self, hidden: int, rank: int, epsilon: float) -> None:
        super().__init__()
        self.linear_left = nn.Linear(hidden, rank, bias=False)
        self.linear_right = nn.Linear(rank, hidden, bias=False)
        self.post_laurel_norm = RMSNorm(hidden, epsilon)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x [T, D] and its product [T, D] in `dtype`, added up."""
        product = self.linear_right(self.linear_left(x))
        return x.to(dtype) + self.post_laurel_norm(product, dtype)


class SparseGate(nn.Linear):
    """The gates of a feed-forward, of which all but the largest are zero.

    A gate is cut where a normal distribution with the mean and deviation of its token's gates has
    the share below it that is to be zero.
    """

    def __init__(self, hidden: int, wide: int, share: float) -> None:
        super().__init__(hidden, wide, bias=False)
        # The quantile of the normal distribution, in float32 like the reference.
        self.deviations = (torch.erfinv(2 * torch.tensor(share) - 1) * math.sqrt(2)).item()

    def forward(self, x: Tensor) -> Tensor:
        """Return the gates [T, F] of x [T, D], each less the cut and at least 0."""
        gates = super().forward(x)
        wide = widened(gates)
        centered = wide - wide.mean(dim=1, keepdim=True)
        cut = root_mean_square(centered) * _rounded(self.deviations, gates.dtype)
        return torch.relu(centered - cut).to(gates.dtype)


class AltUpLayer(Layer, PerLayerGate):
    """Attention and feed-forward on one of the streams, which corrects all of them."""

    def __init__(self, config: GemmaConfig, layer: int, inner: torch.dtype | None) -> None:
        super().__init__(config, layer, inner)
        assert config.laurel_rank is not None
        hidden = config.hidden_size
        self.altup = AltUp(config)
        self.laurel = LowRank(hidden, config.laurel_rank, config.rms_norm_eps)
        if (shares := config.activation_sparsity_pattern) and shares[layer]:
            wide = config.intermediate_size_of(layer)
            self.mlp.gate_proj = SparseGate(hidden, wide, shares[layer])
        self.add_gate(config)

    def forward(  # type: ignore[override]
        self, x: Tensor, rotation: Rotation, attend: Attend, inputs: Tensor
    ) -> Tensor:
        """Return the streams [T, S, D] of x [T, S, D] and per-layer embeddings [T, P]."""
        predictions = self.altup.predicted(x)
        active = predictions[:, self.altup.active]
        normed = self.input_layernorm(active, self.inner)
        attended = self.self_attn(normed, rotation, attend)
        attended = active + self.post_attention_layernorm(attended, x.dtype)
        mixed = (attended + self.laurel(normed, x.dtype)) / math.sqrt(2)
        streams = self.altup.corrected(predictions, self.fed_forward(mixed))
        added = self.gated(self.altup.gating(streams), inputs)
        # All but the first, whichever is active.
        return torch.where(_is_stream(0, x.shape[1]), streams, streams + added[:, None])


def spread(x: Tensor, projections: Iterable[nn.Module]) -> Tensor:
    """Return the streams [T, S, D] that embeddings x [T, D] start with.

    The first one is x, and the others are projections of x with its magnitude.
    """
    magnitude, others = root_mean_square(x), list(projections)
    streams = x[:, None]
    for i, projection in enumerate(others, start=1):
        projected = _projected(x, projection, magnitude)
        streams = torch.where(_is_stream(i, len(others) + 1), projected[:, None], streams)
    return streams


def merged(x: Tensor, projections: Iterable[nn.Module]) -> Tensor:
    """Return the residual stream [T, D] of the streams x [T, S, D] after the last layer.

    It is the mean of the first stream and of projections of the others with its magnitude.
    """
    magnitude, total = root_mean_square(x[:, 0]), x[:, 0]
    for i, projection in enumerate(projections, start=1):
        total = total + _projected(x[:, i], projection, magnitude, HALF_SCALE)
    return total / x.shape[1]


def _projected(x: Tensor, projection: nn.Module, magnitude: Tensor, scale: float = 1.0) -> Tensor:
    """Return a projection [T, D] of x [T, D] with the magnitude [T, 1], whatever the scale."""
    assert isinstance(projection, nn.Linear)
    given = x * scale if scale != 1.0 else x
    projected = projection(given.to(projection.weight.dtype)).to(x.dtype)
    own = root_mean_square(projected, least=LEAST_SQUARE * scale**2)
    return (widened(projected) * magnitude / own).to(x.dtype)


def _rounded(value: float, dtype: torch.dtype) -> float:
    """Return a constant as the reference rounds it in a model of this dtype."""
    return float(ml_dtypes.bfloat16(value)) if dtype == torch.bfloat16 else value


def _is_stream(number: int, num_streams: int) -> Tensor:
    """Return a mask [S, 1] of one of the streams."""
    return (torch.arange(num_streams) == number)[:, None]
