"""The shapes of the tensors of Gemma 3n, Gemma 4 and EmbeddingGemma 2, as in `export.modules`."""

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.layer_types import FULL
from export.checkpoints.tensors import EMBEDDING, TABLE

Shapes = dict[str, tuple[int, ...]]


def newer_shapes(config: GemmaConfig) -> Shapes:
    """Return the shape of every tensor of a text model.

    The projection of the states of an EmbeddingGemma 2 is not among them, since it is no part of
    the stack of layers.
    """
    hidden = config.hidden_size
    shapes: Shapes = {
        EMBEDDING: (config.vocab_size, hidden),
        "norm.weight": (hidden,),
        **_per_layer_inputs(config),
    }
    for i in range((config.altup_num_inputs or 1) - 1):
        shapes[f"altup_projections.{i}.weight"] = (hidden, hidden)
        shapes[f"altup_unembed_projections.{i}.weight"] = (hidden, hidden)
    for i in range(config.num_hidden_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in _layer(config, i).items()}
    return shapes


def _per_layer_inputs(config: GemmaConfig) -> Shapes:
    """Return the shapes of what makes the per-layer embeddings of tokens."""
    if config.hidden_size_per_layer_input is None:
        return {}
    width = config.num_hidden_layers * config.hidden_size_per_layer_input
    shapes: Shapes = {
        "per_layer_model_projection.weight": (width, config.hidden_size),
        "per_layer_projection_norm.weight": (config.hidden_size_per_layer_input,),
    }
    if config.vocab_size_per_layer_input is not None:
        shapes[TABLE] = (config.vocab_size_per_layer_input, width)
    return shapes


def _layer(config: GemmaConfig, layer: int) -> Shapes:
    """Return the shapes of a layer."""
    hidden, wide = config.hidden_size, config.intermediate_size_of(layer)
    shapes: Shapes = {
        **{f"self_attn.{name}.weight": shape for name, shape in _attention(config, layer).items()},
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "pre_feedforward_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight": (hidden,),
    }
    if (width := config.hidden_size_per_layer_input) is not None:
        shapes["per_layer_input_gate.weight"] = (width, hidden)
        shapes["per_layer_projection.weight"] = (hidden, width)
        shapes["post_per_layer_input_norm.weight"] = (hidden,)
    if config.has_layer_scalar:
        shapes["layer_scalar"] = (1,)
    if config.altup_num_inputs is not None:
        shapes |= _altup(config, config.altup_num_inputs)
    if config.num_experts is not None:
        shapes |= _experts(config, config.num_experts)
    return shapes


def _attention(config: GemmaConfig, layer: int) -> Shapes:
    """Return the shapes of a layer's attention; only layers with a cache have keys and values."""
    kind, hidden = config.layer_types[layer], config.hidden_size
    dim = config.head_dim_of(kind)
    queries, keys = config.num_attention_heads * dim, config.num_kv_heads_of(kind) * dim
    shapes: Shapes = {"q_proj": (queries, hidden), "o_proj": (hidden, queries), "q_norm": (dim,)}
    if config.producer(layer) == layer:
        shapes |= {"k_proj": (keys, hidden), "k_norm": (dim,)}
        if not (config.attention_k_eq_v and kind == FULL):
            shapes["v_proj"] = (keys, hidden)
    return shapes


def _altup(config: GemmaConfig, num_streams: int) -> Shapes:
    """Return the shapes of what a layer of a Gemma 3n has for its streams and its residual."""
    assert config.laurel_rank is not None
    hidden, rank = config.hidden_size, config.laurel_rank
    scale: Shapes = {"altup.correct_output_scale": (hidden,)} if config.altup_correct_scale else {}
    return {
        **scale,
        "altup.correction_coefs.weight": (num_streams, num_streams),
        "altup.prediction_coefs.weight": (num_streams**2, num_streams),
        "altup.modality_router.weight": (num_streams, hidden),
        "altup.router_norm.weight": (hidden,),
        "laurel.linear_left.weight": (rank, hidden),
        "laurel.linear_right.weight": (hidden, rank),
        "laurel.post_laurel_norm.weight": (hidden,),
    }


def _experts(config: GemmaConfig, num_experts: int) -> Shapes:
    """Return the shapes of a layer's router and experts, and of the norms beside them."""
    assert config.moe_intermediate_size is not None
    hidden, wide = config.hidden_size, config.moe_intermediate_size
    return {
        "router.proj.weight": (num_experts, hidden),
        "router.scale": (hidden,),
        "router.per_expert_scale": (num_experts,),
        "experts.gate_up_proj": (num_experts, 2 * wide, hidden),
        "experts.down_proj": (num_experts, hidden, wide),
        "pre_feedforward_layernorm_2.weight": (hidden,),
        "post_feedforward_layernorm_1.weight": (hidden,),
        "post_feedforward_layernorm_2.weight": (hidden,),
    }
