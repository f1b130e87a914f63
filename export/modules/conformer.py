"""The conformer of Gemma 4 and Gemma 3n: convolutions, then layers of local attention.

One clip is computed at a time, so that no frame is padding. Parameters have the names that Gemma 4
has in published files; those of Gemma 3n are renamed (`export.checkpoints.sound_tensors`). The
formulas follow `models/gemma4` and `models/gemma3n` of transformers 5.23.

Convolutions are products with gathered rows, so that no op needs cuDNN. Attention works on blocks
of tokens: the queries of a block share a context of keys, some of which lie outside of the clip.

Dimensions: J frames of a clip, M mel bins of a frame, I channels before a convolution, O behind it,
L tokens of a clip, C channels of the tower, N heads, H head dimension, B blocks, W queries of a
block, K keys of a block, P relative positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beam_gemma.model.sound_config import SoundConfig
from export.modules.gemma4_vision import ClippedLinear
from export.modules.layers import RMSNorm
from export.modules.vision import LayerNorm

NORM_EPSILON = 1e-6
"""That of all norms but those of the convolutions, which `config.json` sets."""
KERNEL = 3
"""Frames and bins that a convolution before the layers sees."""
MAX_TIMESCALE = 1e4
"""Longest wavelength of the relative positions."""
FAR = -1e9
"""Added to the scores of keys out of reach, whose weights are then exactly 0."""
Q_FACTOR, K_FACTOR = 1 / math.log(2), math.log(1 + math.e) / math.log(2)
"""Factors of queries and of keys; learned scales of queries start at softplus(0) = log(2)."""


class CumulativeNorm(nn.Module):
    """Normalization by the mean and variance of a frame and all frames before it (Gemma 3n)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x [J, M, O] in float32 or wider.

        A frame's part of the variance is its distance from the mean up to itself.
        """
        count = torch.arange(1, x.shape[0] + 1, dtype=x.dtype)[:, None] * x[0].numel()
        mean = x.flatten(1).sum(1, keepdim=True).cumsum(0) / count
        apart = x - mean[:, :, None]
        square = (apart * apart).flatten(1).sum(1, keepdim=True).cumsum(0) / count
        return apart * (square[:, :, None] + self.epsilon).rsqrt() * self.weight


class Kernel(nn.Module):
    """The weight of a convolution."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class Convolution(nn.Module):
    """A convolution that halves frames and bins, a norm and ReLU."""

    def __init__(self, config: SoundConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        # A frame sees the two that come next in Gemma 3n, and one on both sides in Gemma 4.
        self.before, self.after = (0, KERNEL - 1) if config.encoder == "usm" else (1, 1)
        self.conv = Kernel(outputs, inputs, KERNEL, KERNEL)
        self.norm = (
            CumulativeNorm(outputs, config.group_norm_eps)
            if config.encoder == "usm"
            else LayerNorm(outputs, config.rms_norm_eps, has_bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [J / 2, M / 2, O] in float32 or wider for x [J, M, I], both rounded up."""
        kernel = self.conv.weight
        wide = torch.promote_types(kernel.dtype, torch.float32)
        frames, bins = (x.shape[0] + 1) // 2, (x.shape[1] + 1) // 2
        beside = _zeros(x.shape[0], 1, x.shape[2], dtype=kernel.dtype)
        wider = torch.cat([beside, x.to(kernel.dtype), beside], dim=1)
        above, below = (
            _zeros(count, *wider.shape[1:], dtype=kernel.dtype)
            for count in (self.before, self.after)
        )
        padded = torch.cat([above, wider, below])
        cut = padded.index_select(0, _taps(frames)).index_select(1, _taps(bins))
        cut = cut.reshape(-1, KERNEL, bins, KERNEL, x.shape[2]).permute(0, 2, 1, 3, 4)
        matrix = kernel.permute(0, 2, 3, 1).reshape(kernel.shape[0], -1)
        made = nn.functional.linear(cut.reshape(-1, matrix.shape[1]), matrix).to(wide)
        if isinstance(self.norm, CumulativeNorm):
            return self.norm(made.view(-1, bins, kernel.shape[0])).relu()
        return self.norm(made, wide).view(-1, bins, kernel.shape[0]).relu()


class Subsampling(nn.Module):
    """Two convolutions, and a product of what they leave of the bins."""

    def __init__(self, config: SoundConfig) -> None:
        super().__init__()
        first, second = config.subsampling_conv_channels
        self.layer0 = Convolution(config, 1, first)
        self.layer1 = Convolution(config, first, second)
        width = config.subsampled(config.num_features) * second
        self.input_proj_linear = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Return [L, C] for frames [J, M]."""
        x = self.layer1(self.layer0(frames[:, :, None]))
        return self.input_proj_linear(x.flatten(1).to(self.input_proj_linear.weight.dtype))


@dataclass(frozen=True)
class Blocks:
    """The blocks of a clip's queries, each with its context of keys."""

    queries: Tensor
    """Token of each query [B * W]; queries behind the last token repeat it."""
    keys: Tensor
    """Token of each key [B * K]; keys outside of the clip repeat its first or last token."""
    reach: Tensor
    """0 for a key that a query attends to, else `FAR` [B, W, K]."""
    taps: Tensor
    """Rows of the padded clip that the convolution of a layer sees for each token [L * taps]."""

    @classmethod
    def of(cls, config: SoundConfig, x: Tensor, dtype: torch.dtype) -> "Blocks":
        """Return the blocks of a clip x [L, C]."""
        length, width, context = x.shape[0], config.attention_chunk_size, _context(config)
        starts = torch.arange((length + width - 1) // width) * width
        left = config.attention_context_left - 1
        places = starts[:, None] + torch.arange(context) - left
        # In Gemma 4, reaches do not include their last token, to either side.
        shorter = 1 if config.encoder == "conformer" else 0
        ahead = max(config.attention_context_right - shorter, 0)
        apart = torch.arange(width)[:, None] - torch.arange(context) + left
        is_near = (apart <= left - shorter) & (apart >= -ahead)
        is_inside = (places >= 0) & (places < length)
        is_reached = is_inside[:, None, :] & is_near
        queries = (starts[:, None] + torch.arange(width)).flatten()
        taps = torch.arange(length)[:, None] + torch.arange(config.conv_kernel_size)
        return cls(
            queries.clamp(max=length - 1),
            places.flatten().clamp(min=0, max=length - 1),
            torch.where(is_reached, 0.0, FAR).to(dtype),
            taps.flatten(),
        )


class Attention(nn.Module):
    """Attention within a block's context, with learned scores of relative positions."""

    def __init__(self, config: SoundConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.q_proj, self.k_proj = (ClippedLinear(config, width, width) for _ in range(2))
        self.v_proj, self.post = (ClippedLinear(config, width, width) for _ in range(2))
        self.relative_k_proj = nn.Linear(width, width, bias=False)
        self.per_dim_scale = nn.Parameter(torch.empty(config.head_dim))

    def forward(self, x: Tensor, blocks: Blocks, positions: Tensor) -> Tensor:
        """Return the attention output [L, C] of x [L, C]; positions are [P, C]."""
        config, wide = self.config, blocks.reach.dtype
        width, context = config.attention_chunk_size, _context(config)
        scale = _softplus(self.per_dim_scale.to(wide))
        query = self._heads(self.q_proj(x).to(wide).index_select(0, blocks.queries))
        query = query * (scale * (config.head_dim**-0.5 * Q_FACTOR))
        key = self._heads(self.k_proj(x).to(wide).index_select(0, blocks.keys))
        if config.encoder == "conformer":
            key = key * K_FACTOR
        value = self._heads(self.v_proj(x).to(wide).index_select(0, blocks.keys))
        relative = self._heads(self.relative_k_proj(positions).to(wide))
        scores = self._blocks(query, width) @ self._blocks(key, context).transpose(2, 3)
        scores = scores + self._shifted(query @ relative.transpose(1, 2))
        cap = config.attention_logit_cap
        weights = ((scores / cap).tanh() * cap + blocks.reach).softmax(-1)
        mixed = (weights @ self._blocks(value, context)).permute(1, 2, 0, 3)
        return self.post(mixed.reshape(-1, x.shape[1])[: x.shape[0]].to(x.dtype))

    def _heads(self, x: Tensor) -> Tensor:
        """Return [N, rows, H] of x [rows, C]."""
        return x.view(-1, self.config.num_attention_heads, self.config.head_dim).transpose(0, 1)

    def _blocks(self, x: Tensor, width: int) -> Tensor:
        """Return [N, B, width, H] of x [N, B * width, H]."""
        return x.reshape(self.config.num_attention_heads, -1, width, self.config.head_dim)

    def _shifted(self, scores: Tensor) -> Tensor:
        """Return the scores [N, B, W, K] of keys, from those of positions [N, B * W, P].

        Position 0 is that of a block's first key for its first query, of its second key for its
        second query, and so on. Source: appendix B of arXiv 1901.02860.
        """
        config, context = self.config, _context(self.config)
        width, heads = config.attention_chunk_size, config.num_attention_heads
        behind = _zeros(heads, scores.shape[1], context + 1 - scores.shape[2], dtype=scores.dtype)
        padded = torch.cat([scores, behind], dim=2)
        rows = padded.reshape(heads, -1, width * (context + 1))
        return rows[:, :, : width * context].reshape(heads, -1, width, context)


class FeedForward(nn.Module):
    """Two products with SiLU between them, of which a part is added."""

    def __init__(self, config: SoundConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.pre_layer_norm, self.post_layer_norm = (RMSNorm(width, NORM_EPSILON) for _ in range(2))
        self.ffw_layer_1 = ClippedLinear(config, width, 4 * width)
        self.ffw_layer_2 = ClippedLinear(config, 4 * width, width)

    def forward(self, x: Tensor, inner: torch.dtype) -> Tensor:
        """Return the residual stream [L, C]."""
        limit = _limit(self.config, inner)
        hidden = self.pre_layer_norm(_bounded(x, limit), inner)
        hidden = self.ffw_layer_2(nn.functional.silu(self.ffw_layer_1(hidden)))
        added = self.post_layer_norm(_bounded(hidden, limit), x.dtype)
        return x + added * self.config.residual_weight


class LightConvolution(nn.Module):
    """A gated product, a convolution of each channel by itself, and a product."""

    def __init__(self, config: SoundConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.pre_layer_norm = RMSNorm(width, config.rms_norm_eps)
        self.linear_start = ClippedLinear(config, width, 2 * width)
        self.depthwise_conv1d = Kernel(width, 1, config.conv_kernel_size)
        self.conv_norm = RMSNorm(width, config.rms_norm_eps)
        self.linear_end = ClippedLinear(config, width, width)

    def forward(self, x: Tensor, inner: torch.dtype, blocks: Blocks) -> Tensor:
        """Return the residual stream [L, C]."""
        taps, limit = self.config.conv_kernel_size, _limit(self.config, inner)
        gated = nn.functional.glu(self.linear_start(self.pre_layer_norm(x, inner)), dim=-1)
        wide = blocks.reach.dtype
        padded = torch.cat([_zeros(taps - 1, x.shape[1], dtype=wide), gated.to(wide)])
        cut = padded.index_select(0, blocks.taps).view(-1, taps, x.shape[1])
        made = (cut * self.depthwise_conv1d.weight.to(wide)[:, 0].t()).sum(1)
        hidden = nn.functional.silu(self.conv_norm(_bounded(made, limit), inner))
        return x + self.linear_end(hidden).to(x.dtype)


class Layer(nn.Module):
    """Attention and a convolution, between two half-steps of feed-forward."""

    def __init__(self, config: SoundConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.feed_forward1, self.feed_forward2 = FeedForward(config), FeedForward(config)
        self.self_attn, self.lconv1d = Attention(config), LightConvolution(config)
        self.norm_pre_attn, self.norm_post_attn = (RMSNorm(width, NORM_EPSILON) for _ in range(2))
        self.norm_out = RMSNorm(width, NORM_EPSILON)

    def forward(self, x: Tensor, inner: torch.dtype, blocks: Blocks, positions: Tensor) -> Tensor:
        """Return the residual stream [L, C]."""
        limit = _limit(self.config, inner)
        x = self.feed_forward1(x, inner)
        hidden = self.norm_pre_attn(_bounded(x, limit), inner)
        attended = _bounded(self.self_attn(hidden, blocks, positions), limit)
        x = self.lconv1d(x + self.norm_post_attn(attended, x.dtype), inner, blocks)
        x = self.feed_forward2(x, inner)
        return self.norm_out(_bounded(x, limit))


class Tower(nn.Module):
    """Frames to features, without a projector."""

    def __init__(self, config: SoundConfig) -> None:
        super().__init__()
        self.config = config
        self.subsample_conv_projection = Subsampling(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        if config.encoder == "conformer":
            self.output_proj = nn.Linear(config.hidden_size, config.output_size)

    def forward(self, frames: Tensor) -> Tensor:
        """Return features [L, C] for frames [J, M]."""
        x = self.subsample_conv_projection(frames)
        inner = x.dtype
        wide = torch.promote_types(inner, torch.float32)
        positions = _positions(self.config, wide).to(inner)
        blocks = Blocks.of(self.config, x, wide)
        # Activations may exceed 65,504, the largest float16, as those of the decoder do.
        x = x.to(wide if inner == torch.float16 else inner)
        for layer in self.layers:
            x = layer(x, inner, blocks, positions)
        if self.config.encoder == "conformer":
            return self.output_proj(x.to(inner)).to(wide)
        return x[:: self.config.reduction_factor].to(wide)


def _context(config: SoundConfig) -> int:
    """Return how many keys a block of queries has."""
    sides = config.attention_context_left - 1 + config.attention_context_right
    return config.attention_chunk_size + sides


def _zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return zeros to concatenate; ONNX Runtime has no kernel for CUDA that pads."""
    return torch.zeros((), dtype=dtype).expand(*shape)


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), for which ONNX Runtime has no kernel for CUDA."""
    return x.relu() + (1 + (-x.abs()).exp()).log()


def _taps(number: int) -> Tensor:
    """Return the rows [number * KERNEL] of a padded axis that a halving convolution sees."""
    return (torch.arange(number)[:, None] * 2 + torch.arange(KERNEL)).flatten()


def _positions(config: SoundConfig, dtype: torch.dtype) -> Tensor:
    """Return sines and cosines [P, C] of the relative positions, the farthest one first."""
    first = config.attention_context_left - 1
    last = -config.attention_context_right
    if config.encoder == "conformer":
        first, last = _context(config) // 2, 0
    number = config.hidden_size // 2
    step = math.log(MAX_TIMESCALE) / max(number - 1, 1)
    frequencies = (torch.arange(number, dtype=dtype) * -step).exp()
    angles = torch.arange(first, last - 1, -1, dtype=dtype)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _limit(config: SoundConfig, inner: torch.dtype) -> float:
    """Return the largest magnitude that goes into a norm."""
    return min(config.gradient_clipping, torch.finfo(inner).max)


def _bounded(x: Tensor, limit: float) -> Tensor:
    """Return x between -limit and limit, by an op of float32: CUDA has none that clips bfloat16."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide).clamp(-limit, limit).to(x.dtype)
