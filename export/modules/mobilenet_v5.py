"""How Gemma 3n sees: MobileNetV5, whose blocks look around each place, then a projection.

Parameters have the names of published files: those of timm's tower under `vision_tower.timm_model`,
and `embed_vision`. The formulas follow `timm/models/mobilenetv5.py` of timm 1.0.31, and
`Gemma3nMultimodalEmbedder` and `Gemma3nModel.get_image_features` of transformers 5.23.

Features are rows, one for each place of each picture, as in every other tower: what a published
file calls a convolution of one place is a product of rows. Only convolutions of several places take
the channels apart, and they compute in float32 for every model dtype, since the released kernels
have weights that would make numbers too large for float16.

Dimensions: N pictures, S places along a side, T = N * S * S, C channels, O channels of an output, L
places of the features, D hidden size of the decoder.
"""

import torch
from torch import Tensor, nn

from beam_gemma.model.mobilenet_v5 import (
    ARCHITECTURES,
    FUSED_EXPANSION,
    STEM_STRIDE,
    Architecture,
    AttentionBlock,
    Block,
    EdgeBlock,
    InvertedBlock,
)
from beam_gemma.model.signature import Signature
from beam_gemma.model.vision_config import VisionConfig
from export.modules.heads import Named
from export.modules.layers import RMSNorm, root_mean_square, unit_norm
from export.ops.vision_attention import vision_attention

EPSILON = 1e-6
"""Epsilon of the tower's norms: the default of timm's `RmsNorm2d`, which no config.json sets."""
LEAST_SQUARE = 1e-20
"""Least mean square that a row is divided by; only rows of zeros, or nearly, have less."""


