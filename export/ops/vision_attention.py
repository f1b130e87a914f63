"""`vision_attention`: every patch of a picture attends to all patches of the same picture.

For the query of patch i in head n:

    s[j]      = scale * <query[i, n], key[j, n]>
    out[i, n] = sum over patches j of softmax(s)[j] * value[j, n]

Its lowering on both devices is `com.microsoft::MultiHeadAttention` without a mask, a kernel that
never holds all scores: those of 4,096 patches and 16 heads would take 1 GiB. On the CPU it works on
tiles of one picture and one head, whose size depends on the picture's patches and the processor's
second-level cache alone, so the bits of a picture do not depend on what else is in its batch or on
the number of threads.

A picture may have other keys than queries, where keys are fewer or several heads of queries share
one of keys: their queries then count as more queries of one head.

Dimensions: N pictures, P queries of a picture, T = N * P, K keys of a picture, S = N * K, H head
dimension, D = heads * H.
"""

import torch
from torch import Tensor


@torch.library.custom_op("beam_gemma::vision_attention", mutates_args=())
def vision_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_patches: int,
    num_heads: int,
    scale: float,
    num_keys: int = 0,
) -> Tensor:
    """Attend within each picture, and return the output [T, D].

    Args:
        query: [T, D], the patches of one picture after those of another.
        key: [S, D].
        value: [S, D].
        num_patches: P; 0 if all rows are one picture.
        num_heads: Heads that D consists of.
        scale: Factor of query-key products.
        num_keys: K; 0 if it is P.
    """
    heads = num_heads, query.shape[1] // num_heads
    q = query.view(-1, num_patches or len(query), *heads)
    k, v = (x.view(-1, num_keys or q.shape[1], *heads) for x in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(v.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v).reshape(query.shape)


@vision_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_patches: int,
    num_heads: int,
    scale: float,
    num_keys: int = 0,
) -> Tensor:
    del key, value, num_patches, num_heads, scale, num_keys
    return torch.empty_like(query)
