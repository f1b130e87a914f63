"""Assignment of cache blocks to sequences, as integers; the tensors belong to the session.

Each group of layers has a pool of blocks (block_pool.py) and a table with a row for each running
sequence, which lists the blocks of its tokens in order. A sequence takes blocks step by step and
gives back those that its attention window has left behind. Sequences whose first tokens are equal
share the blocks of these tokens. A group that holds sources has cells for a sequence's source too:
it gets their blocks with its first step and gives none back before its end, and they are not
shared. Invariants of each group:

    holders of a block = rows of the table that name it
    a block has two holders only if their tokens are equal up to its end
    a sequence writes only to blocks that it allocated itself

Each layer of a graph writes the new tokens of a step before any sequence reads them, so a block may
be shared from the step that computes it on: its digest is registered when that step is scheduled.
Within the step, the sequence that computes a block comes before those that share it.

Unused entries of a table point to block 0, which stays zero.

Dimensions: S slots, M blocks in a table row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from beam_gemma.engine.block_pool import BlockPool
from beam_gemma.engine.prefix import PrefixChain
from beam_gemma.model.graph_tensors import PagedState
from beam_gemma.model.signature import CONTEXT_ALIGNMENT, Signature, blocks_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """The leading tokens of a sequence that the cache already holds, possibly none."""

    chain: PrefixChain | None
    """Digests of the sequence's blocks; None if it shares no blocks."""
    num_known_tokens: int
    """Number of all tokens of the sequence; computing the last one gives the next token."""
    num_tokens: int
    blocks: Mapping[str, list[int]]
    """Blocks of each group that the next token or a later one reads."""
    num_source_tokens: int = 0
    """Number of tokens of the sequence's source."""