class Convolution(nn.Module):
    """A convolution of several places with zeros around; its weights are float32 for every dtype.

    The zeros are as many as give ceil(S / stride) places; of an odd number, one more lies behind.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        kernel_size: int,
        *,
        side: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        shape = outputs, channels // groups, kernel_size, kernel_size
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=torch.float32)) if bias else None
        self.stride, self.groups = stride, groups
        zeros = max((-(-side // stride) - 1) * stride + kernel_size - side, 0)
        self.before, self.after = zeros // 2, zeros - zeros // 2

    def forward(self, maps: Tensor) -> Tensor:
        """Return [N, O, S / stride, S / stride] in float32 or wider for maps [N, C, S, S]."""
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        padding = self.before
        if self.before != self.after:
            maps = nn.functional.pad(maps, (self.before, self.after) * 2)
            padding = 0
        return nn.functional.conv2d(
            maps, self.weight, self.bias, self.stride, padding, groups=self.groups
        )


class LayerScale(nn.Module):
    """A factor of each channel of what a block adds; float32 for every model dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Return x [T, C] times the factors, in its dtype."""
        return (x * self.gamma).to(x.dtype)


class Product(nn.Module):
    """A product of rows, then a norm, as `conv` and `bn` of a published file."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Linear(channels, outputs, bias=False)
        self.bn = RMSNorm(outputs, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized product [T, O] of x [T, C], in the dtype of x."""
        return self.bn(product(self.conv, x))


class Neighbors(nn.Module):
    """A convolution of each channel by itself, then a norm, as `conv` and `bn` of a file."""

    def __init__(self, width: int, kernel_size: int, *, side: int, stride: int = 1) -> None:
        super().__init__()
        self.side = side
        self.conv = Convolution(width, width, kernel_size, side=side, stride=stride, groups=width)
        self.bn = RMSNorm(width, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized rows of x [T, C], in its dtype."""
        return self.bn(rows_of(self.conv(maps_of(x, self.side))), x.dtype)


class EdgeResidual(nn.Module):
    """A convolution over neighbors and all channels, then a product."""

    def __init__(self, block: EdgeBlock, channels: int, side: int) -> None:
        super().__init__()
        self.side, self.has_skip = side, block.stride == 1 and channels == block.width
        wide = channels * block.expansion
        self.conv_exp = Convolution(
            channels, wide, block.kernel_size, side=side, stride=block.stride
        )
        self.bn1 = RMSNorm(wide, EPSILON)
        self.conv_pwl = nn.Linear(wide, block.width, bias=False)
        self.bn2 = RMSNorm(block.width, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x [T, C], in its dtype."""
        wide = gelu(self.bn1(rows_of(self.conv_exp(maps_of(x, self.side))), x.dtype))
        found = self.bn2(product(self.conv_pwl, wide))
        return x + found if self.has_skip else found


class InvertedResidual(nn.Module):
    """Two products, with a convolution of each channel before or between them."""

    def __init__(self, block: InvertedBlock, channels: int, side: int) -> None:
        super().__init__()
        self.has_skip = block.stride == 1 and channels == block.width
        wide = channels * block.expansion
        start, middle = block.start_kernel_size, block.middle_kernel_size
        # The last of the two convolutions skips places, where the block does.
        if start:
            stride = 1 if middle else block.stride
            self.dw_start = Neighbors(channels, start, side=side, stride=stride)
        self.pw_exp = Product(channels, wide)
        if middle:
            self.dw_mid = Neighbors(wide, middle, side=side, stride=block.stride)
        self.pw_proj = Product(wide, block.width)
        self.layer_scale = LayerScale(block.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x [T, C], in its dtype."""
        found = self.dw_start(x) if hasattr(self, "dw_start") else x
        found = gelu(self.pw_exp(found))
        if hasattr(self, "dw_mid"):
            found = gelu(self.dw_mid(found))
        found = self.layer_scale(self.pw_proj(found))
        return x + found if self.has_skip else found


class Keys(nn.Module):
    """Keys or values of places, of which only some may be taken."""

    def __init__(self, block: AttentionBlock, side: int) -> None:
        super().__init__()
        self.side, self.skips = side, block.key_stride > 1
        if self.skips:
            self.down_conv = Convolution(
                block.width,
                block.width,
                block.kernel_size,
                side=side,
                stride=block.key_stride,
                groups=block.width,
            )
            self.norm = RMSNorm(block.width, EPSILON)
        self.proj = nn.Linear(block.width, block.head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return one head of keys or values of x [T, C]."""
        if self.skips:
            x = self.norm(rows_of(self.down_conv(maps_of(x, self.side))), x.dtype)
        return self.proj(x)


class Projected(nn.Module):
    """A matrix under the name that a published file has for it."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, outputs, bias=False)


class Attention(nn.Module):
    """Attention of several heads of queries to one head of keys and values."""

    def __init__(self, block: AttentionBlock, side: int) -> None:
        super().__init__()
        self.head_dim, queries = block.head_dim, block.num_heads * block.head_dim
        self.num_queries = side**2 * block.num_heads
        self.num_keys = (-(-side // block.key_stride)) ** 2
        self.query = Projected(block.width, queries)
        self.key, self.value = Keys(block, side), Keys(block, side)
        self.output = Projected(queries, block.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention output of x [T, C], in its dtype."""
        query = self.query.proj(x)
        attended = vision_attention(
            query.view(-1, self.head_dim),
            self.key(x),
            self.value(x),
            self.num_queries,
            1,
            self.head_dim**-0.5,
            self.num_keys,
        )
        return self.output.proj(attended.view(query.shape))


class MobileAttention(nn.Module):
    """Attention with a norm before it."""

    def __init__(self, block: AttentionBlock, channels: int, side: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, EPSILON)
        self.attn = Attention(block, side)
        self.layer_scale = LayerScale(block.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x [T, C], in its dtype."""
        inner = self.attn.query.proj.weight.dtype
        return x + self.layer_scale(self.attn(self.norm(x, inner)).to(x.dtype))


class Stem(nn.Module):
    """The convolution of pixels."""

    def __init__(self, built: Architecture) -> None:
        super().__init__()
        side, width = built.image_size, built.stem_width
        self.conv = Convolution(3, width, 3, side=side, stride=STEM_STRIDE, bias=True)
        self.bn = RMSNorm(width, EPSILON)

    def forward(self, pixels: Tensor, residual: torch.dtype) -> Tensor:
        """Return [T, C] in `residual` for pixels [N, 3, S, S] from 0 to 255."""
        # Not in a 16-bit dtype, which has too few digits for colors.
        colors = pixels.to(torch.promote_types(residual, torch.float32)) / 255.0
        return gelu(self.bn(rows_of(self.conv(colors)), residual))


class FusedProducts(nn.Module):
    """The two products of the fusion."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        wide = channels * FUSED_EXPANSION
        self.pw_exp, self.pw_proj = Product(channels, wide), Product(wide, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return [T, O] for x [T, C], in its dtype."""
        return self.pw_proj(gelu(self.pw_exp(x)))


class Fusion(nn.Module):
    """The last two stages as one, at the places of the finer, then means of squares of places."""

    def __init__(self, built: Architecture) -> None:
        super().__init__()
        self.side = built.image_size // built.fused_stride
        self.output_side = built.output_side
        self.ffn = FusedProducts(sum(built.fused_widths), built.hidden_size)
        self.norm = RMSNorm(built.hidden_size, EPSILON)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Return [N * L, O] in float32 or wider for the rows of both stages."""
        side, half = self.side, self.side // 2
        repeated = coarse.view(-1, half, 1, half, 1, coarse.shape[1])
        repeated = repeated.expand(-1, -1, 2, -1, 2, -1).reshape(-1, coarse.shape[1])
        found = self.ffn(torch.cat((fine, repeated), dim=1))
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        step, count = side // self.output_side, found.shape[1]
        rows = found.view(-1, self.output_side, step, side, count)
        rows = sum((rows[:, :, i] for i in range(1, step)), rows[:, :, 0])
        cells = rows.reshape(-1, self.output_side, self.output_side, step, count)
        cells = sum((cells[:, :, :, i] for i in range(1, step)), cells[:, :, :, 0])
        return self.norm(cells.reshape(-1, count) / step**2)


class MobileNetV5(nn.Module):
    """The tower, under the names of timm."""

    def __init__(self, built: Architecture) -> None:
        super().__init__()
        self.conv_stem = Stem(built)
        stages: list[list[nn.Module]] = [[] for _ in built.stages]
        for name, block, channels, side in built.placed_blocks():
            stages[int(name.split(".")[0])].append(_made(block, channels, side))
        self.blocks = nn.ModuleList(map(nn.ModuleList, stages))
        self.msfa = Fusion(built)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features [N * L, C] in float32 or wider for pixels [N, 3, S, S] in uint8."""
        inner = self.msfa.ffn.pw_exp.conv.weight.dtype
        # Activations may exceed 65,504, the largest float16.
        residual = torch.float32 if inner == torch.float16 else inner
        outputs = [self.conv_stem(pixels, residual)]
        for stage in self.blocks:
            x = outputs[-1]
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
            outputs.append(x)
        return self.msfa(outputs[-2], outputs[-1])


class Wrapper(nn.Module):
    """The tower under the name that transformers gives one of timm."""

    def __init__(self, built: Architecture) -> None:
        super().__init__()
        self.timm_model = MobileNetV5(built)


class Embedder(nn.Module):
    """A matrix into the decoder's width between two norms, for features and for tokens.

    The token behind a picture goes through the same matrix, after a norm of its own.
    """

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        width, self.epsilon = config.hidden_size, config.layer_norm_eps
        self.row = config.end_token_row
        self.embedding = nn.Embedding(config.image_vocab_size, width)
        self.hard_embedding_norm = RMSNorm(width, self.epsilon)
        self.soft_embedding_norm = RMSNorm(width, self.epsilon)
        self.embedding_projection = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor, num_features: int) -> Tensor:
        """Return [N, L + 1, D] of features x [N * L, C]; the last of a picture is the token's."""
        inner, width = self.embedding_projection.weight.dtype, x.shape[1]
        soft = self.soft_embedding_norm(x, inner).view(-1, num_features, width)
        hard = self.hard_embedding_norm(self.embedding.weight[self.row : self.row + 1], inner)
        hard = hard.view(1, 1, width).expand(soft.shape[0], 1, width)
        rows = self.embedding_projection(torch.cat((soft, hard), dim=1).view(-1, width))
        found = unit_norm(rows, self.epsilon, inner)
        return found.view(-1, num_features + 1, found.shape[1])


class MobileNetVision(nn.Module):
    """Pictures to embeddings that take the place of those of tokens."""

    def __init__(self, config: VisionConfig, signature: Signature) -> None:
        super().__init__()
        assert config.architecture is not None
        self.num_features = config.num_image_tokens - 1
        self.factor = config.hidden_size**0.5
        self.vision_tower = Wrapper(ARCHITECTURES[config.architecture])
        self.embed_vision = Embedder(config, signature.hidden_size)

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Compute features; names are those of `beam_gemma.model.signature`.

        Args:
            step: `pixels`.
            state: Empty.

        Returns:
            `image_features`, and the empty state.
        """
        features = self.vision_tower.timm_model(step["pixels"]) * self.factor
        return {"image_features": self.embed_vision(features, self.num_features)}, state


def _made(block: Block, channels: int, side: int) -> nn.Module:
    """Return the module of a block."""
    if isinstance(block, EdgeBlock):
        return EdgeResidual(block, channels, side)
    if isinstance(block, InvertedBlock):
        return InvertedResidual(block, channels, side)
    return MobileAttention(block, channels, side)


def gelu(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU."""
    return nn.functional.gelu(x, approximate="tanh")


def product(matrix: nn.Linear, x: Tensor) -> Tensor:
    """Return the product [T, O] of a matrix with x [T, C], in the dtype of x.

    In float16, which holds neither x nor the product, each row is divided by its root mean square
    before, and multiplied after.
    """
    inner = matrix.weight.dtype
    if inner == x.dtype:
        return matrix(x)
    size = root_mean_square(x, least=LEAST_SQUARE)
    return matrix((x / size).to(inner)).to(x.dtype) * size


def maps_of(x: Tensor, side: int) -> Tensor:
    """Return rows x [N * S * S, C] as [N, C, S, S]."""
    return x.view(-1, side, side, x.shape[1]).permute(0, 3, 1, 2)


def rows_of(maps: Tensor) -> Tensor:
    """Return maps [N, C, S, S] as rows [N * S * S, C]."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
