"""Tiny Gemma 4 text models: transformers' own classes with random weights.

Windows are smaller than the sequences, and weights that a new model leaves at 1 (norms, each
layer's factor, the scales of a router) are drawn too, so that each of them leaves a trace.
"""

import zlib
from typing import Any

import torch
import transformers

from tests.doubles.reference import FULL, SHAPE, SLIDING, WINDOW, draw_weights

GEMMA4_SHAPE: dict[str, Any] = {
    **SHAPE,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 5.0,
    "hidden_size_per_layer_input": 0,
}
PER_LAYER: dict[str, Any] = {
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": SHAPE["vocab_size"],
}
KEYS_ARE_VALUES: dict[str, Any] = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
GEMMA4_MODELS: dict[str, dict[str, Any]] = {
    "gemma4_e2b": {
        **PER_LAYER,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
    },
    "gemma4_e4b": {
        **PER_LAYER,
        "layer_types": [*[SLIDING] * 5, FULL, SLIDING, FULL],
        "num_kv_shared_layers": 2,
    },
    "gemma4_dense": {**KEYS_ARE_VALUES, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
    "gemma4_moe": {
        **KEYS_ARE_VALUES,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 24,
    },
    "gemma4_wide_heads": {
        **KEYS_ARE_VALUES,
        "layer_types": [SLIDING, FULL],
        "head_dim": 256,
        "global_head_dim": 512,
    },
}
"""One like each release, E2B, E4B, 12B and 31B, 26B-A4B; the last one has heads as wide as theirs.
"""


def gemma4_model(name: str, **other: Any) -> torch.nn.Module:
    """Return one of `GEMMA4_MODELS` in float32, weights drawn by parameter name.

    Args:
        name: Its name.
        other: Other settings than the model's.
    """
    shape = {**GEMMA4_SHAPE, **GEMMA4_MODELS[name], **other}
    config = transformers.Gemma4TextConfig(**shape, num_hidden_layers=len(shape["layer_types"]))
    model = transformers.Gemma4ForCausalLM._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    return draw_newer(model)


def draw_newer(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model in float32 whose every weight makes a difference, drawn by name.

    Each layer's factor is no parameter. Norms of queries are small, as in a trained model, since
    attention has no other scale.
    """
    model = draw_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.mul_(1.5 / len(parameter) ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            buffer.copy_(0.7 + 0.6 * torch.rand(1, generator=generator))
    return model
