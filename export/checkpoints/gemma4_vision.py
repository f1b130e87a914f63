"""Names and shapes of what a Gemma 4 has for pictures, as in `export.modules.gemma4_vision`."""

from beam_gemma.model.vision_config import VisionConfig

Shapes = dict[str, tuple[int, ...]]
TOWER, SQUARES = "vision_tower.", "vision_embedder."
PROJECTION = "embed_vision.embedding_projection.weight"


def gemma4_vision_shapes(config: VisionConfig, hidden_size: int) -> Shapes:
    """Return the shape of every tensor for pictures.

    Args:
        config: The tower, or what takes its place.
        hidden_size: Width of the decoder.
    """
    width = config.hidden_size
    if config.projector == "patches":
        squares = {SQUARES + name: shape for name, shape in _squares(config).items()}
        return squares | {PROJECTION: (hidden_size, width)}
    shapes: Shapes = {
        "patch_embedder.input_proj.weight": (width, 3 * config.patch_size**2),
        "patch_embedder.position_embedding_table": (2, config.position_embedding_size, width),
    }
    for i in range(config.num_hidden_layers):
        shapes |= {f"encoder.layers.{i}.{name}": shape for name, shape in _layer(config).items()}
    if config.standardize:
        shapes |= {"std_bias": (width,), "std_scale": (width,)}
    tower = {TOWER + name: shape for name, shape in shapes.items()}
    return tower | {PROJECTION: (hidden_size, width)}


def _layer(config: VisionConfig) -> Shapes:
    """Return the shapes of a layer of the tower."""
    width, wide = config.hidden_size, config.intermediate_size
    products = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    products |= {"mlp.gate_proj": (wide, width), "mlp.up_proj": (wide, width)}
    products |= {"mlp.down_proj": (width, wide)}
    shapes: Shapes = {f"{name}.linear.weight": shape for name, shape in products.items()}
    if config.use_clipped_linears:
        bounds = [f"{kind}_{end}" for kind in ("input", "output") for end in ("min", "max")]
        shapes |= {f"{name}.{bound}": (1,) for name in products for bound in bounds}
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
             "post_feedforward_layernorm")  # fmt: skip
    shapes |= {f"{name}.weight": (width,) for name in norms}
    return shapes | {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}


def _squares(config: VisionConfig) -> Shapes:
    """Return the shapes of the projection of squares of pixels."""
    width, colors = config.hidden_size, 3 * config.image_step**2
    shapes: Shapes = {
        "patch_dense.weight": (width, colors),
        "patch_dense.bias": (width,),
        "pos_embedding": (config.position_embedding_size, 2, width),
    }
    for name, size in (("patch_ln1", colors), ("patch_ln2", width), ("pos_norm", width)):
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return shapes
