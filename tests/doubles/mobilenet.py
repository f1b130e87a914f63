"""MobileNetV5 as timm defines it, with maps [N, C, H, W] and its names of parameters.

timm needs torchvision, whose wheel does not load beside a PyTorch for the CPU alone, so this double
takes its place. `GOLDEN` of `tests/export/test_mobilenet.py` holds it to timm's own numbers:
`python -m tests.doubles.mobilenet` prints them where both packages can be imported.

Source: `mobilenetv5.py`, `_efficientnet_blocks.py` and `attention2d.py` of timm 1.0.31.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from beam_gemma.model.mobilenet_v5 import (
    ARCHITECTURES,
    Architecture,
    AttentionBlock,
    Block,
    EdgeBlock,
    InvertedBlock,
)

TINY_NAME = "mobilenetv5_tiny"
TINY = Architecture(
    image_size=96,
    stem_width=16,
    stages=(
        (EdgeBlock(width=16, stride=2), EdgeBlock(width=16)),
        (
            InvertedBlock(
                width=24, start_kernel_size=3, middle_kernel_size=5, stride=2, expansion=6
            ),
            InvertedBlock(width=24, start_kernel_size=5, expansion=4),
        ),
        (
            InvertedBlock(
                width=32, start_kernel_size=5, middle_kernel_size=5, stride=2, expansion=6
            ),
            InvertedBlock(width=32, expansion=1),
            AttentionBlock(width=32, num_heads=3, head_dim=16, key_stride=2),
            InvertedBlock(width=32),
        ),
        (
            InvertedBlock(
                width=48, start_kernel_size=5, middle_kernel_size=5, stride=2, expansion=6
            ),
            AttentionBlock(width=48, num_heads=4, head_dim=8),
            InvertedBlock(width=48),
        ),
    ),
    output_side=2,
    hidden_size=40,
)
"""One block of each kind; features of 2 x 2 places."""
ARCHITECTURES.setdefault(TINY_NAME, TINY)


class Norm(nn.Module):
    """timm's `RmsNorm2d`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        return functional.rms_norm(rows, self.weight.shape, self.weight, 1e-6).movedim(-1, 1)


class Conv(nn.Conv2d):
    """A convolution with TensorFlow's padding `SAME`."""

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return self._conv_forward(functional.pad(x, sides), self.weight, self.bias)


def conv(channels: int, outputs: int, size: int = 1, **other: Any) -> Conv:
    return Conv(channels, outputs, size, **{"bias": False, **other})


def gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


class ConvNorm(nn.Module):
    def __init__(self, layer: Conv, act: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = layer, Norm(layer.out_channels), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.act(x) if self.act else x


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(1, -1, 1, 1)


class EdgeResidual(nn.Module):
    def __init__(self, block: EdgeBlock, channels: int) -> None:
        super().__init__()
        wide = channels * block.expansion
        self.conv_exp = conv(channels, wide, block.kernel_size, stride=block.stride)
        self.bn1, self.conv_pwl = Norm(wide), conv(wide, block.width)
        self.bn2 = Norm(block.width)
        self.skip = block.stride == 1 and channels == block.width

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv_pwl(gelu(self.bn1(self.conv_exp(x)))))
        return x + y if self.skip else y


class Inverted(nn.Module):
    def __init__(self, block: InvertedBlock, channels: int, *, scaled: bool = True) -> None:
        super().__init__()
        wide, start, middle = (
            channels * block.expansion,
            block.start_kernel_size,
            block.middle_kernel_size,
        )
        self.dw_start: nn.Module = nn.Identity()
        self.dw_mid: nn.Module = nn.Identity()
        if start:
            stride = 1 if middle else block.stride
            self.dw_start = ConvNorm(
                conv(channels, channels, start, stride=stride, groups=channels)
            )
        self.pw_exp = ConvNorm(conv(channels, wide), gelu)
        if middle:
            layer = conv(wide, wide, middle, stride=block.stride, groups=wide)
            self.dw_mid = ConvNorm(layer, gelu)
        self.pw_proj = ConvNorm(conv(wide, block.width))
        self.layer_scale = LayerScale(block.width) if scaled else nn.Identity()
        self.skip = scaled and block.stride == 1 and channels == block.width

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw_proj(self.dw_mid(self.pw_exp(self.dw_start(x))))
        y = self.layer_scale(y)
        return x + y if self.skip else y


class MultiQuery(nn.Module):
    def __init__(self, block: AttentionBlock) -> None:
        super().__init__()
        width, queries = block.width, block.num_heads * block.head_dim
        self.num_heads, self.head_dim = block.num_heads, block.head_dim
        self.query = nn.Sequential()
        self.query.add_module("proj", conv(width, queries))
        self.key, self.value, self.output = (nn.Sequential() for _ in range(3))
        for part in (self.key, self.value):
            if block.key_stride > 1:
                layer = conv(width, width, 3, stride=block.key_stride, groups=width)
                part.add_module("down_conv", layer)
                part.add_module("norm", Norm(width))
            part.add_module("proj", conv(width, block.head_dim))
        self.output.add_module("proj", conv(queries, width))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(1, (self.num_heads, self.head_dim)).flatten(3)
        key, value = self.key(x).flatten(2), self.value(x).flatten(2)
        scores = torch.einsum("nhdp,ndk->nhpk", query, key) * self.head_dim**-0.5
        found = torch.einsum("nhpk,ndk->nhdp", scores.softmax(-1), value)
        return self.output(found.reshape(len(x), -1, *x.shape[2:]))


