"""Blocks that outlive their row: found again by their tokens, clean when they are used anew."""

import itertools

import pytest

from beam_gemma.engine.block_pool import BlockPool
from beam_gemma.engine.prefix import DIGEST_SIZE, Mark, PrefixChain, digest_of
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.model.signature import CONTEXT_ALIGNMENT
from tests.doubles.caches import BLOCK, GROUPS, admit, chain_of, found, make_cache
from tests.doubles.fakes import fake_picture


def test_a_digest_stands_for_all_tokens_up_to_its_blocks_end():
    base = [*range(40), *range(40)]
    digests = chain_of(base).digests(0, 5)
    assert len(set(digests)) == 5
    assert {len(digest) for digest in digests} == {DIGEST_SIZE}
    for position in range(80):
        other = base.copy()
        other[position] += 1
        first = position // BLOCK
        assert chain_of(other).digests(0, first) == digests[:first]
        assert not set(chain_of(other).digests(first, 5)) & set(digests)


def test_a_digest_stands_for_the_marks_that_its_block_overlaps():
    base = [7] * 80

    def digests(*marks):
        return PrefixChain(base, BLOCK, [Mark(*mark) for mark in marks]).digests(0, 5)

    one, other = (digest_of(text) for text in (b"1", b"2"))
    plain, marked = digests(), digests((20, 40, one))
    assert [a == b for a, b in zip(plain, marked, strict=True)] == [True, *[False] * 4]
    variants = [(20, 40, other), (19, 40, one), (20, 41, one), (36, 56, one)]
    for variant in variants:
        first = variant[0] // BLOCK
        assert digests(variant)[:first] == plain[:first]
        assert not set(digests(variant)[first:]) & {*plain, *marked}
    # Up to the end of the block where a mark begins, what comes later makes no difference.
    assert digests((20, 40, one), (48, 60, other))[:3] == marked[:3]
    assert digests((20, 40, one), (48, 60, other))[3] != marked[3]


def request_with(media=(), spans=(), last=8):
    return Request(
        request_id="r",
        prompt_token_ids=(*[7] * 79, last),
        params=SamplingParams(max_tokens=1),
        media=tuple(fake_picture(number, start) for number, start in media),
        spans=spans,
    )


def prefixes(request):
    return PrefixChain(request.prompt_token_ids, BLOCK, request.marks()).digests(0, 5)


def num_shared(request, other):
    return sum(a == b for a, b in zip(prefixes(request), prefixes(other), strict=True))


def test_pictures_share_the_blocks_up_to_the_first_that_differs():
    spans = ((20, 40), (44, 64))
    base = request_with([(1, 20), (2, 44)], spans)
    assert num_shared(base, request_with([(1, 20), (2, 44)], spans)) == 5
    assert num_shared(base, request_with([(3, 20), (2, 44)], spans)) == 1
    # The second picture begins in the third block.
    assert num_shared(base, request_with([(1, 20), (3, 44)], spans)) == 2
    assert num_shared(base, request_with([(1, 20), (2, 44)], spans, last=9)) == 4
    assert num_shared(base, request_with([], spans)) == 1
    assert num_shared(base, request_with([(1, 20), (2, 44)])) == 1, "it is seen one way only"


def test_blocks_of_a_wide_span_are_shared_if_all_of_the_span_is_equal():
    base = request_with([(1, 40)], ((0, 80),))
    assert num_shared(base, request_with([(1, 40)], ((0, 80),))) == 5
    assert num_shared(base, request_with([(1, 40)], ((0, 80),), last=9)) == 0
    assert num_shared(base, request_with([(2, 40)], ((0, 80),))) == 0
    assert num_shared(base, request_with([(1, 41)], ((0, 80),))) == 0
    assert num_shared(base, request_with([(1, 40)], ((0, 79),))) == 0


def test_a_chain_follows_its_sequence_and_has_no_digest_of_a_part():
    token_ids = [1] * 31
    chain = PrefixChain(token_ids, BLOCK)
    first = chain.digests(0, 1)
    with pytest.raises(AssertionError, match=r"^a block that is not full has no digest"):
        chain.digests(1, 2)
    token_ids.append(1)
    assert chain.digests(0, 2) == [*first, *chain_of([1] * 32).digests(1, 2)]


