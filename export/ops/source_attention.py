"""`source_attention`: attention over sources, on CUDA.

`com.microsoft::PagedAttention` takes as many queries as keys, and lets a query reach the keys of
its sequence up to its own. A new token reaches its whole source, and source tokens have keys but no
queries. So each new token is a sequence of one token here, with as many cells before it as it
reaches besides its own, or besides the last one of its source. Behind these sequences come those of
source tokens, which are written and attend to the padding block. What they attend to is dropped.
The kernel writes all keys and values first.

For a new token t, over the cells k = 0, 1, ... of its sequence:

    reach  = k <= past_seqlens[t]

Dimensions: T new tokens, C source tokens, N query heads, K key-value heads, H head dimension, M
blocks in a table row. There are T sequences of new tokens and one or more of source tokens.
"""

from typing import Any

import torch
from torch import Tensor

from export.ops.reference import attend, slots_of


@torch.library.custom_op("beam_gemma::source_attention", mutates_args=())
def source_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens: Tensor,
    past_seqlens: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    rows: Tensor,
    places: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    softcap: float,
    attention_metadata: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend, and return the output [T, N * H] with the updated caches.

    Args:
        query: [T, N * H], rotated.
        key: [T + C, K * H], rotated; rows with a negative slot may hold anything.
        value: [T + C, K * H].
        key_cache: Cache in CUDA's layout.
        value_cache: Cache of the same shape.
        cu_seqlens: Start of each sequence, T + C at the end; only the CUDA kernel takes it.
        past_seqlens: Number of cells before the last one that each sequence's token reaches.
        block_table: [.., M], cache blocks of each sequence.
        slot_mapping: [T + C], flat slot of each key and value; negative skips the write.
        rows: [T + C], index of each new token in `query`; any valid index for source tokens.
        places: [T], index of each new token among all.
        num_heads: N.
        num_kv_heads: K.
        scale: Factor of query-key products.
        softcap: Cap of the scores; 0 for none.
        attention_metadata: [3], bounds for the CUDA kernel; not used in the formula.
    """
    del cu_seqlens, rows, attention_metadata
    block_size, _, head_dim = key_cache.shape[1:]
    kept = slot_mapping >= 0
    caches = []
    for cache, tokens in ((key_cache, key), (value_cache, value)):
        cells = cache.clone().view(-1, num_kv_heads, head_dim)
        cells[slot_mapping[kept].long()] = tokens.view(-1, num_kv_heads, head_dim)[kept]
        caches.append(cells)
    outputs = []
    for token, place in zip(query, places.tolist(), strict=True):
        context = slots_of(block_table[place], block_size)[: int(past_seqlens[place]) + 1]
        q = token.view(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        everything = torch.ones(1, len(context), dtype=torch.bool)
        keys, values = (cells[context] for cells in caches)
        outputs.append(attend(q, keys, values, everything, scale, softcap))
    keys, values = (cells.view(key_cache.shape) for cells in caches)
    return torch.cat(outputs).reshape(query.shape), keys, values


@source_attention.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, _, _, key_cache, value_cache = args[:5]
    return torch.empty_like(query), torch.empty_like(key_cache), torch.empty_like(value_cache)