class Attentive(nn.Module):
    def __init__(self, block: AttentionBlock) -> None:
        super().__init__()
        self.norm, self.attn = Norm(block.width), MultiQuery(block)
        self.layer_scale = LayerScale(block.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale(self.attn(self.norm(x)))


class Fusion(nn.Module):
    def __init__(self, built: Architecture) -> None:
        super().__init__()
        self.side = built.output_side
        self.ffn = Inverted(
            InvertedBlock(width=built.hidden_size), sum(built.fused_widths), scaled=False
        )
        self.norm = Norm(built.hidden_size)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        coarse = functional.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        found = self.ffn(torch.cat([fine, coarse], dim=1))
        return self.norm(functional.avg_pool2d(found, found.shape[-1] // self.side))


class MobileNet(nn.Module):
    """The tower."""

    def __init__(self, built: Architecture) -> None:
        super().__init__()
        layer = conv(3, built.stem_width, 3, stride=2, bias=True)
        self.conv_stem = ConvNorm(layer, gelu)
        self.blocks = nn.Sequential(*(nn.Sequential() for _ in built.stages))
        for name, block, channels, _ in built.placed_blocks():
            stage, index = name.split(".")
            self.blocks[int(stage)].add_module(index, _made(block, channels))
        self.msfa = Fusion(built)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [N, C, H, W] of colors [N, 3, S, S] from 0 to 1."""
        outputs = [self.conv_stem(x)]
        for stage in self.blocks:
            outputs.append(stage(outputs[-1]))
        return self.msfa(outputs[-2], outputs[-1])


def _made(block: Block, channels: int) -> nn.Module:
    if isinstance(block, EdgeBlock):
        return EdgeResidual(block, channels)
    return Inverted(block, channels) if isinstance(block, InvertedBlock) else Attentive(block)


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """Fill a model with numbers that follow from the place of each alone, in any release of torch.

    They are between -1 and 1, divided by a root in kernels, and near 1 in norms and scales.
    """
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        noise = _noise(parameter.numel(), number).reshape(parameter.shape)
        if parameter.ndim == 1 and not name.endswith("bias"):
            parameter.copy_(1 + 0.3 * noise)
        else:
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(noise * (3 / fan) ** 0.5)
    return model.eval()


def colors(side: int) -> Tensor:
    """Return colors [1, 3, S, S] from 0 to 1 that follow from their places."""
    return (_noise(3 * side**2, 0).reshape(1, 3, side, side) + 1) / 2


def _noise(count: int, number: int) -> Tensor:
    """Return numbers [count] from -1 to 1 in float64, made of whole numbers."""
    places = torch.arange(count)
    mixed = (places**2 * 3 + places * 48_271 + number * 7_919) % 65_521
    return mixed.double() / 32_760 - 1


def timm_tiny() -> nn.Module:
    """Return `TINY` as timm builds it."""
    library = torch.library.Library("torchvision", "DEF")  # which its own wheel may lack
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from timm.layers import RmsNorm2d  # type: ignore[import-not-found]
    from timm.models import mobilenetv5  # type: ignore[import-not-found]
    from timm.models._efficientnet_builder import (  # type: ignore[import-not-found]
        decode_arch_def,
    )

    def text(block: Block) -> str:
        if isinstance(block, EdgeBlock):
            return f"er_r1_k{block.kernel_size}_s{block.stride}_e{block.expansion}_c{block.width}"
        if isinstance(block, InvertedBlock):
            sizes = f"a{block.start_kernel_size}_k{block.middle_kernel_size}"
            return f"uir_r1_{sizes}_s{block.stride}_e{block.expansion}_c{block.width}"
        heads = f"h{block.num_heads}_v{block.key_stride}_s1_d{block.head_dim}"
        return f"mqa_r1_k{block.kernel_size}_{heads}_c{block.width}"

    names = [[text(block) for block in stage] for stage in TINY.stages]
    model = mobilenetv5.MobileNetV5Encoder(
        decode_arch_def(names),
        stem_size=TINY.stem_width,
        pad_type="same",
        norm_layer=RmsNorm2d,
        msfa_output_resolution=TINY.output_side,
        layer_scale_init_value=1e-5,
    )
    model.msfa = mobilenetv5.MobileNetV5MultiScaleFusionAdapter(
        list(TINY.fused_widths), TINY.hidden_size, TINY.output_side
    )
    return model


if __name__ == "__main__":
    found = filled(timm_tiny().double())(colors(TINY.image_size))
    sys.stdout.write(f"{[round(x, 12) for x in found.flatten()[::16].tolist()]}\n")
