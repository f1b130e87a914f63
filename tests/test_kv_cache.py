"""The cache's books: no block shared or lost, reservations kept, windows exact, all given back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.kv_cache import KVCache
from beam_gemma.signature import CONTEXT_ALIGNMENT, PagedState
from tests.fakes import fake_signature

BLOCK = 16
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


class Books:
    """Drives a cache as a scheduler would, and checks it against its promises after each call."""

    def __init__(self, *, window, device, num_blocks):
        self.window, self.device, self.num_blocks = window, device, num_blocks
        self.budget = 300
        self.cache = make_cache(window=window, device=device, num_blocks=num_blocks)
        self.live = {}  # slot: [prompt, max_tokens, computed]

    def admit(self, prompt, max_tokens):
        if self.cache.shortage(prompt, max_tokens):
            return
        slot = self.cache.admit(prompt, max_tokens)
        if slot is None:
            assert self.live, "an empty cache admits what it could ever hold"
            return
        assert slot not in self.live
        self.live[slot] = [prompt, max_tokens, 0]
        self.check()

    def advance(self, which, chunk):
        if not self.live:
            return
        slot = sorted(self.live)[which % len(self.live)]
        prompt, max_tokens, computed = self.live[slot]
        if computed < prompt:
            new = min(chunk, prompt - computed, self.budget)
        elif computed < prompt + max_tokens - 1:
            new = 1
        else:
            self.release(which)
            return
        self.cache.extend(slot, computed, new)
        self.check_table(slot, computed, new)
        self.live[slot][2] = computed + new
        self.check()

    def release(self, which):
        if not self.live:
            return
        slot = sorted(self.live)[which % len(self.live)]
        self.cache.release(slot)
        del self.live[slot]
        assert not self.cache.block_table("full")[slot].any()
        self.check()

    def check(self):
        for group in ("full", "sliding"):
            table = self.cache.block_table(group)
            held = table[table > 0].tolist()
            assert len(held) == len(set(held)), "a block has two owners"
            assert all(0 < block < self.num_blocks for block in held)
            free = self.cache.num_free_blocks(group)
            assert free + len(held) == self.num_blocks - 1, "a block is lost"
            idle = [slot for slot in range(4) if slot not in self.live]
            assert not table[idle].any(), "an idle slot holds blocks"

    def check_table(self, slot, computed, new):
        """Every position that a query may reach has a block; on the CPU nothing long past has."""
        for group, window in (("full", None), ("sliding", self.window)):
            row = self.cache.block_table(group)[slot]
            start = int(self.cache.context_starts(group)[slot])
            reach = 0 if window is None else max(0, computed - window + 1)
            places = (np.arange(reach, computed + new) - start) // BLOCK
            assert places.min() >= 0
            assert row[places].all(), "a position in reach has no block"
            assert np.count_nonzero(row) * BLOCK < computed + new - reach + 2 * CONTEXT_ALIGNMENT
            if self.device == "cpu":
                assert start % CONTEXT_ALIGNMENT == 0
                assert row[: np.count_nonzero(row)].all(), "a table has holes"
            else:
                assert start == 0


@settings(max_examples=40, deadline=None)
@given(
    window=st.sampled_from([1, 5, 40, 128, 129, 200, 512]),
    device=st.sampled_from(["cpu", "cuda"]),
    num_blocks=st.integers(30, 200),
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("admit"), st.integers(1, 900), st.integers(1, 300)),
            st.tuples(st.just("advance"), st.integers(0, 3), st.integers(1, 400)),
            st.tuples(st.just("release"), st.integers(0, 3)),
        ),
        max_size=60,
    ),
)
def test_books_balance_whatever_happens(window, device, num_blocks, actions):
    books = Books(window=window, device=device, num_blocks=num_blocks)
    for name, *arguments in actions:
        getattr(books, name)(*arguments)
    while books.live:
        books.advance(0, 300)
    books.admit(400, 1)
    while books.live:  # what ran before leaves no trace
        books.advance(0, 300)
    for group in ("full", "sliding"):
        assert books.cache.num_free_blocks(group) == num_blocks - 1
    assert books.cache.num_free_slots == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("window", [1, 40, 129, 200])
@pytest.mark.parametrize("chunk", [1, 17, 300])
def test_reservation_is_what_the_worst_run_needs(device, window, chunk):
    """The peak is never passed, and met where chunks are as long as they may be."""
    prompt, max_tokens = 1100, 500
    cache = make_cache(window=window, device=device, max_num_batched_tokens=chunk)
    slot = cache.admit(prompt, max_tokens)
    most = {"full": 0, "sliding": 0}
    computed = 0
    while computed < prompt + max_tokens - 1:
        new = min(chunk, prompt - computed) if computed < prompt else 1
        cache.extend(slot, computed, new)
        computed += new
        for group in most:
            most[group] = max(most[group], 399 - cache.num_free_blocks(group))
    cache.release(slot)
    for group, peak in most.items():
        slack = 0 if group == "full" else CONTEXT_ALIGNMENT // BLOCK
        limits = {"device": device, "window": window, "max_num_batched_tokens": chunk}
        assert shortage_with(peak - 1, group, limits)
        assert not shortage_with(peak + slack, group, limits)


def shortage_with(pool, group, limits):
    num_blocks = {"full": 400, "sliding": 400} | {group: pool + 1}
    return make_cache(**limits, num_blocks=num_blocks).shortage(1100, 500)


def test_admission_waits_for_what_a_running_sequence_may_still_take():
    cache = make_cache(num_blocks={"full": 11, "sliding": 400})
    first = cache.admit(16, 81)  # 96 tokens: 6 blocks
    assert cache.num_free_blocks("full") == 10, "blocks are taken only when a step needs them"
    assert cache.admit(16, 65) is None, "5 more blocks do not fit beside 6"
    second = cache.admit(16, 49)
    assert second is not None
    cache.release(first)
    assert cache.admit(16, 81) is not None


def test_slots_limit_admission():
    cache = make_cache(max_num_seqs=2)
    slots = {cache.admit(1, 1), cache.admit(1, 1)}
    assert slots == {0, 1}
    assert cache.admit(1, 1) is None


def test_shortage_names_the_group_and_both_numbers():
    cache = make_cache(num_blocks={"full": 11, "sliding": 400})
    assert cache.shortage(100, 61) is None
    assert cache.shortage(100, 62) == "11 cache blocks of full, the cache has 10"


def test_a_window_moves_by_whole_alignments_on_the_cpu():
    cache = make_cache(window=40)
    slot = cache.admit(300, 100)
    cache.extend(slot, 0, 300)
    before = cache.block_table("sliding")[slot, :19].tolist()
    cache.extend(slot, 295, 1)  # reaches back to 256
    assert cache.context_starts("sliding")[slot] == 256
    assert cache.block_table("sliding")[slot, :4].tolist() == [*before[16:], 0]
    assert cache.context_starts("full")[slot] == 0


def test_a_window_moves_by_blocks_on_cuda_and_leaves_zeros():
    cache = make_cache(window=40, device="cuda")
    slot = cache.admit(300, 100)
    cache.extend(slot, 0, 300)
    before = cache.block_table("sliding")[slot, :19].tolist()
    cache.extend(slot, 295, 1)  # reaches back to 256
    assert cache.block_table("sliding")[slot, :19].tolist() == [0] * 16 + before[16:]
    assert cache.context_starts("sliding")[slot] == 0


def test_blocks_of_a_failed_row_are_unclean_once():
    cache = make_cache()
    slot = cache.admit(40, 10)
    cache.extend(slot, 0, 40)
    blocks = cache.block_table("full")[slot, :3].tolist()
    cache.release(slot, clean=False)
    unclean = cache.take_unclean()
    assert sorted(unclean["full"]) == sorted(blocks)
    assert len(unclean["sliding"]) == 3
    assert cache.take_unclean() == {}
    slot = cache.admit(40, 10)
    cache.extend(slot, 0, 40)
    cache.release(slot)
    assert cache.take_unclean() == {}


def test_prompt_blocks_that_a_window_leaves_are_unclean_and_later_ones_are_not():
    cache = make_cache(window=40)
    slot = cache.admit(200, 400)
    cache.extend(slot, 0, 200)
    prompt_blocks = cache.block_table("sliding")[slot, :13].tolist()
    unclean = []
    for computed in range(200, 599):
        cache.extend(slot, computed, 1)
        unclean += cache.take_unclean().get("sliding", [])
    assert sorted(unclean) == sorted(prompt_blocks)
