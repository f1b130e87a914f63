"""A layer of a Gemma in PyTorch: attention and feed-forward with their norms.

Parameters have the names of Hugging Face checkpoints without the leading `model.`; a norm's
weight is the effective one (1 + w in the models that store w). The formulas follow
`models/gemma*/modeling_*.py` of transformers 5.23.

Dimensions: T new tokens, D hidden, F feed-forward, N query heads, K key-value heads, H head
dimension.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.layer_types import FULL
from export.ops.reference import rms_norm


class RMSNorm(nn.Module):
    """Root mean square normalization; the weight is float32 for every model dtype."""

    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))
        self.epsilon = epsilon

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the normalized x [..., D] in `dtype`, by default the dtype of x."""
        return rms_norm(x, self.weight, self.epsilon, dtype or x.dtype)


def root_mean_square(x: Tensor, least: float = 0.0) -> Tensor:
    """Return the root of the mean square of each row of x [T, D], as [T, 1], in float32 or wider.

    The means of rows that ONNX Runtime computes on the CPU depend on the row alone.
    """
    wide = widened(x)
    square = (wide * wide).mean(dim=1, keepdim=True)
    return (square.clamp(min=least) if least else square).sqrt()


def unit_norm(x: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Return x [..., D] in `dtype`, normalized as by an `RMSNorm` of weight 1."""
    ones = torch.ones(x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return rms_norm(x, ones, epsilon, dtype)


def widened(x: Tensor) -> Tensor:
    """Return x in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


PACKET = 8
"""ONNX Runtime computes cosines and sines in packets of at most so many numbers, and what is left
at the end of a tensor by other code, whose last bits differ."""


class Rotary(nn.Module):
    """Cosines and sines of one layer type's rotary embedding."""

    def __init__(self, rotary_dim: int) -> None:
        super().__init__()
        self.inv_freq = nn.Parameter(torch.empty(rotary_dim // 2, dtype=torch.float32))

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin of half of the channels that turn, each [T, 1, H / 2], in float32."""
        angles = positions.to(self.inv_freq.dtype)[:, None, None] * self.inv_freq
        width = len(self.inv_freq)
        if width % PACKET:  # no token may be the one at the end whose packet is not full
            angles = nn.functional.pad(angles, (0, -width % PACKET))
            cos, sin = angles.cos()[:, :, :width], angles.sin()[:, :, :width]
            return cos.to(dtype), sin.to(dtype)
        return angles.cos().to(dtype), angles.sin().to(dtype)


Rotation = Callable[[Tensor, int], Tensor]
"""Function of x [T, N * H] and N that rotates each head by its token's position."""
Attend = Callable[..., Tensor]
"""Function of rotated query [T, N * H], rotated key and value [T, K * H]; returns [T, N * H].

A layer that reads another's keys and values gives the query alone. The keyword `group` names other
caches than those of the layer's type."""


class Attention(nn.Module):
    """Grouped-query attention; the caller's `attend` stores and reads the keys and values."""

    def __init__(self, config: GemmaConfig, layer: int, *, bias: bool = False) -> None:
        """Make the matrices of a layer; `bias` adds one to the output, which RecurrentGemma has."""
        super().__init__()
        kind = config.layer_types[layer]
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_kv_heads_of(kind)
        self.head_dim = config.head_dim_of(kind)
        self.has_qk_norm, self.has_value_norm = config.has_qk_norm, config.has_value_norm
        self.epsilon = config.rms_norm_eps
        self.shares_projection = config.attention_k_eq_v and kind == FULL
        self.is_producer = config.producer(layer) == layer
        hidden, keys = config.hidden_size, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=False)
        if self.is_producer:
            self.k_proj = nn.Linear(hidden, keys, bias=False)
        if self.is_producer and not self.shares_projection:
            self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=bias)
        if self.has_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        if self.has_qk_norm and self.is_producer:
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """Return the attention output [T, D]."""
        query = self._heads(self.q_proj(x), self.num_heads, "q_norm", rotation)
        if not self.is_producer:
            return self.o_proj(attend(query))
        projected = self.k_proj(x)
        key = self._heads(projected, self.num_kv_heads, "k_norm", rotation)
        value = projected if self.shares_projection else self.v_proj(x)
        return self.o_proj(attend(query, key, self._values(value)))

    def _heads(self, x: Tensor, num_heads: int, norm: str, rotation: Rotation) -> Tensor:
        """Normalize and rotate each head of x [T, N * H]."""
        heads = x.view(-1, num_heads, self.head_dim)
        if self.has_qk_norm:
            heads = getattr(self, norm)(heads)
        return rotation(heads.reshape(x.shape), num_heads)

    def _values(self, x: Tensor) -> Tensor:
        """Normalize each head of x [T, K * H], where the model does so, by a norm of weight 1."""
        if not self.has_value_norm:
            return x
        heads = x.view(-1, self.num_kv_heads, self.head_dim)
        return unit_norm(heads, self.epsilon, x.dtype).reshape(x.shape)


class FeedForward(nn.Module):
    """GeGLU with the tanh approximation of GELU."""

    def __init__(self, config: GemmaConfig, layer: int, *, bias: bool = False) -> None:
        """Make the matrices of a layer, with biases where the model has them."""
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size_of(layer)
        self.gate_proj = nn.Linear(hidden, wide, bias=bias)
        self.up_proj = nn.Linear(hidden, wide, bias=bias)
        self.down_proj = nn.Linear(wide, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward output [T, D] of x [T, D]."""
        gate = nn.functional.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, with a norm before each and, from Gemma 2 on, after each.

    As in the checkpoints, `post_attention_layernorm` names the norm *before* the feed-forward in
    Gemma 1 and the norm *after* attention from Gemma 2 on.

    The residual stream may have a wider dtype than `inner`, in which attention and feed-forward
    compute; the norms convert between the two.
    """

    def __init__(self, config: GemmaConfig, layer: int, inner: torch.dtype | None) -> None:
        super().__init__()
        self.inner = inner
        dim, epsilon = config.hidden_size, config.rms_norm_eps
        self.has_post_norms = config.has_post_norms
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config, layer)
        self.input_layernorm = RMSNorm(dim, epsilon)
        self.post_attention_layernorm = RMSNorm(dim, epsilon)
        if self.has_post_norms:
            self.pre_feedforward_layernorm = RMSNorm(dim, epsilon)
            self.post_feedforward_layernorm = RMSNorm(dim, epsilon)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """Return the residual stream [T, D]."""
        attended = self.self_attn(self.input_layernorm(x, self.inner), rotation, attend)
        if not self.has_post_norms:
            x = x + attended.to(x.dtype)
            return x + self.mlp(self.post_attention_layernorm(x, self.inner)).to(x.dtype)
        return self.fed_forward(x + self.post_attention_layernorm(attended, x.dtype))

    def fed_forward(self, x: Tensor) -> Tensor:
        """Return the residual stream [T, D] after the feed-forward, with a norm on both sides."""
        wide = self.mlp(self.pre_feedforward_layernorm(x, self.inner))
        return x + self.post_feedforward_layernorm(wide, x.dtype)
