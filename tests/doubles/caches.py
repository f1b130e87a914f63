"""Caches of two groups of layers, one of them with a window, and short cuts to use them."""

from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.prefix import PrefixChain
from beam_gemma.model.graph_tensors import PagedState
from tests.doubles.fakes import fake_signature

BLOCK = 16
GROUPS = ("full", "sliding")
MAX_MODEL_LEN = 2000


def make_cache(
    *, window=200, device="cpu", num_blocks=400, max_num_seqs=4, max_num_batched_tokens=300
):
    states = (
        PagedState(group="full", layers=(1,), num_key_value_heads=1, head_dim=8),
        PagedState(
            group="sliding",
            layers=(0,),
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=window,
        ),
    )
    if isinstance(num_blocks, int):
        num_blocks = {"full": num_blocks, "sliding": num_blocks}
    return KVCache(
        fake_signature(device=device, states=states, max_model_len=MAX_MODEL_LEN),
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )


def admit(cache, num_known_tokens, num_new_tokens=0, *, chain=None, num_spare_blocks=0):
    prefix = cache.find_prefix(chain, num_known_tokens, num_reusable_tokens=num_known_tokens - 1)
    return cache.admit(prefix, num_new_tokens, num_spare_blocks=num_spare_blocks)


def chain_of(token_ids):
    return PrefixChain(list(token_ids), BLOCK)


def found(cache, token_ids):
    """Return how many tokens of a sequence the cache has."""
    chain, num_tokens = chain_of(token_ids), len(token_ids)
    return cache.find_prefix(chain, num_tokens, num_reusable_tokens=num_tokens - 1).num_tokens
