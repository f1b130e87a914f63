"""The tower of pictures and its projector in PyTorch, from pixels to embeddings of the decoder.

Parameters have the names of transformers' modules, `vision_tower` and `multi_modal_projector`. The
formulas follow `models/siglip/modeling_siglip.py`, `models/gemma3/modeling_gemma3.py` and
`models/paligemma/modeling_paligemma.py` of transformers 5.23.

The features depend on one picture alone: patches are rows of products with weights, and attention
stays within a picture (`export.ops.vision_attention`). No op needs cuDNN, which nothing else in a
graph of these models needs: patches are cut out by transposing, and pooling adds slices.

Dimensions: N pictures, I pixels of a side, G patches of a side, P = G * G, T = N * P, S pixels of a
patch's side, C channels of the tower, F feed-forward, L tokens of a picture, D hidden size of the
decoder.
"""

import math

import torch
from torch import Tensor, nn

from beam_gemma.model.signature import Signature
from beam_gemma.model.vision_config import VisionConfig
from export.modules.heads import Named
from export.modules.layers import RMSNorm
from export.ops.vision_attention import vision_attention


class LayerNorm(nn.Module):
    """Layer normalization; weight and bias are float32 for every model dtype."""

    def __init__(self, width: int, epsilon: float, *, has_bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        bias = nn.Parameter(torch.empty(width, dtype=torch.float32)) if has_bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self.epsilon = epsilon

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the normalized x [T, C] in `dtype`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        shape = self.weight.shape
        return nn.functional.layer_norm(wide, shape, self.weight, self.bias, self.epsilon).to(dtype)


class Embeddings(nn.Module):
    """Embeddings of patches and of their places."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        # A convolution whose steps are as wide as its kernel is a product with each patch.
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixels: Tensor, residual: torch.dtype) -> Tensor:
        """Return [T, C] in `residual` for pixels [N, 3, I, I] from 0 to 255."""
        config, inner = self.config, self.patch_embedding.weight.dtype
        size, side = config.patch_size, config.image_size // config.patch_size
        cut = pixels.reshape(-1, 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5)
        # Not in a 16-bit dtype, which has too few digits for colors.
        wide = torch.promote_types(inner, torch.float32)
        colors = cut.reshape(-1, 3, size**2).to(wide) / 255.0
        mean = torch.tensor(config.image_mean, dtype=wide).view(3, 1)
        std = torch.tensor(config.image_std, dtype=wide).view(3, 1)
        patches = ((colors - mean) / std).reshape(-1, 3 * size**2)
        embedded = self.patch_embedding(patches.to(inner)).to(residual)
        pictures = embedded.view(-1, config.num_patches, config.hidden_size)
        places = self.position_embedding.weight.to(residual)
        return (pictures + places).view(-1, config.hidden_size)


class Attention(nn.Module):
    """Attention among the patches of a picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention output [T, C]."""
        config = self.config
        heads = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        scale = config.head_dim**-0.5
        attended = vision_attention(*heads, config.num_patches, config.num_attention_heads, scale)
        return self.out_proj(attended)


class FeedForward(nn.Module):
    """Two products with the tanh approximation of GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward output [T, C]."""
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    """Attention and feed-forward, with a norm before each.

    The residual stream may have a wider dtype than `inner`, in which attention and feed-forward
    compute.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.layer_norm1, self.layer_norm2 = LayerNorm(width, epsilon), LayerNorm(width, epsilon)
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, inner: torch.dtype) -> Tensor:
        """Return the residual stream [T, C]."""
        x = x + self.self_attn(self.layer_norm1(x, inner)).to(x.dtype)
        return x + self.mlp(self.layer_norm2(x, inner)).to(x.dtype)


class Encoder(nn.Module):
    """The layers of the tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Tower(nn.Module):
    """A SigLIP tower without its pooling head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor, inner: torch.dtype) -> Tensor:
        """Return [T, C] in float32 or wider for pixels [N, 3, I, I]."""
        wide = torch.promote_types(inner, torch.float32)
        # Activations may exceed 65,504, the largest float16, as those of the decoder do.
        x = self.embeddings(pixels, wide if inner == torch.float16 else inner)
        for layer in self.encoder.layers:
            x = layer(x, inner)
        return self.post_layernorm(x, wide)


class PooledProjector(nn.Module):
    """Gemma 3: means of squares of patches, a norm and a matrix."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        shape = config.hidden_size, hidden_size
        self.mm_input_projection_weight = nn.Parameter(torch.empty(shape))
        self.mm_soft_emb_norm = RMSNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N * L, D] for x [T, C] in float32 or wider."""
        config, matrix = self.config, self.mm_input_projection_weight
        side = math.isqrt(config.num_image_tokens)
        step = math.isqrt(config.num_patches) // side
        rows = x.view(-1, side, step, side * step, config.hidden_size)
        rows = sum((rows[:, :, i] for i in range(1, step)), rows[:, :, 0])
        cells = rows.reshape(-1, side, side, step, config.hidden_size)
        cells = sum((cells[:, :, :, i] for i in range(1, step)), cells[:, :, :, 0])
        means = cells.reshape(-1, config.hidden_size) / step**2
        return self.mm_soft_emb_norm(means, matrix.dtype) @ matrix


class LinearProjector(nn.Module):
    """PaliGemma: a matrix and a bias for each patch."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N * L, D] for x [T, C] in float32 or wider."""
        return self.linear(x.to(self.linear.weight.dtype))


class VisionModel(nn.Module):
    """Pictures to embeddings that take the place of those of tokens."""

    def __init__(self, config: VisionConfig, signature: Signature) -> None:
        super().__init__()
        self.signature = signature
        self.vision_tower = Tower(config)
        projectors = {"pooled": PooledProjector, "linear": LinearProjector}
        self.multi_modal_projector = projectors[config.projector](config, signature.hidden_size)

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Compute features; names are those of `beam_gemma.model.signature`.

        Args:
            step: `pixels`.
            state: Empty.

        Returns:
            `image_features`, and the empty state.
        """
        inner = self.vision_tower.embeddings.patch_embedding.weight.dtype
        features = self.multi_modal_projector(self.vision_tower(step["pixels"], inner))
        shape = -1, self.signature.num_image_tokens, self.signature.hidden_size
        return {"image_features": features.view(shape)}, state
