"""The custom ops of the project: formula, eager reference, and the node each becomes in ONNX.

`ragged_attention` attends with the new tokens of many sequences, packed without padding, over a
cache in blocks. For a query at position q of its sequence, in head n, with key head
g = n // (N / K):

    s[k]   = scale * <query[q, n], key[k, g]>
    s[k]   = softcap * tanh(s[k] / softcap)            where the model has a softcap
    reach  = first_keys[q] <= k <= last_keys[q]        q - window + 1 and q when causal
    out[q] = sum over reached k of softmax(s)[k] * value[k, g]

`packed_attention` is the same for whole sequences without a cache:

    reach  = q - back <= k <= q + ahead                within the sequence of q

`padded_attention` is the same for texts padded to one length, with the reach given as a mask.

`column_maxima` cuts rows into parts and returns the maximum of each column over the parts.

`packed_sum` adds up the rows of each sequence.

`rms_norm` is x / sqrt(mean(x^2) + epsilon) * weight in float32; the weight is the effective one,
1 + w where a checkpoint stores w.

`rotate` turns each head (a, b), in halves, to (a cos - b sin, b cos + a sin); or only its first
channels.

Dimensions: B sequences, T new tokens, N query heads, K key-value heads, H head dimension, P cache
blocks, M blocks in a table row, D hidden, L padded text length, R rows, V vocabulary, U columns,
S queries of a sequence, J keys, G = N / K.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

MOST_PARTS = 32
"""Most parts that a row is cut into. For a Split with more outputs, ONNX Runtime copies their
addresses to the device, which a captured graph must not do."""
NO_WINDOW = 1 << 30
"""Window of a layer that reaches every earlier token: more positions than any sequence has."""


@torch.library.custom_op("beam_gemma::ragged_attention", mutates_args=())
def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens: Tensor,
    past_seqlens: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend, and return the output [T, N * H] with the updated caches.

    Args:
        query: [T, N * H], rotated.
        key: [T, K * H], rotated; on the CPU more rows may follow, of tokens without a query.
        value: As many rows [.., K * H].
        key_cache: Cache with the shape `signature.PagedState.shape` for the device `layout`.
        value_cache: Cache of the same shape.
        cu_seqlens: [B + 1], start of each sequence's new tokens.
        past_seqlens: [B], positions before the first new token; only the CUDA kernel takes it.
        block_table: [B, M], cache blocks; the first slot is position `context_starts`.
        slot_mapping: Flat slot of each row of key and value; negative skips the write.
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
    del past_seqlens, attention_metadata, window
    shape = (-1, num_kv_heads, key.shape[1] // num_kv_heads)
    key_tokens = _stored(key_cache, key.view(shape), slot_mapping, layout)
    value_tokens = _stored(value_cache, value.view(shape), slot_mapping, layout)
    queries = query.view(-1, num_kv_heads, num_heads // num_kv_heads, shape[2])
    block_size = key_cache.shape[1 if layout == "cuda" else 2]
    reach = (context_starts, first_keys, last_keys)
    tables = (cu_seqlens, block_table, block_size)
    output = attend_over(queries, key_tokens, value_tokens, *tables, *reach, scale, softcap)
    key_cache = _cache_view(key_tokens, key_cache, layout)
    return output, key_cache, _cache_view(value_tokens, value_cache, layout)


@torch.library.custom_op("beam_gemma::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    back: int,
    ahead: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attend within each packed sequence, and return the output [T, N * H].

    Args:
        query: [T, N * H], rotated.
        key: [T, K * H], rotated.
        value: [T, K * H].
        cu_seqlens: [B + 1], start of each sequence.
        num_heads: N; only the lowering uses it.
        num_kv_heads: K.
        back: Positions in reach before the query's own.
        ahead: Positions in reach after the query's own; 0 when causal.
        scale: Factor of query-key products.
        softcap: Cap of the scores; 0 for none.
    """
    del num_heads
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        q, k, v = (
            t[start:end].view(end - start, num_kv_heads, -1, key.shape[1] // num_kv_heads)
            for t in (query, key, value)
        )
        positions = torch.arange(end - start)
        distance = positions - positions[:, None]
        reach = (distance >= -back) & (distance <= ahead)
        outputs.append(attend(q, k[:, :, 0], v[:, :, 0], reach, scale, softcap))
    return torch.cat(outputs).reshape(query.shape)


@packed_attention.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(args[0])


@torch.library.custom_op("beam_gemma::padded_attention", mutates_args=())
def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    rows: Tensor,
    places: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attend within each text, and return the output [T, N * H].

    Args:
        query: [T, N * H], rotated.
        key: [T, K * H], rotated.
        value: [T, K * H].
        mask: [B, 1, L, L], true if a query reaches a key.
        rows: [B, L], packed row of each padded position.
        places: [T], index of each token in B * L.
        num_heads: N.
        num_kv_heads: K.
        scale: Factor of query-key products.
        softcap: Cap of the scores; 0 for none.
    """
    dim = key.shape[1] // num_kv_heads
    outputs = []
    for text, reach in zip(rows, mask, strict=True):
        q = query[text].view(len(text), num_kv_heads, num_heads // num_kv_heads, dim)
        k, v = (t[text].view(len(text), num_kv_heads, dim) for t in (key, value))
        outputs.append(attend(q, k, v, reach[0], scale, softcap))
    return torch.cat(outputs).reshape(-1, query.shape[1])[places]


@padded_attention.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(args[0])


@torch.library.custom_op("beam_gemma::packed_sum", mutates_args=())
def packed_sum(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Return the sum [B, D] of each sequence's rows in x [T, D]; none has more than `longest`."""
    del longest
    lengths = cu_seqlens.diff().long()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return x.new_zeros(len(lengths), x.shape[1]).index_add(0, owner, x)


@packed_sum.register_fake
def _(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1])