class KVCache:
    """Slots for running sequences, and each slot's row of blocks in every group's table."""

    def __init__(
        self,
        signature: Signature,
        *,
        num_blocks: Mapping[str, int],
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        """Start with all slots and blocks free.

        Args:
            signature: Signature that defines the groups, their windows and the block size.
            num_blocks: Number of blocks in each group's pool, block 0 included.
            max_num_seqs: Number of slots.
            max_num_batched_tokens: Maximum number of new tokens of one sequence in a step.
        """
        self._groups = {
            state.group: _Group(
                signature, state, num_blocks[state.group], max_num_seqs, max_num_batched_tokens
            )
            for state in signature.paged_states
        }
        self._layers = {state.group: state.layers for state in signature.paged_states}
        self._block_size = signature.block_size
        self._prefixes: dict[int, Prefix] = {}
        self._quiet_until = [0] * max_num_seqs
        """Token count of each slot up to which one more token needs no change of the tables."""
        self._free_slots = list(range(max_num_seqs))[::-1]

    @property
    def num_slots(self) -> int:
        """Maximum number of sequences that run at once."""
        return len(self._free_slots) + len(self._prefixes)

    @property
    def num_free_slots(self) -> int:
        """Number of further sequences that can be admitted if blocks suffice."""
        return len(self._free_slots)

    @property
    def use(self) -> tuple[int, int]:
        """Held part and total size of the cache, in blocks of one layer."""
        pools = [(len(self._layers[name]), g.pool) for name, g in self._groups.items()]
        held = sum(n * (pool.num_blocks - pool.num_free) for n, pool in pools)
        return held, sum(n * pool.num_blocks for n, pool in pools)

    def num_free_blocks(self, group: str) -> int:
        """Return the number of blocks of a group that no sequence holds."""
        return self._groups[group].pool.num_free

    def shortage(
        self, num_prompt_tokens: int, max_tokens: int, *, num_source_tokens: int = 0
    ) -> str | None:
        """Return a message naming a group that can never hold such a sequence, or None."""
        num_tokens = num_prompt_tokens + max_tokens - 1  # the last token is never an input
        for name, group in self._groups.items():
            peak = group.peak_blocks(num_tokens, num_source_tokens)
            if peak > group.pool.num_blocks:
                return f"{peak} cache blocks of {name}, the cache has {group.pool.num_blocks}"
        return None

    def find_prefix(
        self,
        chain: PrefixChain | None,
        num_known_tokens: int,
        *,
        num_reusable_tokens: int,
        num_source_tokens: int = 0,
    ) -> Prefix:
        """Return the longest cached prefix in full blocks, within the reusable tokens."""
        num_blocks = num_reusable_tokens // self._block_size
        digests = [] if chain is None else chain.digests(0, num_blocks)
        # If a prefix lacks a block, all shorter ones that extend past the gap lack it too.
        while gaps := [g for group in self._groups.values() if (g := group.gap(digests)) >= 0]:
            digests = digests[: min(gaps)]
        return Prefix(
            chain=chain,
            num_known_tokens=num_known_tokens,
            num_tokens=len(digests) * self._block_size,
            blocks={name: group.find(digests) for name, group in self._groups.items()},
            num_source_tokens=num_source_tokens,
        )

    def admit(self, prefix: Prefix, num_new_tokens: int, *, num_spare_blocks: int) -> int | None:
        """Return a slot for a sequence, with the blocks of its first step; None if it must wait.

        Blocks must be free for all of its known tokens; otherwise a long prompt could be preempted
        and restarted forever.

        Args:
            prefix: Prefix of the sequence, from `find_prefix`.
            num_new_tokens: Number of tokens after the prefix that the step computes.
            num_spare_blocks: Number of further blocks that must be free in each group that grows
                with the tokens of running sequences.
        """
        if not self._free_slots or any(
            group.num_needed(prefix) + group.grows * num_spare_blocks > group.pool.num_free
            for group in self._groups.values()
        ):
            return None
        slot = self._free_slots.pop()
        self._prefixes[slot] = prefix
        for group in self._groups.values():
            group.open(slot, prefix)
        extended = self.extend(slot, prefix.num_tokens, num_new_tokens)
        assert extended
        return slot

    def extend(
        self,
        slot: int,
        num_computed_tokens: int,
        num_new_tokens: int,
        *,
        num_in_flight: int = 0,
    ) -> bool:
        """Extend a slot's table rows for its next step; return False if blocks are short.

        Blocks that the window has left behind are given back in either case.

        Args:
            slot: Slot of a running sequence.
            num_computed_tokens: Number of tokens computed before the step.
            num_new_tokens: Number of tokens that the step computes.
            num_in_flight: Number of computed tokens that may have to be computed again.
        """
        num_tokens = num_computed_tokens + num_new_tokens
        if num_new_tokens == 1 and num_tokens <= self._quiet_until[slot]:
            return True
        for group in self._groups.values():
            group.give_back(slot, num_computed_tokens - num_in_flight)
        for group in self._groups.values():
            if group.num_missing(slot, num_tokens) > group.pool.num_free:
                return False
        for group in self._groups.values():
            group.take(slot, num_tokens)
        chain = self._prefixes[slot].chain
        begin, end = num_computed_tokens // self._block_size, num_tokens // self._block_size
        if chain is not None and begin < (end := min(end, chain.num_blocks)):
            digests = chain.digests(begin, end)
            for group in self._groups.values():
                group.register(slot, begin, digests)
        quiet = (group.quiet_until(slot) for group in self._groups.values())
        self._quiet_until[slot] = min(quiet, default=0)
        return True

    def release(self, slot: int, *, num_computed_tokens: int, clean: bool = True) -> None:
        """Free a slot and release all of its blocks.

        Args:
            slot: Slot of the sequence that leaves.
            num_computed_tokens: Number of tokens that it has computed.
            clean: False if blocks may hold a NaN or were not computed; their digests are removed.
        """
        prefix = self._prefixes.pop(slot)
        self._quiet_until[slot] = 0
        proven = clean and num_computed_tokens >= prefix.num_known_tokens
        for group in self._groups.values():
            group.close(slot, keep_digests=clean, proven=proven)
        self._free_slots.append(slot)

    def wipe(self, slot: int, num_tokens: int) -> None:
        """Mark a slot's blocks after those of its first `num_tokens` for zeroing."""
        for group in self._groups.values():
            first = blocks_for(group.num_cells(slot, num_tokens), self._block_size)
            group.pool.wipe(group.blocks(slot, first))

    def sharers(self, slot: int, num_computed_tokens: int) -> list[int]:
        """Return the other slots that share blocks which this one has not computed yet."""
        first = num_computed_tokens // self._block_size
        slots: set[int] = set()
        for group in self._groups.values():
            slots |= group.holders(group.blocks(slot, first))
        return sorted(slots - {slot})

    def take_unclean(self) -> dict[str, list[int]]:
        """Return each group's blocks to zero before the next run, and clear these lists."""
        unclean = {name: group.pool.take_unclean() for name, group in self._groups.items()}
        return {name: blocks for name, blocks in unclean.items() if blocks}

    def block_table(self, group: str) -> Int32[np.ndarray, "S M"]:
        """Return the live table of a group; unused entries of a row are 0."""
        return self._groups[group].table

    def context_starts(self, group: str) -> Int32[np.ndarray, " S"]:
        """Return the position of the first token of each row of a group's table."""
        return self._groups[group].starts


@dataclass(slots=True)
class _Held:
    """The range of blocks that one sequence holds in one group, as indices in the sequence."""

    begin: int
    end: int
    first_proven: int
    """First block entirely within reach of the first token that the model chooses."""
    num_source_tokens: int


class _Group:
    """The pool and the table of one group of layers.

    On the CPU a row of the table starts at the first block in reach, at a multiple of
    CONTEXT_ALIGNMENT tokens. On CUDA it starts at the start of the sequence, and entries out of
    reach are 0.
    """

    def __init__(
        self,
        signature: Signature,
        state: PagedState,
        num_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.grows = state.holds != "source"
        """True if the tokens of a sequence take blocks, not only its source."""
        self._name = state.group
        self._state = state
        self._held: dict[int, _Held] = {}
        self._block_size = signature.block_size
        # Cells that hold sources stay, and a window goes round behind them.
        self._window = state.sliding_window if state.holds == "target" else None
        self._max_new = max_num_batched_tokens
        self._max_len = signature.max_model_len
        self._alignment = CONTEXT_ALIGNMENT if signature.device == "cpu" else self._block_size
        self._shifts = signature.takes_context_starts(state)
        widest = state.num_cells(signature.max_source_len, signature.max_model_len)
        if self._shifts:
            widest = self._peak_tokens(widest)
        width = blocks_for(widest, self._alignment) * self._alignment // self._block_size
        self.table = np.zeros((max_num_seqs, width), np.int32)
        self.starts = np.zeros(max_num_seqs, np.int32)

    def peak_blocks(self, num_tokens: int, num_source_tokens: int) -> int:
        """Return the maximum number of blocks that a sequence of `num_tokens` holds at once."""
        num_cells = self._state.num_cells(num_source_tokens, num_tokens)
        return blocks_for(self._peak_tokens(num_cells), self._block_size)

    def num_cells(self, slot: int, num_tokens: int) -> int:
        """Return how many cells the first `num_tokens` of a slot's sequence and its source take."""
        return self._state.num_cells(self._held[slot].num_source_tokens, num_tokens)

    def gap(self, digests: list[bytes]) -> int:
        """Return the first missing block that a sequence after this prefix needs, or -1."""
        first = self._first_in_reach(len(digests) * self._block_size)
        missing = (i for i in range(first, len(digests)) if self.pool.find(digests[i]) is None)
        return next(missing, -1)

    def find(self, digests: list[bytes]) -> list[int]:
        """Return the blocks that a sequence after this prefix needs; all must be in the pool."""
        first = self._first_in_reach(len(digests) * self._block_size)
        found = (self.pool.find(digest) for digest in digests[first:])
        return [block for block in found if block is not None]

    def num_needed(self, prefix: Prefix) -> int:
        """Return how many free blocks a new sequence takes until its known tokens are computed."""
        num_known, num_source = prefix.num_known_tokens, prefix.num_source_tokens
        num_blocks = blocks_for(self._state.num_cells(num_source, num_known), self._block_size)
        num_own = num_blocks - prefix.num_tokens // self._block_size
        num_idle = sum(not self.pool.num_holders(b) for b in prefix.blocks[self._name])
        return min(num_own + num_idle, self.peak_blocks(num_known, num_source))

    def open(self, slot: int, prefix: Prefix) -> None:
        """Start a slot's row with the blocks of a prefix."""
        blocks = prefix.blocks[self._name]
        end = prefix.num_tokens // self._block_size
        begin = end - len(blocks)
        window = prefix.num_known_tokens if self._window is None else self._window
        unread = max(0, prefix.num_known_tokens - window)
        first_proven = blocks_for(unread, self._block_size)
        self._held[slot] = _Held(begin, end, first_proven, prefix.num_source_tokens)
        if self._shifts:
            self.starts[slot] = begin * self._block_size
        for block in blocks:
            self.pool.share(block)
        self.table[slot, self._columns(begin, end, slot)] = blocks

    def give_back(self, slot: int, num_computed_tokens: int) -> None:
        """Release the blocks that the window has left behind."""
        held = self._held[slot]
        first = self._first_in_reach(num_computed_tokens)
        if first == held.begin:
            return
        row = self.table[slot]
        left = row[self._columns(held.begin, first, slot)].tolist()
        if self._shifts:
            row[: held.end - first] = row[self._columns(first, held.end, slot)]
            row[held.end - first : held.end - held.begin] = 0
            self.starts[slot] = first * self._block_size
        else:
            row[held.begin : first] = 0
        self._release(left, held, proven=True)
        held.begin = first

    def num_missing(self, slot: int, num_tokens: int) -> int:
        """Return how many blocks a slot lacks for the first `num_tokens` of its sequence."""
        return blocks_for(self.num_cells(slot, num_tokens), self._block_size) - self._held[slot].end

    def take(self, slot: int, num_tokens: int) -> None:
        """Allocate blocks until the slot's row covers the first `num_tokens` of its sequence."""
        held = self._held[slot]
        end = blocks_for(self.num_cells(slot, num_tokens), self._block_size)
        if end > held.end:
            taken = [self.pool.allocate() for _ in range(end - held.end)]
            self.table[slot, self._columns(held.end, end, slot)] = taken
            held.end = end

    def quiet_until(self, slot: int) -> int:
        """Return the token count up to which a slot fills no block and leaves none behind."""
        held = self._held[slot]
        size = held.end * self._block_size
        if self._state.holds != "target":  # such blocks have no digests
            is_whole = self.num_cells(slot, self._max_len) <= size
            return self._max_len if is_whole else size - held.num_source_tokens
        last = size - 1
        if self._window is None:
            return last
        return min(last, held.begin * self._block_size + self._alignment + self._window - 1)

    def register(self, slot: int, begin: int, digests: list[bytes]) -> None:
        """Register the digests of a slot's blocks from `begin` on."""
        blocks = self.table[slot, self._columns(begin, begin + len(digests), slot)].tolist()
        for block, digest in zip(blocks, digests, strict=True):
            self.pool.register(block, digest)

    def blocks(self, slot: int, first: int = 0) -> list[int]:
        """Return the blocks that a slot holds, from index `first` of its sequence on."""
        held = self._held[slot]
        return self.table[slot, self._columns(max(first, held.begin), held.end, slot)].tolist()

    def holders(self, blocks: list[int]) -> set[int]:
        """Return the slots whose rows name any of these blocks."""
        return set(np.flatnonzero(np.isin(self.table, blocks).any(axis=1)).tolist())

    def close(self, slot: int, *, keep_digests: bool, proven: bool) -> None:
        """Release all of a slot's blocks and clear its row."""
        blocks = self.blocks(slot)
        if not keep_digests:
            for block in blocks:
                self.pool.forget(block)
        self._release(blocks, self._held.pop(slot), proven=proven)
        self.table[slot] = 0
        self.starts[slot] = 0

    def _release(self, blocks: list[int], held: _Held, *, proven: bool) -> None:
        """Release the first blocks of a slot's row, last one first, so that heads are reused last.

        A finite token proves that the blocks it reads are finite. So the first token that the model
        chooses proves the blocks in its reach, and each later one the blocks added since.
        """
        for place in reversed(range(len(blocks))):
            is_proven = proven and held.begin + place >= held.first_proven
            self.pool.release(blocks[place], proven=is_proven)

    def _columns(self, begin: int, end: int, slot: int) -> slice:
        """Return the columns of a sequence's blocks in the slot's row."""
        origin = int(self.starts[slot]) // self._block_size
        return slice(begin - origin, end - origin)

    def _first_in_reach(self, num_computed_tokens: int) -> int:
        """Return the index of the first block that the next token or any later one reads."""
        if self._window is None:
            return 0
        reach = max(0, num_computed_tokens - self._window + 1)
        return reach // self._alignment * self._alignment // self._block_size

    def _peak_tokens(self, num_tokens: int) -> int:
        """Return the maximum tokens in one row: a step's new ones and the aligned window before.

        A full chunk may come late in a sequence, when it is recomputed after a preemption.
        """
        if self._window is None:
            return num_tokens
        return min(num_tokens, self._max_new + self._window - 1 + self._alignment - 1)
