"""Names and shapes of what a model has for sound, as in `export.modules.sound`.

Our names are those of Gemma 4 in Hugging Face folders; those of Gemma 3n are renamed.
"""

import re

from beam_gemma.model.sound_config import SoundConfig

TOWER, PROJECTOR = "audio_tower.", "embed_audio."
USM_LAYER = re.compile(r"audio_tower\.conformer\.(\d+)\.(.*)")
USM_PARTS = {
    "ffw_layer_start.": "feed_forward1.",
    "ffw_layer_end.": "feed_forward2.",
    "attention.attn.relative_position_embedding.pos_proj.": "self_attn.relative_k_proj.",
    "attention.attn.": "self_attn.",
    "attention.pre_attn_norm.": "norm_pre_attn.",
    "attention.post_norm.": "norm_post_attn.",
    "attention.post.": "self_attn.post.",
    "norm.": "norm_out.",
}
"""Starts of the names in a layer of a Gemma 3n, with ours."""
USM_CONVOLUTIONS = re.compile(r"(audio_tower\.subsample_conv_projection\.)conv_([01])\.")
PRODUCTS = re.compile(r"\.([qkv]_proj|post|ffw_layer_[12]|linear_start|linear_end)\.weight$")
"""Ends of the names of products that have bounds in a Gemma 4, and a level more in their names."""
NORMS = ("feed_forward1.pre_layer_norm", "feed_forward1.post_layer_norm",
         "feed_forward2.pre_layer_norm", "feed_forward2.post_layer_norm", "lconv1d.pre_layer_norm",
         "lconv1d.conv_norm", "norm_pre_attn", "norm_post_attn", "norm_out")  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


def is_of_sound(name: str) -> bool:
    """Return whether a tensor, by its name without prefixes, is for sound."""
    return name.startswith((TOWER, PROJECTOR))


def sound_name(name: str) -> str:
    """Return our name of a Hugging Face tensor for sound.

    Args:
        name: Name without the prefix of the whole model.
    """
    name = USM_CONVOLUTIONS.sub(r"\1layer\2.", name)
    if (layer := USM_LAYER.fullmatch(name)) is None:
        return name
    number, part = layer.groups()
    start = next((start for start in USM_PARTS if part.startswith(start)), "")
    part = USM_PARTS.get(start, "") + part.removeprefix(start)
    return PRODUCTS.sub(r".\1.linear.weight", f"{TOWER}layers.{number}.{part}")


def sound_shapes(config: SoundConfig, hidden_size: int) -> Shapes:
    """Return the shape of every tensor for sound.

    Args:
        config: The tower, or what takes its place.
        hidden_size: Width of the decoder.
    """
    width = config.output_size
    shapes: Shapes = {f"{PROJECTOR}embedding_projection.weight": (hidden_size, width)}
    if config.encoder == "usm":
        shapes[f"{PROJECTOR}embedding.weight"] = (config.vocab_size, width)
        for kind in ("hard", "soft"):
            shapes[f"{PROJECTOR}{kind}_embedding_norm.weight"] = (width,)
    if config.encoder == "frames":
        return shapes
    return shapes | {TOWER + name: shape for name, shape in _tower(config).items()}


def _tower(config: SoundConfig) -> Shapes:
    width = config.hidden_size
    shapes: Shapes = {}
    inputs = 1
    for i, outputs in enumerate(config.subsampling_conv_channels):
        stem = f"subsample_conv_projection.layer{i}."
        shapes |= {f"{stem}conv.weight": (outputs, inputs, 3, 3), f"{stem}norm.weight": (outputs,)}
        inputs = outputs
    rows = config.subsampled(config.num_features) * inputs
    shapes["subsample_conv_projection.input_proj_linear.weight"] = (width, rows)
    for i in range(config.num_hidden_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in _layer(config).items()}
    if config.encoder == "conformer":
        size = config.output_size
        shapes |= {"output_proj.weight": (size, width), "output_proj.bias": (size,)}
    return shapes


def _layer(config: SoundConfig) -> Shapes:
    """Return the shapes of a layer of the tower."""
    width = config.hidden_size
    products = {f"self_attn.{name}": (width, width)
                for name in ("q_proj", "k_proj", "v_proj", "post")}  # fmt: skip
    for i in (1, 2):
        products[f"feed_forward{i}.ffw_layer_1"] = (4 * width, width)
        products[f"feed_forward{i}.ffw_layer_2"] = (width, 4 * width)
    products |= {"lconv1d.linear_start": (2 * width, width), "lconv1d.linear_end": (width, width)}
    shapes: Shapes = {f"{name}.linear.weight": shape for name, shape in products.items()}
    if config.use_clipped_linears:
        bounds = [f"{kind}_{end}" for kind in ("input", "output") for end in ("min", "max")]
        shapes |= {f"{name}.{bound}": (1,) for name in products for bound in bounds}
    shapes |= {f"{name}.weight": (width,) for name in NORMS}
    return shapes | {
        "self_attn.relative_k_proj.weight": (width, width),
        "self_attn.per_dim_scale": (config.head_dim,),
        "lconv1d.depthwise_conv1d.weight": (width, 1, config.conv_kernel_size),
    }
