"""`span_attention`: attention in both directions for the tokens of spans, on CUDA.

`com.microsoft::PagedAttention` is causal, or reaches in both directions; it takes no mask. So all
tokens of a step attend causally first (`ragged_attention`), which also writes their keys and
values, and the tokens inside spans attend again over the same cache. Each span of the step is a
sequence of its own, from its first new token to its end: to that token's query the last key is the
end of the span, as to all others of it.

For a query at position q of its sequence, in a span that ends before position e:

    reach  = q - window < k < e

Dimensions: T new tokens, X of these in spans, Z spans, N query heads, K key-value heads, H head
dimension, M blocks in a table row.
"""

from typing import Any

import torch
from torch import Tensor

from export.ops.reference import attend, slots_of


@torch.library.custom_op("beam_gemma::span_attention", mutates_args=())
def span_attention(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens: Tensor,
    past_seqlens: Tensor,
    block_table: Tensor,
    rows: Tensor,
    no_slots: Tensor,
    is_inside: Tensor,
    places: Tensor,
    num_heads: int,
    num_kv_heads: int,
    window: int,
    scale: float,
    softcap: float,
    attention_metadata: Tensor,
) -> Tensor:
    """Attend in both directions, and return `output` with the result for tokens inside spans.

    Args:
        output: [T, N * H], what all tokens attended to causally.
        query: [T, N * H], rotated.
        key: [T, K * H], rotated; only its shape is used, its values are in the cache.
        key_cache: Cache in CUDA's layout that has the keys of the step.
        value_cache: Cache of the same shape that has the values of the step.
        cu_seqlens: [Z + 1], start of each span's tokens in `rows`.
        past_seqlens: [Z], position of each span's first token in `rows`.
        block_table: [Z, M], cache blocks of each span's sequence.
        rows: [X], packed position of each token inside a span.
        no_slots: [X], -1: nothing is written to the cache.
        is_inside: [T, 1], whether a token is inside a span.
        places: [T], index in `rows` of each token inside a span; any valid index for the others.
        num_heads: N.
        num_kv_heads: K.
        window: Positions in reach to the left, including the query's own.
        scale: Factor of query-key products.
        softcap: Cap of the scores; 0 for none.
        attention_metadata: [3], bounds for the CUDA kernel; not used in the formula.
    """
    del key, no_slots, attention_metadata
    block_size, _, head_dim = key_cache.shape[1:]
    keys, values = (c.view(-1, num_kv_heads, head_dim) for c in (key_cache, value_cache))
    spans = []
    for z in range(past_seqlens.shape[0]):
        own = rows[int(cu_seqlens[z]) : int(cu_seqlens[z + 1])]
        q = query[own].view(-1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        positions = int(past_seqlens[z]) + torch.arange(len(own))
        end = int(past_seqlens[z]) + len(own)
        reached = torch.arange(end) > positions[:, None] - window
        context = slots_of(block_table[z], block_size)[:end]
        spans.append(attend(q, keys[context], values[context], reached, scale, softcap))
    inside = torch.cat(spans).reshape(-1, query.shape[1])
    return torch.where(is_inside, inside[places], output)


@span_attention.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(args[0])
