"""Which sequence holds which cache blocks. Integers only: the tensors are the session's.

Each group of layers has its own pool of blocks. Admission is exact: a sequence gets a slot only
when every group can set aside the most blocks that the sequence can ever hold at once, so a running
sequence never runs out. The blocks themselves are taken step by step; those that a window has left
behind go back to the pool while the sequence runs on. For each group, always:

    free + held = pool          no block is lost or shared
    held by a slot <= reserved by that slot
    reserved in all <= pool     so free blocks suffice for every reservation

Block 0 is in no pool: unused entries of a table point at it, and it stays zero.

Dimensions: S slots, M blocks in a table row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from beam_gemma.signature import CONTEXT_ALIGNMENT, PagedState, Signature, blocks_for


class KVCache:
    """Slots for running sequences, and for each slot a table of blocks in every group."""

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
            signature: Names the groups, their windows and the block size.
            num_blocks: Size of each group's pool, block 0 included.
            max_num_seqs: Number of slots.
            max_num_batched_tokens: Most new tokens that a step may bring to one sequence.
        """
        self._groups = {
            state.group: _Group(
                signature, state, num_blocks[state.group], max_num_seqs, max_num_batched_tokens
            )
            for state in signature.paged_states
        }
        self._free_slots = list(range(max_num_seqs))[::-1]
        self._unclean: dict[str, list[int]] = {}

    @property
    def num_free_slots(self) -> int:
        """Sequences that could still be admitted if blocks suffice."""
        return len(self._free_slots)

    def num_free_blocks(self, group: str) -> int:
        """Return how many blocks of a group no sequence holds."""
        return self._groups[group].num_free

    def shortage(self, num_prompt_tokens: int, max_tokens: int) -> str | None:
        """Return which group can never hold such a sequence and why, or None."""
        for name, group in self._groups.items():
            peak = group.peak_blocks(num_prompt_tokens, max_tokens)
            if peak > group.num_blocks:
                return f"{peak} cache blocks of {name}, the cache has {group.num_blocks}"
        return None

    def admit(self, num_prompt_tokens: int, max_tokens: int) -> int | None:
        """Reserve all that a sequence can ever need; return its slot, or None if it must wait."""
        peaks = [g.peak_blocks(num_prompt_tokens, max_tokens) for g in self._groups.values()]
        if not self._free_slots or any(
            peak > group.num_unreserved
            for peak, group in zip(peaks, self._groups.values(), strict=True)
        ):
            return None
        slot = self._free_slots.pop()
        for peak, group in zip(peaks, self._groups.values(), strict=True):
            group.open(slot, num_prompt_tokens, peak)
        return slot

    def extend(self, slot: int, num_computed_tokens: int, num_new_tokens: int) -> None:
        """Fit a slot's tables to its next step: give back what a window left, take what is new."""
        for name, group in self._groups.items():
            self._mark_unclean(name, group.give_back(slot, num_computed_tokens))
            group.take(slot, num_computed_tokens + num_new_tokens)

    def release(self, slot: int, *, clean: bool = True) -> None:
        """Return a slot and all of its blocks; `clean=False` if they may hold a NaN."""
        for name, group in self._groups.items():
            blocks = group.close(slot)
            if not clean:
                self._mark_unclean(name, blocks)
        self._free_slots.append(slot)

    def take_unclean(self) -> dict[str, list[int]]:
        """Return the blocks of each group that must be zeroed before the next step, once."""
        unclean, self._unclean = self._unclean, {}
        return unclean

    def block_table(self, group: str) -> Int32[np.ndarray, "S M"]:
        """Return the live table of a group; a slot's row ends in zeros."""
        return self._groups[group].table

    def context_starts(self, group: str) -> Int32[np.ndarray, " S"]:
        """Return the position of the first token of each row of a group's table."""
        return self._groups[group].starts

    def _mark_unclean(self, group: str, blocks: list[int]) -> None:
        if blocks:
            self._unclean.setdefault(group, []).extend(blocks)


@dataclass(slots=True)
class _Slot:
    """The blocks of one sequence in one group, by their place in the sequence."""

    reserved: int
    num_prompt_blocks: int
    begin: int = 0
    end: int = 0


