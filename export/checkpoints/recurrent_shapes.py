"""The shapes of a RecurrentGemma's tensors, under the names of `export.modules.recurrent`."""

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.layer_types import RECURRENT

Shapes = dict[str, tuple[int, ...]]


def recurrent_shapes(config: GemmaConfig) -> Shapes:
    """Return the shape of every tensor of a RecurrentGemma."""
    shapes: Shapes = {
        "embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "norm.weight": (config.hidden_size,),
    }
    for i, layer_type in enumerate(config.layer_types):
        block = _recurrent_block(config) if layer_type == RECURRENT else _attention_block(config)
        parts = {f"temporal_block.{name}": shape for name, shape in block.items()}
        shapes |= {f"layers.{i}.{n}": shape for n, shape in (parts | _around(config)).items()}
    return shapes


def _around(config: GemmaConfig) -> Shapes:
    """Return the shapes of the norms and the feed-forward of a layer."""
    hidden, wide = config.hidden_size, config.intermediate_size
    return {
        "temporal_pre_norm.weight": (hidden,),
        "channel_pre_norm.weight": (hidden,),
        "mlp_block.gate_proj.weight": (wide, hidden),
        "mlp_block.gate_proj.bias": (wide,),
        "mlp_block.up_proj.weight": (wide, hidden),
        "mlp_block.up_proj.bias": (wide,),
        "mlp_block.down_proj.weight": (hidden, wide),
        "mlp_block.down_proj.bias": (hidden,),
    }


def _attention_block(config: GemmaConfig) -> Shapes:
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    return {
        "q_proj.weight": (queries, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "o_proj.weight": (hidden, queries),
        "o_proj.bias": (hidden,),
    }


def _recurrent_block(config: GemmaConfig) -> Shapes:
    assert config.lru_width is not None
    assert config.conv1d_width is not None
    hidden, width, heads = config.hidden_size, config.lru_width, config.num_attention_heads
    gate, bias = (heads, width // heads, width // heads), (heads, width // heads)
    return {
        "linear_x.weight": (width, hidden),
        "linear_x.bias": (width,),
        "linear_y.weight": (width, hidden),
        "linear_y.bias": (width,),
        "linear_out.weight": (hidden, width),
        "linear_out.bias": (hidden,),
        "conv_1d.weight": (width, 1, config.conv1d_width),
        "conv_1d.bias": (width,),
        "rg_lru.recurrent_param": (width,),
        "rg_lru.input_gate_weight": gate,
        "rg_lru.input_gate_bias": bias,
        "rg_lru.recurrent_gate_weight": gate,
        "rg_lru.recurrent_gate_bias": bias,
    }
