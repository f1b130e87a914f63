"""CUDA lowering of the custom ops: ONNX Runtime's own kernels.

Semantics of `com.microsoft::PagedAttention` 1 in ONNX Runtime 1.31: `local_window_size` counts the
query's own position, scores are scaled, then soft-capped, then masked, and tables keep their full
length, so `context_starts` is unused. With `is_causal` = 0, a query reaches all keys of its
sequence after its own position, and those before it within the window, as if it were causal.

Dimensions: B texts, L padded text length.
"""

# Names are bound when the source is parsed into ONNX, so types here are tensors, not Python values.
# mypy: ignore-errors
# ruff: noqa: N802, D103

from onnxscript import script
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import TensorType
from onnxscript.values import Opset

DOMAIN = Opset("beam_gemma", 1)
MICROSOFT = Opset("com.microsoft", 1)


@script(DOMAIN, default_opset=op)
def RaggedAttention(
    query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    attention_metadata, num_heads: int, num_kv_heads: int, window: int, scale: float,
    softcap: float,
) -> tuple[TensorType, TensorType, TensorType]:  # fmt: skip
    output, key_out, value_out = MICROSOFT.PagedAttention(
        query, key, value, key_cache, value_cache, cu_seqlens, past_seqlens, block_table,
        None, None, slot_mapping, None, None, None, None, None, attention_metadata,
        num_heads=num_heads, kv_num_heads=num_kv_heads, local_window_size=window, scale=scale,
        softcap=softcap,
    )  # fmt: skip
    return output, key_out, value_out


@script(DOMAIN, default_opset=op)
def CachedAttention(
    query, key, key_cache, value_cache, cu_seqlens, past_seqlens, block_table, slot_mapping,
    attention_metadata, num_heads: int, num_kv_heads: int, window: int, scale: float,
    softcap: float, is_causal: int,
) -> TensorType:  # fmt: skip
    """Attend, causally or in both directions, over caches that have the new keys and values.

    All slots are -1, so `key`, which stands for the values too, is written nowhere.
    """
    return MICROSOFT.PagedAttention(
        query, key, key, key_cache, value_cache, cu_seqlens, past_seqlens, block_table,
        None, None, slot_mapping, None, None, None, None, None, attention_metadata,
        num_heads=num_heads, kv_num_heads=num_kv_heads, local_window_size=window, scale=scale,
        softcap=softcap, is_causal=is_causal,
    )  # fmt: skip


@script(DOMAIN, default_opset=op)
def PaddedAttention(
    query, key, value, mask, num_heads: int, num_kv_heads: int, scale: float, softcap: float
) -> TensorType:
    """Memory-efficient attention with a mask [B, 1, L, L] and grouped, wide heads.

    L must be a multiple of 4. Scores are scaled, then soft-capped, then masked.
    """
    return op.Attention(
        query, key, value, mask, q_num_heads=num_heads, kv_num_heads=num_kv_heads, scale=scale,
        softcap=softcap,
    )  # fmt: skip


@script(DOMAIN, default_opset=op)
def VisionAttention(query, key, value, num_heads: int, scale: float) -> TensorType:
    """Attend with [pictures, patches, D]: each picture is one sequence of a batch.

    In `com.microsoft::MultiHeadAttention` ONNX Runtime asks for cuDNN, even where it is not used.
    """
    return op.Attention(
        query, key, value, q_num_heads=num_heads, kv_num_heads=num_heads, scale=scale
    )


@script(DOMAIN, default_opset=op)
def RmsNorm(x, weight, epsilon: float, to: int) -> TensorType:
    """Normalize in float32, like the reference: bfloat16 has too few digits for 1 + w.

    ONNX Runtime removes a cast of float32 to itself when it loads the graph.
    """
    normed = op.RMSNormalization(op.Cast(x, to=1), weight, axis=-1, epsilon=epsilon)
    return op.Cast(normed, to=to)


@script(DOMAIN, default_opset=op)
def HalfRmsNorm(x, weight, epsilon: float, to: int) -> TensorType:
    """Normalize float16 to float16 in one kernel, which computes in float32."""
    return op.RMSNormalization(x, op.Cast(weight, to=to), axis=-1, epsilon=epsilon)


FUNCTIONS = (
    RaggedAttention, PaddedAttention, VisionAttention, RmsNorm, HalfRmsNorm,
)  # fmt: skip
CACHED = (CachedAttention,)
"""The op that only some graphs have."""
