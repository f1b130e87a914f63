"""Digests of prefixes: 32 bytes that identify the tokens a cache block depends on.

The keys and values of a block follow from its own tokens and all tokens before them. So the digest
of a block is taken over the previous block's digest and its own token ids: equal digests mean equal
tokens from the start of the sequence to the block's end, and only such blocks are shared.
"""

import hashlib
from array import array
from collections.abc import Sequence

DIGEST_SIZE = 32
"""Size of a digest in bytes, large enough that collisions cannot be found."""


class PrefixChain:
    """The digests of a sequence's full blocks, in order, computed on first use."""

    def __init__(self, token_ids: Sequence[int], block_size: int) -> None:
        """Create the chain of a list of token ids, which may grow later."""
        self.block_size = block_size
        self._token_ids = token_ids
        self._digests: list[bytes] = []

    @property
    def num_blocks(self) -> int:
        """Number of full blocks, which have a digest."""
        return len(self._token_ids) // self.block_size

    def digests(self, begin: int, end: int) -> list[bytes]:
        """Return the digests of blocks `begin` up to `end`; their tokens must be known."""
        while len(self._digests) < end:
            self._digests.append(self._next())
        return self._digests[begin:end]

    def _next(self) -> bytes:
        start = len(self._digests) * self.block_size
        token_ids = array("q", self._token_ids[start : start + self.block_size])
        assert len(token_ids) == self.block_size, "a block that is not full has no digest"
        parent = self._digests[-1] if self._digests else b""
        return hashlib.blake2b(parent + token_ids.tobytes(), digest_size=DIGEST_SIZE).digest()
