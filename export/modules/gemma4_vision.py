"""How Gemma 4 sees: a tower over patches, or a projection of squares of pixels without one.

Pictures keep their ratio, so that their number of tokens varies. A graph computes one at a time,
and takes the patches of each token together, so that it computes no shape. Parameters have the
names of published files: `vision_tower` or `vision_embedder`, and `embed_vision`. The formulas
follow `models/gemma4` and `models/gemma4_unified` of transformers 5.23.

Dimensions: P patches of a picture, S pixels of a patch's side, C channels of the tower, N heads, H
head dimension, L tokens of a picture, D hidden size of the decoder.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from beam_gemma.model.signature import Signature
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.vision_config import VisionConfig
from export.modules.heads import Named
from export.modules.layers import RMSNorm, unit_norm
from export.modules.vision import LayerNorm
from export.ops.reference import rotate_heads
from export.ops.vision_attention import vision_attention

THETA = 100.0
"""Base of the wavelengths of the tower's rotary embedding."""
LAYER_NORM_EPSILON = 1e-5
"""That of PyTorch's layer normalization, which no config.json sets."""


class ClippedLinear(nn.Module):
    """A product whose inputs and outputs may have learned bounds."""

    def __init__(self, config: VisionConfig | SoundConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.has_bounds = config.use_clipped_linears
        if self.has_bounds:
            self.input_min, self.input_max = (nn.Parameter(torch.empty(1)) for _ in range(2))
            self.output_min, self.output_max = (nn.Parameter(torch.empty(1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of x [P, inputs]."""
        if not self.has_bounds:
            return self.linear(x)
        x = _between(x, self.input_min, self.input_max)
        return _between(self.linear(x), self.output_min, self.output_max)


class PatchEmbedder(nn.Module):
    """Embeddings of patches and of their places along both sides."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        shape = 2, config.position_embedding_size, config.hidden_size
        self.position_embedding_table = nn.Parameter(torch.empty(shape))

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        """Return [P, C] for patches [P, 3 S^2] of colors from 0 to 255 at places [P, 2]."""
        inner = self.input_proj.weight.dtype
        embedded = self.input_proj((_colors(patches, inner) * 2.0 - 1.0).to(inner))
        return embedded + _of_places(self.position_embedding_table.unbind(), places)


class Attention(nn.Module):
    """Attention among the patches of a picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.epsilon = config.layer_norm_eps
        width = config.hidden_size
        self.q_proj, self.k_proj = (ClippedLinear(config, width, width) for _ in range(2))
        self.v_proj, self.o_proj = (ClippedLinear(config, width, width) for _ in range(2))
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, self.epsilon) for _ in range(2))

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Return the attention output [P, C]; turns are cosines and sines [P, 2, H / 4]."""
        query = self._turned(self.q_norm(self._heads(self.q_proj(x))), turns)
        key = self._turned(self.k_norm(self._heads(self.k_proj(x))), turns)
        value = self._heads(self.v_proj(x))
        value = unit_norm(value, self.epsilon, x.dtype).reshape(x.shape)
        return self.o_proj(vision_attention(query, key, value, 0, self.num_heads, 1.0))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(-1, self.num_heads, self.head_dim)

    def _turned(self, heads: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Return [P, C] with the first half of each head turned by its column, the other by row.

        Args:
            heads: [P, N, H].
            turns: Cosines and sines [P, 2, H / 4] of the patches' columns and rows.
        """
        halves = heads.view(-1, self.num_heads * 2, self.head_dim // 2)
        cos, sin = (turn.repeat(1, self.num_heads, 1).to(heads.dtype) for turn in turns)
        return rotate_heads(halves, cos, sin).reshape(-1, self.num_heads * self.head_dim)


class FeedForward(nn.Module):
    """GeGLU with the tanh approximation of GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (ClippedLinear(config, width, wide) for _ in range(2))
        self.down_proj = ClippedLinear(config, wide, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward output [P, C]."""
        gate = nn.functional.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, with a norm before and after each."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), FeedForward(config)
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.input_layernorm = RMSNorm(width, epsilon)
        self.post_attention_layernorm = RMSNorm(width, epsilon)
        self.pre_feedforward_layernorm = RMSNorm(width, epsilon)
        self.post_feedforward_layernorm = RMSNorm(width, epsilon)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], inner: torch.dtype) -> Tensor:
        """Return the residual stream [P, C]."""
        attended = self.self_attn(self.input_layernorm(x, inner), turns)
        x = x + self.post_attention_layernorm(attended, x.dtype)
        wide = self.mlp(self.pre_feedforward_layernorm(x, inner))
        return x + self.post_feedforward_layernorm(wide, x.dtype)


class Encoder(nn.Module):
    """The layers of the tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Tower(nn.Module):
    """The tower of Gemma 4, with the means of squares of patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        assert config.pooling_kernel_size is not None
        self.config, self.kernel = config, config.pooling_kernel_size
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = Encoder(config)
        if config.standardize:
            self.std_bias = nn.Parameter(torch.empty(config.hidden_size))
            self.std_scale = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        """Return [L, C] in float32 or wider for patches [P, 3 S^2] at places [P, 2]."""
        inner = self.patch_embedder.input_proj.weight.dtype
        wide = torch.promote_types(inner, torch.float32)
        turns = self._turns(places, wide)
        # Activations may exceed 65,504, the largest float16, as those of the decoder do.
        x = self.patch_embedder(patches, places).to(wide if inner == torch.float16 else inner)
        for layer in self.encoder.layers:
            x = layer(x, turns, inner)
        return self._pooled(x.to(wide))

    def _turns(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [P, 2, H / 4] of the patches' columns and rows."""
        width = self.config.head_dim // 2
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        frequencies = (1.0 / THETA**exponents).to(dtype)
        angles = places[:, :, None].to(dtype) * frequencies
        return angles.cos(), angles.sin()

    def _pooled(self, x: Tensor) -> Tensor:
        """Return the features [L, C] of x [P, C], means over the patches of a token."""
        parts = x.view(-1, self.kernel**2, self.config.hidden_size)
        sums = parts[:, 0]
        for i in range(1, self.kernel**2):
            sums = sums + parts[:, i]
        features = sums / self.kernel**2 * self.config.hidden_size**0.5
        if self.config.standardize:
            bias, scale = (p.to(x.dtype) for p in (self.std_bias, self.std_scale))
            features = (features - bias) * scale
        return features


class Embedder(nn.Module):
    """A norm without a weight, and a matrix into the decoder's width."""

    def __init__(self, width: int, epsilon: float, hidden_size: int) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.embedding_projection = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [L, D] of features x [L, C]."""
        inner = self.embedding_projection.weight.dtype
        return self.embedding_projection(unit_norm(x, self.epsilon, inner))


class SquareEmbedder(nn.Module):
    """A projection of squares of pixels, in place of a tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, colors = config.hidden_size, 3 * config.image_step**2
        self.patch_ln1 = LayerNorm(colors, LAYER_NORM_EPSILON)
        self.patch_dense = nn.Linear(colors, width)
        self.patch_ln2 = LayerNorm(width, LAYER_NORM_EPSILON)
        shape = config.position_embedding_size, 2, width
        self.pos_embedding = nn.Parameter(torch.empty(shape))
        self.pos_norm = LayerNorm(width, LAYER_NORM_EPSILON)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        """Return [L, C] for squares [L, 3 S^2] of colors from 0 to 255 at places [L, 2]."""
        inner = self.patch_dense.weight.dtype
        wide = torch.promote_types(inner, torch.float32)
        squares = self.patch_ln1(_colors(patches, inner), inner)
        x = self.patch_ln2(self.patch_dense(squares), wide)
        x = x + _of_places(self.pos_embedding.unbind(1), places).to(wide)
        return self.pos_norm(x, wide)


class Gemma4Vision(nn.Module):
    """A picture to embeddings that take the place of those of tokens."""

    def __init__(self, config: VisionConfig, signature: Signature) -> None:
        super().__init__()
        if config.projector == "patches":
            self.vision_embedder = SquareEmbedder(config)
        else:
            self.vision_tower = Tower(config)
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.embed_vision = Embedder(width, epsilon, signature.hidden_size)

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Compute features; names are those of `beam_gemma.model.signature`.

        Args:
            step: `patches` and `patch_places` of one picture.
            state: Empty.

        Returns:
            `image_features`, and the empty state.
        """
        tower = self.vision_tower if hasattr(self, "vision_tower") else self.vision_embedder
        features = tower(step["patches"].flatten(0, 1), step["patch_places"].flatten(0, 1))
        return {"image_features": self.embed_vision(features)}, state


def _between(x: Tensor, least: Tensor, most: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, least), most)


def _colors(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Return colors from 0 to 1, in float32 or wider.

    Not in a 16-bit dtype, which has too few digits for colors.
    """
    return patches.to(torch.promote_types(dtype, torch.float32)) / 255.0


def _of_places(tables: Sequence[Tensor], places: Tensor) -> Tensor:
    """Return the embeddings [P, C] of columns and rows [P, 2], from a table of each."""
    of_columns, of_rows = (
        table.index_select(0, place) for table, place in zip(tables, places.unbind(1), strict=True)
    )
    return of_columns + of_rows