def even_parts(width: int) -> int:
    """Return the largest number of even parts, at most `MOST_PARTS`, that divides a row width."""
    return next(n for n in range(MOST_PARTS, 0, -1) if width % n == 0)


@torch.library.custom_op("beam_gemma::column_maxima", mutates_args=())
def column_maxima(x: Tensor, parts: int) -> Tensor:
    """Return the maximum [R, U] over the parts of x [R, V], each U columns wide."""
    return x.view(x.shape[0], parts, -1).amax(dim=1)


@column_maxima.register_fake
def _(x: Tensor, parts: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // parts)


def slots_of(blocks: Tensor, block_size: int) -> Tensor:
    """Return the flat slots of a table row."""
    return (blocks.long()[:, None] * block_size + torch.arange(block_size)).flatten()


def attend_over(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    block_table: Tensor,
    block_size: int,
    context_starts: Tensor,
    first_keys: Tensor,
    last_keys: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attend with query [T, K, G, H] over caches [P * block, K, H]; return [T, N * H].

    The other arguments are those of `ragged_attention`.
    """
    outputs = []
    for b, blocks in enumerate(block_table):
        new = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        context = slots_of(blocks, block_size)
        reached = int(context_starts[b]) + torch.arange(context.shape[0])
        reach = (reached <= last_keys[new, None]) & (reached >= first_keys[new, None])
        outputs.append(attend(query[new], keys[context], values[context], reach, scale, softcap))
    return torch.cat(outputs).flatten(1)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, reach: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attend with one sequence: q [S, K, G, H], keys and values [J, K, H], reach [S, J]."""
    scores = torch.einsum("skgh,jkh->kgsj", q, keys) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(~reach, -torch.inf).softmax(-1, dtype=wide).to(values.dtype)
    # A slot out of reach may hold NaN or infinity, which zero weights would not remove.
    values = values.masked_fill(~reach.any(0)[:, None, None], 0.0)
    return torch.einsum("kgsj,jkh->skgh", weights, values)


def _stored(cache: Tensor, tokens: Tensor, slot_mapping: Tensor, layout: str) -> Tensor:
    """Return a copy of the cache as [P * block, K, H], with tokens [T, K, H] written."""
    copy = token_view(cache, layout, tokens.shape[1], tokens.shape[2])
    kept = slot_mapping >= 0
    copy[slot_mapping[kept].long()] = tokens[kept]
    return copy


def token_view(cache: Tensor, layout: str, num_kv_heads: int, head_dim: int) -> Tensor:
    """Return a copy of the cache as [P * block, K, H]."""
    if layout == "cuda":
        return cache.clone().view(-1, num_kv_heads, head_dim)
    return cache.permute(1, 2, 0, 3).reshape(-1, num_kv_heads, head_dim).clone()


def _cache_view(tokens: Tensor, cache: Tensor, layout: str) -> Tensor:
    """Return the tokens in the layout of the cache: the inverse of `token_view`."""
    if layout == "cuda":
        return tokens.reshape(cache.shape)
    heads, blocks, block_size, dim = cache.shape
    return tokens.reshape(blocks, block_size, heads, dim).permute(2, 0, 1, 3).contiguous()


@ragged_attention.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, _, _, key_cache, value_cache = args[:5]
    return torch.empty_like(query), torch.empty_like(key_cache), torch.empty_like(value_cache)


@torch.library.custom_op("beam_gemma::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Normalize the last dimension of x [..., D] by its root mean square; weight [D] is float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (normed * weight).to(dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("beam_gemma::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotate the heads of x [T, N * H]; see `rotate_heads`."""
    return rotate_heads(x.view(x.shape[0], num_heads, -1), cos, sin).reshape(x.shape)


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the first 2 * R channels of x [T, N, H]; cos, sin are [T, 1, R]."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)
