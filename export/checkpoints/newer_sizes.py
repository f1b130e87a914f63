"""The released sizes of the text models of Gemma 3n and Gemma 4.

Shapes are those of the published `config.json` files.
"""

from typing import Any

from beam_gemma.model.layer_types import FULL, SLIDING
from export.checkpoints.released_sizes import Size


def _gemma3n(layers: int, shared: int, wide: int) -> dict[str, Any]:
    """Return the `text_config` of a Gemma 3n.

    Args:
        layers: Number of layers.
        shared: How many of them, the last ones, read the caches of others.
        wide: Width of the feed-forward.
    """
    return {
        "model_type": "gemma3n_text",
        "vocab_size": 262400,
        "vocab_size_per_layer_input": 262144,
        "hidden_size": 2048,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": shared,
        "head_dim": 256,
        "layer_types": [FULL if (i + 1) % 5 == 0 else SLIDING for i in range(layers)],
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "laurel_rank": 64,
        "altup_num_inputs": 4,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (layers - 10),
        "final_logit_softcapping": 30.0,
    }


def _gemma4(
    layers: int, hidden: int, heads: tuple[int, int], wide: int, *, period: int = 6, **other: Any
) -> dict[str, Any]:
    """Return the `text_config` of a Gemma 4.

    Args:
        layers: Number of layers.
        hidden: Width of the residual stream.
        heads: Query heads, and key-value heads of layers with a window.
        wide: Width of the feed-forward.
        period: After how many layers a full one comes.
        other: Other keys, and other values than those of most sizes.
    """
    types = [FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)]
    return {
        "model_type": "gemma4_text",
        "vocab_size": 262144,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_size_per_layer_input": 0,
        "layer_types": types,
        "max_position_embeddings": 262144,
        "sliding_window": 1024,
        "final_logit_softcapping": 30.0,
        **other,
    }


def _on_device(shared: int, *shape: Any, **other: Any) -> dict[str, Any]:
    """Return the `text_config` of a Gemma 4 for small devices, with per-layer embeddings."""
    return _gemma4(
        *shape,
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=262144,
        num_kv_shared_layers=shared,
        max_position_embeddings=131072,
        sliding_window=512,
        **other,
    )


def _large(global_heads: int, *shape: Any, **other: Any) -> dict[str, Any]:
    """Return the `text_config` of a Gemma 4 whose full layers have keys for values."""
    return _gemma4(*shape, attention_k_eq_v=True, num_global_key_value_heads=global_heads, **other)


NEWER_SIZES = (
    Size(name="Gemma 3n E2B", raw=_gemma3n(30, 10, 8192)),
    Size(name="Gemma 3n E4B", raw=_gemma3n(35, 15, 16384)),
    Size(
        name="Gemma 4 E2B",
        raw=_on_device(20, 35, 1536, (8, 1), 6144, period=5, use_double_wide_mlp=True),
    ),
    Size(name="Gemma 4 E4B", raw=_on_device(18, 42, 2560, (8, 2), 10240)),
    Size(name="Gemma 4 12B", raw=_large(1, 48, 3840, (16, 8), 15360)),
    Size(
        name="Gemma 4 26B-A4B",
        raw=_large(
            2,
            30,
            2816,
            (16, 8),
            2112,
            enable_moe_block=True,
            num_experts=128,
            top_k_experts=8,
            moe_intermediate_size=704,
        ),
    ),
    Size(name="Gemma 4 31B", raw=_large(4, 60, 5376, (32, 16), 21504)),
)
"""The text models; published counts are rounded, and have the towers of pictures and sound too."""
