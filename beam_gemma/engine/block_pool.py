"""The cache blocks of one group of layers: who holds them, what is in them, which come next.

A full block has a digest, which names its tokens and all tokens before them (prefix.py). A block
that nobody holds keeps digest and contents until it is allocated again, so that a later sequence
with the same prefix can take it up where it lies. Always:

    a block is free if and only if it has no holders; block 0 is in no pool
    a digest names one block, a block has at most one digest
    what is allocated is finite: zeros, or values that some row has read and stayed finite

For the last, a block is *unproven* from its allocation until a sequence lets go of it that has read
it and chosen a token; an unproven block is zeroed before it is allocated again. Attention reads
whole tables and multiplies what is out of reach by zero, and 0 * NaN is NaN: without this, what one
row left behind could spoil another.
"""

from collections import OrderedDict


class BlockPool:
    """Blocks with counts of their holders. Integers only: the tensors are the session's."""

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
        """Blocks that sequences can hold."""
        return len(self._num_holders) - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._cached)

    def num_holders(self, block: int) -> int:
        """Return how many sequences hold a block."""
        return self._num_holders[block]

    def find(self, digest: bytes) -> int | None:
        """Return the block that a digest names, held or free."""
        return self._blocks.get(digest)

    def allocate(self) -> int:
        """Hand out a free block; one with a digest only if there is no other, oldest first."""
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
        """Take a holder from a block; `proven` if it read the block and chose a token."""
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
        """Name a held block, so that others find it; the first of equal blocks keeps the name."""
        if self._blocks.setdefault(digest, block) == block:
            self._digests[block] = digest

    def forget(self, block: int) -> None:
        """Take away the name of a held block, if it has one."""
        digest = self._digests.pop(block, None)
        if digest is not None:
            del self._blocks[digest]

    def wipe(self, blocks: list[int]) -> None:
        """Have held blocks zeroed, since something other than their tokens may be in them."""
        self._unclean += blocks

    def take_unclean(self) -> list[int]:
        """Return the held blocks that must be zeroed before the next run, once."""
        unclean, self._unclean = self._unclean, []
        return unclean
