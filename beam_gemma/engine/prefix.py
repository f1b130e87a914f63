"""Names of prefixes: which tokens a cache block stands for, in 32 bytes.

The keys and values of a block follow from its own tokens and all tokens before them. So the digest
of a block is taken over the digest of the block before and its own token ids: equal digests mean
equal tokens from the start of the sequence to the block's end, and nothing else can share a block.
"""

import hashlib
from array import array
from collections.abc import Sequence

DIGEST_SIZE = 32
"""Bytes of a digest; no one finds two prefixes with the same."""


class PrefixChain:
    """The digests of a sequence's full blocks, in order; made when they are first asked for."""

    def __init__(self, token_ids: Sequence[int], block_size: int) -> None:
        """Follow token ids, of which there may be more later."""
        self.block_size = block_size
        self._token_ids = token_ids
        self._digests: list[bytes] = []

    @property
    def num_blocks(self) -> int:
        """Blocks that have a name."""
        return len(self._token_ids) // self.block_size

    def digests(self, begin: int, end: int) -> list[bytes]:
        """Return the digests of blocks `begin` to `end`; their tokens must be known."""
        while len(self._digests) < end:
            self._digests.append(self._next())
        return self._digests[begin:end]

    def _next(self) -> bytes:
        start = len(self._digests) * self.block_size
        token_ids = array("q", self._token_ids[start : start + self.block_size])
        assert len(token_ids) == self.block_size, "a block that is not full has no digest"
        parent = self._digests[-1] if self._digests else b""
        return hashlib.blake2b(parent + token_ids.tobytes(), digest_size=DIGEST_SIZE).digest()