def test_digest_does_not_run_token_ids_together():
    """Ids of more than one byte, and neighbours that share their digits."""
    ids = [[1, 23] * 8, [12, 3] * 8, [256, 0] * 8, [0, 256] * 8, [2**20 + 1] * 16]
    assert len({chain_of(tokens).digests(0, 1)[0] for tokens in ids}) == len(ids)


def test_blocks_of_a_new_pool_are_free():
    pool = BlockPool(4)
    assert (pool.num_blocks, pool.num_free) == (3, 3)
    assert [pool.num_holders(block) for block in range(4)] == [0] * 4
    assert sorted(pool.allocate() for _ in range(3)) == [1, 2, 3]
    assert pool.num_free == 0
    assert pool.take_unclean() == []


def test_of_two_blocks_with_one_digest_the_first_is_found():
    pool = BlockPool(4)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"x")
    pool.register(second, b"x")
    assert pool.find(b"x") == first
    pool.forget(second)
    assert pool.find(b"x") == first
    pool.forget(first)
    assert pool.find(b"x") is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_shared_prefix_uses_the_blocks_it_lies_in(device):
    cache = make_cache(window=40, device=device)
    first = admit(cache, 300, 300, chain=chain_of([7] * 300))
    full, sliding = (cache.block_table(group)[first].tolist() for group in GROUPS)
    chain = chain_of([7] * 290 + [8] * 10)
    prefix = cache.find_prefix(chain, 300, num_reusable_tokens=299)
    second = admit(cache, 300, 5, chain=chain)
    # 288 tokens are equal in full blocks; the next one reaches back to 249.
    assert cache.block_table("full")[second, :20].tolist() == [*full[:18], *[full[18] + 1], 0]
    row = cache.block_table("sliding")[second].tolist()
    if device == "cpu":
        start = 249 // CONTEXT_ALIGNMENT * CONTEXT_ALIGNMENT
        assert cache.context_starts("sliding")[second] == start
        expected = sliding[start // BLOCK : 18]
    else:
        expected = [*[0] * 15, *sliding[15:18]]
    assert row[: len(expected) + 2] == [*expected, sliding[18] + 1, 0]
    assert prefix.num_tokens == 288
    assert prefix.blocks == {"full": full[:18], "sliding": [b for b in expected if b]}


def test_a_sequence_needs_no_free_blocks_for_a_prefix_that_another_one_holds():
    cache = make_cache(num_blocks=1 + 19 + 1)
    admit(cache, 300, 300, chain=chain_of([7] * 300))
    assert admit(cache, 305, 5, chain=chain_of([7] * 290 + [8] * 15)) is None
    assert admit(cache, 304, 5, chain=chain_of([7] * 290 + [8] * 14)) is not None


def test_a_prefix_is_found_after_its_owner_has_gone_and_eviction_takes_the_oldest_first():
    cache = make_cache(num_blocks=11)
    for token in (1, 2):
        slot = admit(cache, 49, 49, chain=chain_of([token] * 49))
        cache.release(slot, num_computed_tokens=49)
    assert cache.num_free_blocks("full") == 10
    # Six blocks: four that have no digest, and two of the first row, from its end.
    admit(cache, 96, 96)
    assert found(cache, [1] * 49) == 16
    assert found(cache, [2] * 49) == 48


def test_a_prompt_found_whole_computes_one_token_at_least():
    cache = make_cache()
    admit(cache, 64, 64, chain=chain_of([7] * 64))
    assert [found(cache, [7] * n) for n in (16, 17, 32, 33, 64, 65, 99)] == [
        0, 16, 16, 32, 48, 64, 64,
    ]  # fmt: skip


def test_tokens_that_no_step_has_are_not_shared():
    cache = make_cache()
    chain = chain_of([7] * 300)
    slot = admit(cache, 300, 100, chain=chain)
    assert found(cache, [7] * 300) == 96
    cache.extend(slot, 100, 60)
    assert found(cache, [7] * 300) == 160


def test_a_prefix_is_found_only_if_every_group_holds_it():
    """What the window has left behind may be overwritten while the other group keeps its part."""
    cache = make_cache(window=16, device="cuda", num_blocks={"full": 99, "sliding": 20})
    slot = admit(cache, 200, 200, chain=chain_of([7] * 200))
    cache.extend(slot, 200, 1)
    assert found(cache, [7] * 200) == 192
    assert found(cache, [7] * 150) == 144, "found again, though the window went on"
    admit(cache, 17 * BLOCK, 17 * BLOCK)
    assert found(cache, [7] * 150) == 0
    assert found(cache, [7] * 209) == 192, "its window is still held"


def test_sharers_are_those_who_count_on_blocks_to_come():
    cache = make_cache()
    first = admit(cache, 100, 100, chain=chain_of([7] * 100))
    second = admit(cache, 60, 60 - 48, chain=chain_of([7] * 48 + [8] * 12))
    third = admit(cache, 60, 60 - 48, chain=chain_of([7] * 48 + [8] * 12))
    assert cache.sharers(first, 0) == [second, third]
    assert cache.sharers(first, 47) == [second, third]
    assert cache.sharers(first, 48) == []
    assert cache.sharers(second, 48) == []


def test_sharers_are_found_in_any_group():
    """With a window of one token, the rows share blocks of the other group alone."""
    cache = make_cache(window=1, device="cuda")
    first = admit(cache, 100, 100, chain=chain_of([7] * 100))
    second = admit(cache, 60, 60 - 48, chain=chain_of([7] * 48 + [8] * 12))
    shared = [cache.block_table(group)[[first, second], 0].tolist() for group in GROUPS]
    assert shared == [[1, 1], [1, 0]]
    assert cache.sharers(first, 0) == [second]


def test_blocks_of_a_failed_row_are_zeroed_before_they_are_used_again_and_not_found():
    cache = make_cache(num_blocks=4)
    slot = admit(cache, 40, 40, chain=chain_of([7] * 40))
    cache.release(slot, num_computed_tokens=40, clean=False)
    assert found(cache, [7] * 40) == 0
    assert cache.take_unclean() == {}, "nobody needs them yet"
    slot = admit(cache, 40, 40)
    unclean = cache.take_unclean()
    assert {group: sorted(blocks) for group, blocks in unclean.items()} == {
        "full": [1, 2, 3],
        "sliding": [1, 2, 3],
    }
    assert cache.take_unclean() == {}
    cache.release(slot, num_computed_tokens=40)
    admit(cache, 40, 40)
    assert cache.take_unclean() == {}, "a token was chosen, so they are finite"


def test_a_shared_block_is_clean_once_one_of_its_holders_has_a_token():
    cache = make_cache(num_blocks=3)
    first = admit(cache, 17, 17, chain=chain_of([7] * 17))
    cache.release(first, num_computed_tokens=17)
    second = admit(cache, 17, 1, chain=chain_of([7] * 16 + [8]))
    cache.release(second, num_computed_tokens=17, clean=False)
    admit(cache, 32, 32)
    # Block 1 held 16 tokens that the first row has read; block 2 the rest of either.
    assert cache.take_unclean() == {"full": [2], "sliding": [2]}


def test_blocks_of_a_row_preempted_before_its_first_token_are_unclean():
    cache = make_cache(num_blocks=4)
    slot = admit(cache, 48, 32, chain=chain_of([7] * 48))
    cache.release(slot, num_computed_tokens=32)
    assert found(cache, [7] * 48) == 32, "it is found, and whoever reads it will see"
    admit(cache, 48, 48)
    assert sorted(cache.take_unclean()["full"]) == [1, 2]


def test_blocks_that_the_first_token_does_not_reach_are_zeroed_and_the_rest_are_not():
    cache = make_cache(window=40)
    slot = admit(cache, 200, 200)
    prompt_blocks = cache.block_table("sliding")[slot, :13].tolist()
    for computed in range(200, 599):
        assert cache.extend(slot, computed, 1)
    cache.release(slot, num_computed_tokens=599)
    slots = [admit(cache, 1600, 300) for _ in range(4)]
    for computed, slot in itertools.product(range(300, 1600, 300), slots):
        cache.extend(slot, computed, min(300, 1600 - computed))
    # The first token reaches back from 199 to 160: ten blocks are wholly before that.
    zeroed = cache.take_unclean()["sliding"]
    assert set(prompt_blocks[:10]) <= set(zeroed)
    assert not set(prompt_blocks[10:]) & set(zeroed[:10])
