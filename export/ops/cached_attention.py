"""`cached_attention`: attention over caches that hold the step's tokens already.

Some layers have no keys and values of their own and read those of an earlier layer, which has
written the step's tokens to its caches. The formula is that of `ragged_attention`
(`export.ops.reference`); nothing is written.

Dimensions: B sequences, T new tokens, N query heads, K key-value heads, H head dimension, M blocks
in a table row.
"""

from typing import Any

import torch
from torch import Tensor

from export.ops.reference import attend_over, token_view


@torch.library.custom_op("beam_gemma::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor,
    key: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens: Tensor,
    past_seqlens: Tensor,
    block_table: Tensor,
    no_slots: Tensor,
    context_starts: Tensor,
    first_keys: Tensor,
    last_keys: Tensor,
    num_heads: int,
    num_kv_heads: int,
    window: int,
    scale: float,
    softcap: float,
    layout: str,
    attention_metadata: Tensor | None = None,
) -> Tensor:
    """Attend, and return the output [T, N * H].

    Args:
        query: [T, N * H], rotated.
        key: [T, K * H]; only its shape is used, by the CUDA kernel.
        key_cache: Cache with the shape `signature.PagedState.shape` for the device `layout`.
        value_cache: Cache of the same shape.
        cu_seqlens: [B + 1], start of each sequence's new tokens.
        past_seqlens: [B], positions before the first new token; only the CUDA kernel takes it.
        block_table: [B, M], cache blocks; the first slot is position `context_starts`.
        no_slots: [T], -1: the CUDA kernel writes nothing.
        context_starts: [B], position of the first slot in each table row.
        first_keys: [T], the first position that each token reaches; below 0 for all.
        last_keys: [T], the last position that each token reaches.
        num_heads: N.
        num_kv_heads: K.
        window: Positions in reach to the left; only the CUDA kernel takes it, for `first_keys`.
        scale: Factor of query-key products.
        softcap: Cap of the scores; 0 for none.
        layout: `cpu` or `cuda`.
        attention_metadata: [3], bounds for the CUDA kernel; not used in the formula.
    """
    del key, past_seqlens, no_slots, attention_metadata, window
    dim = query.shape[1] // num_heads
    return attend_over(
        query.view(-1, num_kv_heads, num_heads // num_kv_heads, dim),
        token_view(key_cache, layout, num_kv_heads, dim),
        token_view(value_cache, layout, num_kv_heads, dim),
        cu_seqlens,
        block_table,
        key_cache.shape[1 if layout == "cuda" else 2],
        context_starts,
        first_keys,
        last_keys,
        scale,
        softcap,
    )


@cached_attention.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(args[0])
