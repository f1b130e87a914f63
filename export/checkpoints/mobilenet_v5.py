"""Names and shapes of what a Gemma 3n has for pictures, as in `export.modules.mobilenet_v5`."""

from beam_gemma.model.mobilenet_v5 import (
    ARCHITECTURES,
    FUSED_EXPANSION,
    Architecture,
    AttentionBlock,
    Block,
    EdgeBlock,
    InvertedBlock,
)
from beam_gemma.model.vision_config import VisionConfig

Shapes = dict[str, tuple[int, ...]]
TOWER, EMBEDDER = "vision_tower.timm_model.", "embed_vision."


def mobilenet_shapes(config: VisionConfig, hidden_size: int) -> Shapes:
    """Return the shape of every tensor for pictures.

    Args:
        config: The tower.
        hidden_size: Width of the decoder.
    """
    assert config.architecture is not None
    width = config.hidden_size
    embedder: Shapes = {
        "embedding.weight": (config.image_vocab_size, width),
        "hard_embedding_norm.weight": (width,),
        "soft_embedding_norm.weight": (width,),
        "embedding_projection.weight": (hidden_size, width),
    }
    tower = _tower(ARCHITECTURES[config.architecture])
    return {TOWER + name: shape for name, shape in tower.items()} | {
        EMBEDDER + name: shape for name, shape in embedder.items()
    }


def _tower(built: Architecture) -> Shapes:
    """Return the shapes of a tower."""
    shapes: Shapes = {
        "conv_stem.conv.weight": (built.stem_width, 3, 3, 3),
        "conv_stem.conv.bias": (built.stem_width,),
        "conv_stem.bn.weight": (built.stem_width,),
    }
    for place, block, channels, _ in built.placed_blocks():
        shapes |= {f"blocks.{place}.{n}": shape for n, shape in _block(block, channels).items()}
    fused = sum(built.fused_widths)
    return shapes | {
        **_product("msfa.ffn.pw_exp", fused, fused * FUSED_EXPANSION),
        **_product("msfa.ffn.pw_proj", fused * FUSED_EXPANSION, built.hidden_size),
        "msfa.norm.weight": (built.hidden_size,),
    }


def _block(block: Block, channels: int) -> Shapes:
    """Return the shapes of a block whose input has so many channels."""
    if isinstance(block, EdgeBlock):
        wide, size = channels * block.expansion, block.kernel_size
        return {
            "conv_exp.weight": (wide, channels, size, size),
            "bn1.weight": (wide,),
            "conv_pwl.weight": (block.width, wide),
            "bn2.weight": (block.width,),
        }
    scale: Shapes = {"layer_scale.gamma": (block.width,)}
    if isinstance(block, InvertedBlock):
        wide = channels * block.expansion
        return {
            **_neighbors("dw_start", channels, block.start_kernel_size),
            **_product("pw_exp", channels, wide),
            **_neighbors("dw_mid", wide, block.middle_kernel_size),
            **_product("pw_proj", wide, block.width),
            **scale,
        }
    return scale | _attention(block)


def _attention(block: AttentionBlock) -> Shapes:
    """Return the shapes of a block of attention."""
    width, queries = block.width, block.num_heads * block.head_dim
    shapes: Shapes = {
        "norm.weight": (width,),
        "attn.query.proj.weight": (queries, width),
        "attn.output.proj.weight": (width, queries),
    }
    for name in ("key", "value"):
        shapes[f"attn.{name}.proj.weight"] = (block.head_dim, width)
        if block.key_stride > 1:
            size = block.kernel_size
            shapes[f"attn.{name}.down_conv.weight"] = (width, 1, size, size)
            shapes[f"attn.{name}.norm.weight"] = (width,)
    return shapes


def _product(name: str, channels: int, outputs: int) -> Shapes:
    return {f"{name}.conv.weight": (outputs, channels), f"{name}.bn.weight": (outputs,)}


def _neighbors(name: str, width: int, size: int) -> Shapes:
    if not size:
        return {}
    return {f"{name}.conv.weight": (width, 1, size, size), f"{name}.bn.weight": (width,)}
