"""Cache blocks of one group of layers: their holders, their digests and the order of reuse.

A full block has a digest, which identifies its tokens and all tokens before them (prefix.py). A
free block keeps its digest and contents until it is allocated again, so that a later sequence with
the same prefix can reuse it in place. Invariants:

    a block is free if and only if it has no holders; block 0 is in no pool
    a digest names one block, a block has at most one digest
    allocated blocks are finite: zeros, or values that some row has read and stayed finite

To keep the last one, a block is *unproven* from its allocation until it is released by a sequence
that has read it and then chosen a token; an unproven block is zeroed before it is allocated again.
Attention reads whole tables and multiplies values out of reach by zero, and 0 * NaN is NaN: without
zeroing, the leftovers of one row could spoil another.
"""

from collections import OrderedDict


class BlockPool:
    """Block numbers with counts of their holders; the tensors themselves belong to the session."""

    def __init__(self, num_blocks: int) -> None:
        """Start with blocks 1 to `num_blocks` - 1, all free and holding zeros."""
        self._num_holders = [0] * num_blocks
        self._empty = list(range(1, num_blocks))[::-1]
        self._cached: OrderedDict[int, None] = OrderedDict()  # free with a digest, oldest first
        self._digests: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}
        self._unproven: set[int] = set()
        self._unclean: list[int] = []

    @property
    def num_blocks(self) -> int:
        """Number of blocks that sequences can hold."""
        return len(self._num_holders) - 1

    @property
    def num_free(self) -> int:
        """Number of blocks that no sequence holds."""
        return len(self._empty) + len(self._cached)

    def num_holders(self, block: int) -> int:
        """Return how many sequences hold a block."""
        return self._num_holders[block]

    def find(self, digest: bytes) -> int | None:
        """Return the block with a digest, held or free; None if there is none."""
        return self._blocks.get(digest)

    def allocate(self) -> int:
        """Allocate a free block; blocks with a digest come last, the oldest of them first."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self.forget(block)
        if block in self._unproven:
            self._unclean.append(block)
        self._unproven.add(block)
        self._num_holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a holder to a block that has a digest."""
        if not self._num_holders[block]:
            del self._cached[block]
        self._num_holders[block] += 1

    def release(self, block: int, *, proven: bool) -> None:
        """Remove a holder of a block; `proven` if it has read the block and chosen a token."""
        if proven:
            self._unproven.discard(block)
        self._num_holders[block] -= 1
        if self._num_holders[block]:
            return
        if block in self._digests:
            self._cached[block] = None
        else:
            self._empty.append(block)

    def register(self, block: int, digest: bytes) -> None:
        """Give a held block a digest to be found by; the first of equal blocks keeps it."""
        if self._blocks.setdefault(digest, block) == block:
            self._digests[block] = digest

    def forget(self, block: int) -> None:
        """Remove the digest of a held block, if it has one."""
        digest = self._digests.pop(block, None)
        if digest is not None:
            del self._blocks[digest]

    def wipe(self, blocks: list[int]) -> None:
        """Mark held blocks for zeroing, since they may contain more than their tokens' values."""
        self._unclean += blocks

    def take_unclean(self) -> list[int]:
        """Return the held blocks to zero before the next run, and clear that list."""
        unclean, self._unclean = self._unclean, []
        return unclean