class _Group:
    """The pool and the tables of one group of layers.

    On the CPU a row of the table starts at the first block in reach, at a multiple of
    CONTEXT_ALIGNMENT tokens. On CUDA it starts at the start of the sequence, and entries that were
    given back are 0.
    """

    def __init__(
        self,
        signature: Signature,
        state: PagedState,
        num_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.num_blocks = num_blocks - 1
        self.num_unreserved = self.num_blocks
        self._free = list(range(1, num_blocks))[::-1]
        self._slots: dict[int, _Slot] = {}
        self._block_size = signature.block_size
        self._window = state.sliding_window
        self._max_new = max_num_batched_tokens
        self._alignment = CONTEXT_ALIGNMENT if signature.device == "cpu" else self._block_size
        self._shifts = signature.takes_context_starts(state)
        widest = signature.max_model_len
        if self._shifts:
            widest = self._peak_tokens(signature.max_model_len, widest)
        width = blocks_for(widest, self._alignment) * self._alignment // self._block_size
        self.table = np.zeros((max_num_seqs, width), np.int32)
        self.starts = np.zeros(max_num_seqs, np.int32)

    @property
    def num_free(self) -> int:
        """Blocks that no slot holds."""
        return len(self._free)

    def peak_blocks(self, num_prompt_tokens: int, max_tokens: int) -> int:
        """Return the most blocks that such a sequence holds at once."""
        num_tokens = num_prompt_tokens + max_tokens - 1  # the last token is never an input
        return blocks_for(self._peak_tokens(num_prompt_tokens, num_tokens), self._block_size)

    def open(self, slot: int, num_prompt_tokens: int, peak: int) -> None:
        """Reserve blocks for a slot."""
        self._slots[slot] = _Slot(peak, blocks_for(num_prompt_tokens, self._block_size))
        self.num_unreserved -= peak

    def give_back(self, slot: int, num_computed_tokens: int) -> list[int]:
        """Free what the window has left behind; return those of the freed blocks to zero.

        A finite next token proves that all blocks it read are finite. A prompt's first blocks may
        leave the window before any token is chosen, so what the prompt wrote is not trusted.
        """
        held = self._slots[slot]
        first = self._first_in_reach(num_computed_tokens)
        if first == held.begin:
            return []
        row = self.table[slot]
        freed = row[self._columns(held.begin, first, slot)].tolist()
        if self._shifts:
            row[: held.end - first] = row[self._columns(first, held.end, slot)]
            row[held.end - first : held.end - held.begin] = 0
            self.starts[slot] = first * self._block_size
        else:
            row[held.begin : first] = 0
        self._free += freed
        unproven = freed[: max(0, held.num_prompt_blocks - held.begin)]
        held.begin = first
        return unproven

    def take(self, slot: int, num_tokens: int) -> None:
        """Take free blocks until the slot's table holds so many tokens of the sequence."""
        held = self._slots[slot]
        end = blocks_for(num_tokens, self._block_size)
        if end > held.end:
            taken = [self._free.pop() for _ in range(end - held.end)]
            self.table[slot, self._columns(held.end, end, slot)] = taken
            held.end = end

    def close(self, slot: int) -> list[int]:
        """Free a slot's blocks and reservation; return the blocks."""
        held = self._slots.pop(slot)
        freed = self.table[slot, self._columns(held.begin, held.end, slot)].tolist()
        self._free += freed
        self.num_unreserved += held.reserved
        self.table[slot] = 0
        self.starts[slot] = 0
        return freed

    def _columns(self, begin: int, end: int, slot: int) -> slice:
        """Return where blocks of a sequence stand in the slot's row."""
        origin = int(self.starts[slot]) // self._block_size
        return slice(begin - origin, end - origin)

    def _first_in_reach(self, num_computed_tokens: int) -> int:
        """Return the first block that the next token, or any later one, reads."""
        if self._window is None:
            return 0
        reach = max(0, num_computed_tokens - self._window + 1)
        return reach // self._alignment * self._alignment // self._block_size

    def _peak_tokens(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Return the most tokens in one table: a step's new ones and the aligned window before."""
        if self._window is None:
            return num_tokens
        most_new = min(num_prompt_tokens, self._max_new)
        return min(num_tokens, most_new + self._window - 1 + self._alignment - 1)
