"""The cache's books: who holds what, what is shared with whom, windows exact, all given back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.prefix import PrefixChain
from beam_gemma.model.graph_tensors import PagedState
from beam_gemma.model.signature import CONTEXT_ALIGNMENT
from tests.doubles.caches import BLOCK, GROUPS, admit, make_cache
from tests.doubles.fakes import fake_signature


class Row:
    """A sequence as the books see it."""

    def __init__(self, token_ids, num_known, spoiled):
        self.token_ids = token_ids
        self.chain = PrefixChain(token_ids[:num_known], BLOCK)
        self.num_known = self.admitted_with = num_known
        self.computed = 0
        self.spoiled = spoiled  # all that it writes, or reads, is NaN

    def grow(self):
        self.chain._token_ids.append(self.token_ids[self.num_known])
        self.num_known += 1


class Books:
    """Drives a cache as a scheduler would and keeps what each block holds: the tokens up to it."""

    def __init__(self, *, window, device, num_blocks):
        self.window, self.device, self.num_blocks = window, device, num_blocks
        self.budget = 300
        self.cache = make_cache(window=window, device=device, num_blocks=num_blocks)
        self.live = {}
        self.written = {group: np.zeros((num_blocks, BLOCK), object) for group in GROUPS}
        self.spoiled = {group: set() for group in GROUPS}
        self.num_shared_tokens = 0

    def admit(self, root, turn, num_known, max_tokens, chunk, spoiled):
        """Start a row of tokens that others have as well, up to their `turn`."""
        token_ids = [root] * turn + [1000 + turn] * (num_known + max_tokens - turn)
        token_ids = token_ids[: num_known + max_tokens]
        if self.cache.shortage(num_known, max_tokens):
            return
        row = Row(token_ids, num_known, spoiled)
        prefix = self.cache.find_prefix(row.chain, num_known, num_reusable_tokens=num_known - 1)
        assert prefix.num_tokens < num_known, "a token is left to compute"
        new = min(chunk, num_known - prefix.num_tokens, self.budget)
        slot = self.cache.admit(prefix, new, num_spare_blocks=len(self.live))
        if slot is None:
            assert self.live, "an empty cache admits what it could ever hold"
            return
        assert slot not in self.live
        self.num_shared_tokens += prefix.num_tokens
        self.live[slot] = row
        row.computed = prefix.num_tokens
        self.run(slot, new)

    def advance(self, which, chunk):
        slot = self.pick(which)
        if slot is None:
            return
        row = self.live[slot]
        if row.computed == row.num_known == len(row.token_ids):
            self.release(slot)
            return
        if row.computed == row.num_known:
            row.grow()
        new = min(chunk, row.num_known - row.computed, self.budget)
        while not self.cache.extend(slot, row.computed, new):
            newest = list(self.live)[-1]
            self.release(newest)
            if newest == slot:
                return
        self.run(slot, new)

    def leave(self, which):
        slot = self.pick(which)
        if slot is not None:
            self.release(slot)

    def pick(self, which):
        return sorted(self.live)[which % len(self.live)] if self.live else None

    def run(self, slot, new):
        """Write the new tokens, then read whatever the row's tables name."""
        row = self.live[slot]
        for group, blocks in self.cache.take_unclean().items():
            self.spoiled[group] -= set(blocks)
        end = row.computed + new
        self.check_table(slot, row.computed, new)
        for group in GROUPS:
            for position in range(row.computed, end):
                block = self.block(group, slot, position)
                assert self.cache._groups[group].pool.num_holders(block) == 1, "others read it"
                if position % BLOCK == 0:
                    assert block not in self.spoiled[group], "a NaN is handed on"
                self.written[group][block, position % BLOCK] = hash(
                    tuple(row.token_ids[: position + 1])
                )
        held = {group: set(self.held(group, slot)) for group in GROUPS}
        if row.spoiled or any(held[group] & self.spoiled[group] for group in GROUPS):
            row.spoiled = True
            for group in GROUPS:
                first = row.computed // BLOCK * BLOCK
                own = {self.block(group, slot, p) for p in range(first, end)}
                self.spoiled[group] |= own
        self.check_contents(slot, row.computed, end)
        row.computed = end
        if row.spoiled and row.computed == row.num_known:
            self.release(slot, clean=False)  # what no one needs for a token is not noticed
        self.check()

    def release(self, slot, *, clean=True):
        row = self.live.pop(slot)
        self.cache.release(slot, num_computed_tokens=row.computed, clean=clean)
        assert not any(self.cache.block_table(group)[slot].any() for group in GROUPS)
        self.check()

    def block(self, group, slot, position):
        start = int(self.cache.context_starts(group)[slot])
        return int(self.cache.block_table(group)[slot, (position - start) // BLOCK])

    def held(self, group, slot):
        row = self.cache.block_table(group)[slot]
        return row[row > 0].tolist()

    def check(self):
        for group in GROUPS:
            pool = self.cache._groups[group].pool
            table = self.cache.block_table(group)
            blocks, counts = np.unique(table[table > 0], return_counts=True)
            for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
                assert pool.num_holders(block) == count
            free = self.cache.num_free_blocks(group)
            assert free + len(blocks) == self.num_blocks - 1, "a block is lost"
            assert not set(pool._empty) & set(pool._cached)
            assert not (set(pool._empty) | set(pool._cached)) & set(blocks.tolist())
            assert not set(pool._empty) & set(pool._digests)
            assert pool._blocks == {digest: block for block, digest in pool._digests.items()}
            idle = [slot for slot in range(4) if slot not in self.live]
            assert not table[idle].any(), "an idle slot holds blocks"

    def reach(self, group, computed):
        return 0 if group == "full" else max(0, computed - self.window + 1)

    def check_contents(self, slot, computed, end):
        """What a row reads are its own tokens, whoever wrote them."""
        row = self.live[slot]
        for group in GROUPS:
            for position in range(self.reach(group, computed), end, 7):
                content = self.written[group][self.block(group, slot, position), position % BLOCK]
                assert content == hash(tuple(row.token_ids[: position + 1]))

    def check_table(self, slot, computed, new):
        """Every position that a query may reach has a block; on the CPU nothing long past has."""
        for group in GROUPS:
            row = self.cache.block_table(group)[slot]
            start = int(self.cache.context_starts(group)[slot])
            reach = self.reach(group, computed)
            places = (np.arange(reach, computed + new) - start) // BLOCK
            assert places.min() >= 0
            assert row[places].all(), "a position in reach has no block"
            assert np.count_nonzero(row) * BLOCK < computed + new - reach + 2 * CONTEXT_ALIGNMENT
            if self.device == "cpu":
                assert start % CONTEXT_ALIGNMENT == 0
                assert row[: np.count_nonzero(row)].all(), "a table has holes"
            else:
                assert start == 0


ADMIT = st.tuples(
    st.just("admit"),
    st.integers(0, 1),
    st.sampled_from([0, 15, 16, 33, 150, 320]),
    st.integers(1, 500),
    st.integers(1, 300),
    st.integers(1, 400),
    st.sampled_from([False, False, False, True]),
)


@settings(max_examples=60, deadline=None)
@given(
    window=st.sampled_from([1, 5, 40, 128, 129, 200, 512]),
    device=st.sampled_from(["cpu", "cuda"]),
    num_blocks=st.integers(30, 150),
    actions=st.lists(
        st.one_of(
            ADMIT,
            st.tuples(st.just("advance"), st.integers(0, 3), st.integers(1, 400)),
            st.tuples(st.just("leave"), st.integers(0, 3)),
        ),
        max_size=40,
    ),
)
def test_free_blocks_and_slots_balance_after_any_actions(window, device, num_blocks, actions):
    books = Books(window=window, device=device, num_blocks=num_blocks)
    for name, *arguments in actions:
        getattr(books, name)(*arguments)
    while books.live:
        books.advance(0, 300)
    books.admit(0, 150, 200, 1, 300, False)
    while books.live:  # what ran before leaves no trace, whether it is found again or not
        books.advance(0, 300)
    for group in GROUPS:
        assert books.cache.num_free_blocks(group) == num_blocks - 1
    assert books.cache.num_free_slots == 4


def test_rows_that_the_books_admit_share_prefixes():
    """The property above is of rows that share, not of luck that they never do."""
    books = Books(window=40, device="cpu", num_blocks=100)
    for turn in (150, 150, 33):
        books.admit(0, turn, 200, 10, 300, False)
    assert books.num_shared_tokens == 192 + 32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("window", [1, 40, 129, 200])
@pytest.mark.parametrize("chunk", [1, 17, 300])
def test_shortage_counts_the_peak_of_the_worst_run(device, window, chunk):
    """It is never passed, and met where a preempted sequence is recomputed in full chunks."""
    prompt, max_tokens = 1100, 500
    cache = make_cache(window=window, device=device, max_num_batched_tokens=chunk)
    num_tokens = prompt + max_tokens - 1
    slot = admit(cache, num_tokens)
    most = {"full": 0, "sliding": 0}
    for computed in range(0, num_tokens, chunk):
        assert cache.extend(slot, computed, min(chunk, num_tokens - computed))
        for group in most:
            most[group] = max(most[group], 399 - cache.num_free_blocks(group))
    for group, peak in most.items():
        slack = 0 if group == "full" else CONTEXT_ALIGNMENT // BLOCK
        limits = {"device": device, "window": window, "max_num_batched_tokens": chunk}
        assert shortage_with(peak - 1, group, limits)
        assert not shortage_with(peak + slack, group, limits)


def shortage_with(pool, group, limits):
    num_blocks = {"full": 400, "sliding": 400} | {group: pool + 1}
    return make_cache(**limits, num_blocks=num_blocks).shortage(1100, 500)


def test_admission_needs_blocks_for_what_is_known_and_those_to_spare():
    cache = make_cache(num_blocks={"full": 11, "sliding": 400})
    first = admit(cache, 90, 10)
    assert cache.num_free_blocks("full") == 9, "blocks are taken only when a step needs them"
    assert admit(cache, 145) is None, "10 blocks"
    assert admit(cache, 140, num_spare_blocks=1) is None, "9 blocks and 1"
    assert admit(cache, 140) is not None
    cache.release(first, num_computed_tokens=10)


def test_a_prompt_longer_than_a_window_needs_no_more_than_its_peak():
    num_tokens = 300 + 39 + CONTEXT_ALIGNMENT - 1  # a chunk, the window before it, its alignment
    num_blocks = {"full": 400, "sliding": 1 - -num_tokens // BLOCK}
    cache = make_cache(window=40, num_blocks=num_blocks)
    assert cache.shortage(1100, 1) is None
    assert admit(cache, 1100, 300) is not None
    num_blocks["sliding"] -= 1
    assert make_cache(window=40, num_blocks=num_blocks).shortage(1100, 1)


@pytest.mark.parametrize(("window", "peak"), [(38, 25), (39, 26)])
def test_the_peak_of_a_window_is_a_step_and_the_window_before_it_with_its_alignment(window, peak):
    """300 tokens of a step, 37 or 38 before them, and 63 to align: 400 or 401 tokens."""
    num_blocks = {"full": 400, "sliding": 1 + peak}
    assert make_cache(window=window, num_blocks=num_blocks).shortage(1100, 1) is None
    num_blocks["sliding"] = peak
    message = f"{peak} cache blocks of sliding, the cache has {peak - 1}"
    assert make_cache(window=window, num_blocks=num_blocks).shortage(1100, 1) == message


def test_extend_says_so_when_blocks_are_short_and_changes_nothing():
    cache = make_cache(num_blocks={"full": 4, "sliding": 400})
    slot = admit(cache, 30, 30)
    assert admit(cache, 16, 16) is not None
    before = [cache.block_table(group).tolist() for group in GROUPS]
    assert not cache.extend(slot, 30, 3)
    assert [cache.block_table(group).tolist() for group in GROUPS] == before
    assert cache.extend(slot, 30, 2)


def test_slots_limit_admission():
    cache = make_cache(max_num_seqs=2)
    assert {admit(cache, 1, 1), admit(cache, 1, 1)} == {0, 1}
    assert admit(cache, 1, 1) is None


def test_shortage_names_the_group_and_both_numbers():
    cache = make_cache(num_blocks={"full": 11, "sliding": 400})
    assert cache.shortage(100, 61) is None
    assert cache.shortage(100, 62) == "11 cache blocks of full, the cache has 10"


def test_a_window_moves_by_whole_alignments_on_the_cpu():
    cache = make_cache(window=40)
    slot = admit(cache, 300, 300)
    before = cache.block_table("sliding")[slot, :19].tolist()
    cache.extend(slot, 295, 1)  # reaches back to 256
    assert cache.context_starts("sliding")[slot] == 256
    assert cache.block_table("sliding")[slot, :4].tolist() == [*before[16:], 0]
    assert cache.context_starts("full")[slot] == 0


def test_a_window_moves_by_blocks_on_cuda_and_leaves_zeros():
    cache = make_cache(window=40, device="cuda")
    slot = admit(cache, 300, 300)
    before = cache.block_table("sliding")[slot, :19].tolist()
    cache.extend(slot, 295, 1)  # reaches back to 256
    assert cache.block_table("sliding")[slot, :19].tolist() == [0] * 16 + before[16:]
    assert cache.context_starts("sliding")[slot] == 0


def test_use_counts_blocks_of_each_layer_that_are_held():
    states = (
        PagedState(group="full", layers=(2, 5), num_key_value_heads=1, head_dim=8),
        PagedState(
            group="sliding", layers=(0, 1, 3), num_key_value_heads=1, head_dim=8, sliding_window=40
        ),
    )
    cache = KVCache(
        fake_signature(states=states),
        num_blocks={"full": 11, "sliding": 21},
        max_num_seqs=4,
        max_num_batched_tokens=300,
    )
    assert cache.use == (0, 2 * 10 + 3 * 20)
    slot = admit(cache, 40, 40)
    assert cache.use == (2 * 3 + 3 * 3, 80)
    cache.release(slot, num_computed_tokens=40)
    assert cache.use == (0, 80)


def test_wiped_blocks_are_those_after_the_tokens_to_keep_of_every_row():
    cache = make_cache(num_blocks={"full": 20, "sliding": 40})
    admit(cache, 3 * BLOCK, 3 * BLOCK)
    slots = [admit(cache, 4 * BLOCK, 3 * BLOCK + 1) for _ in range(2)]
    blocks = {group: cache.block_table(group)[slots, 2:4].ravel().tolist() for group in GROUPS}
    for slot in slots:
        cache.wipe(slot, 2 * BLOCK)
    assert cache.take_unclean() == blocks
    assert cache.take_unclean() == {}


@pytest.mark.parametrize(("device", "widths"), [("cpu", (128, 28)), ("cuda", (125, 125))])
def test_tables_are_as_wide_as_the_longest_row(device, widths):
    """On the CPU in blocks of whole alignments, and a window no wider than what a step reads."""
    # 2,000 tokens; 300 new ones, 39 before them and 63 to align: 402, so 448.
    cache = make_cache(window=40, device=device, max_num_seqs=3)
    for group, width in zip(GROUPS, widths, strict=True):
        assert cache.block_table(group).shape == (3, width)
        assert cache.block_table(group).dtype == np.int32
        assert cache.context_starts(group).tolist() == [0, 0, 0]
        assert cache.context_starts(group).dtype == np.int32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_slot_that_is_free_again_has_an_empty_row_and_gets_its_own_first_block(device):
    cache = make_cache(window=40, device=device)
    assert all(cache.block_table(group)[admit(cache, 1, 1), 0] for group in GROUPS)
    slot = admit(cache, 300, 300)
    cache.extend(slot, 300, 1)
    cache.release(slot, num_computed_tokens=301)
    for group in GROUPS:
        assert not cache.block_table(group)[slot].any()
        assert cache.context_starts(group)[slot] == 0
    assert admit(cache, 1, 1) == slot
    for group in GROUPS:
        assert np.flatnonzero(cache.block_table(group)[slot]).tolist() == [0]
