"""The layers of MobileNetV5, the tower of pictures of Gemma 3n.

No `config.json` says them: it names an architecture of timm. Source: the definition of
`mobilenetv5_300m_enc` in timm 1.0.31 (`timm/models/mobilenetv5.py`), whose blocks are those of
MobileNetV4 (https://arxiv.org/abs/2404.10518).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

STEM_STRIDE = 2
"""Pixels from one place of the stem's output to the next."""
FUSED_EXPANSION = 2
"""Channels between the two products of the fusion, for each of its input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeBlock:
    """A convolution over neighbors and all channels, then a product."""

    width: int
    """Channels of the output."""
    kernel_size: int = 3
    stride: int = 1
    expansion: int = 4
    """Channels between the two, for each channel of the input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InvertedBlock:
    """Two products, with a convolution of each channel by itself before or between them."""

    width: int
    """Channels of the output."""
    start_kernel_size: int = 0
    """Places along a side that the convolution before the products sees; 0 for none."""
    middle_kernel_size: int = 0
    """The same for the convolution between them."""
    stride: int = 1
    expansion: int = 2
    """Channels between the products, for each channel of the input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBlock:
    """Attention of several heads of queries to one head of keys and values."""

    width: int
    """Channels of the input and the output."""
    num_heads: int
    head_dim: int
    key_stride: int = 1
    """Places from one key to the next."""
    kernel_size: int = 3
    """Places along a side that the convolution before keys sees, if their stride is above 1."""

    @property
    def stride(self) -> int:
        """Places of the input from one of the output to the next."""
        return 1


Block = EdgeBlock | InvertedBlock | AttentionBlock


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A stem, stages of blocks, and the fusion of the last two stages."""

    image_size: int
    """Height and width of a picture in pixels."""
    stem_width: int
    """Channels of the stem's output."""
    stages: tuple[tuple[Block, ...], ...]
    output_side: int
    """Height and width of the features."""
    hidden_size: int
    """Channels of the features."""

    def placed_blocks(self) -> Iterator[tuple[str, Block, int, int]]:
        """Yield each block with its name, the channels of its input, and the input's side."""
        width, side = self.stem_width, self.image_size // STEM_STRIDE
        for number, stage in enumerate(self.stages):
            for index, block in enumerate(stage):
                yield f"{number}.{index}", block, width, side
                width, side = block.width, side // block.stride

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all stages."""
        return sum(map(len, self.stages))

    @property
    def fused_widths(self) -> tuple[int, int]:
        """Channels of the two stages that are fused."""
        return self.stages[-2][-1].width, self.stages[-1][-1].width

    @property
    def fused_stride(self) -> int:
        """Pixels along a side that one place of the fusion stands for."""
        strides = (block.stride for block in itertools.chain(*self.stages[:-1]))
        product = STEM_STRIDE
        for stride in strides:
            product *= stride
        return product


def _attentive(number: int, attention: AttentionBlock) -> tuple[Block, ...]:
    """Return blocks of attention, each with a block of products behind it."""
    return (attention, InvertedBlock(width=attention.width)) * number


def _narrow_and_wide(width: int) -> tuple[Block, ...]:
    """Return blocks that see 5 and 3 places along a side in turn."""
    return tuple(
        InvertedBlock(width=width, start_kernel_size=size, expansion=4) for size in (5, 3, 5, 3)
    )


ARCHITECTURES = {
    "mobilenetv5_300m_enc": Architecture(
        image_size=768,
        stem_width=64,
        stages=(
            (EdgeBlock(width=128, stride=2), EdgeBlock(width=128), EdgeBlock(width=128)),
            (
                InvertedBlock(
                    width=256, start_kernel_size=3, middle_kernel_size=5, stride=2, expansion=6
                ),
                *_narrow_and_wide(256),
            ),
            (
                InvertedBlock(
                    width=640, start_kernel_size=5, middle_kernel_size=5, stride=2, expansion=6
                ),
                *(InvertedBlock(width=640, start_kernel_size=5, expansion=4),) * 7,
                InvertedBlock(width=640, expansion=1),
                *_attentive(14, AttentionBlock(width=640, num_heads=12, head_dim=64, key_stride=2)),
            ),
            (
                InvertedBlock(
                    width=1280, start_kernel_size=5, middle_kernel_size=5, stride=2, expansion=6
                ),
                *_attentive(19, AttentionBlock(width=1280, num_heads=16, head_dim=96)),
            ),
        ),
        output_side=16,
        hidden_size=2048,
    )
}
"""The architectures that are read, by timm's names of them; Gemma 3n has this one in all sizes."""
