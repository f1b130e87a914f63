"""Chunks of a prompt of 128K tokens: bounded in what they hold at once, and not too small."""

import pytest

from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.scheduler import MAX_CHUNK_AREA, Scheduler
from beam_gemma.engine.sequence import Request, Sequence
from beam_gemma.model.signature import QUERY_TILE
from tests.doubles.fakes import fake_signature

NUM_TOKENS, BUDGET = 130_000, 1024


def chunks_of(device):
    """Return the chunks that a long prompt is computed in, as (tokens before, new tokens)."""
    signature = fake_signature(max_model_len=131_072, device=device)
    cache = KVCache(
        signature,
        num_blocks={"full": 40_000, "sliding": 40_000},
        max_num_seqs=1,
        max_num_batched_tokens=BUDGET,
    )
    scheduler = Scheduler(
        cache, signature, max_num_batched_tokens=BUDGET, enable_prefix_caching=False
    )
    params = SamplingParams(max_tokens=1)
    request = Request(request_id="r", prompt_token_ids=(3,) * NUM_TOKENS, params=params)
    sequence = Sequence(request, frozenset())
    scheduler.add([sequence])
    chunks = []
    while sequence.is_prefilling:
        [(_, num_new_tokens)] = scheduler.schedule()
        chunks.append((sequence.num_computed_tokens, num_new_tokens))
        sequence.launch(num_new_tokens)
        sequence.settle(num_new_tokens)
    return chunks


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_of_a_long_prompt_is_computed_once(device):
    chunks = chunks_of(device)
    assert [past for past, _ in chunks] == [
        sum(n for _, n in chunks[:i]) for i in range(len(chunks))
    ]
    assert sum(n for _, n in chunks) == NUM_TOKENS


def test_on_the_cpu_chunks_shrink_as_the_context_grows():
    chunks = chunks_of("cpu")
    assert all(n <= QUERY_TILE or n * (past + n) <= MAX_CHUNK_AREA for past, n in chunks)
    assert chunks[0][1] > BUDGET / 2
    assert all(n > QUERY_TILE / 2 for _, n in chunks)


def test_on_cuda_chunks_do_not_shrink_as_the_context_grows():
    assert min(n for _, n in chunks_of("cuda")) > BUDGET / 2
