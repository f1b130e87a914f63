"""Digests of prefixes: 32 bytes that identify all that a cache block depends on.

The keys and values of a block follow from its own tokens and all tokens before them. So the digest
of a block is taken over the previous block's digest and its own token ids: equal digests mean equal
tokens from the start of the sequence to the block's end, and only such blocks are shared.

A token of a picture follows from the picture, and a token inside a span with attention in both
directions follows from the whole span, also from what lies behind the block. Such a range has a
mark, a digest of all that its tokens depend on besides earlier ones. A block's digest covers the
marks of all ranges that the block overlaps, and where they lie.
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

DIGEST_SIZE = 32
"""Size of a digest in bytes, large enough that collisions cannot be found."""


class Mark(NamedTuple):
    """A range of positions whose tokens depend on more than themselves and earlier ones."""

    start: int
    end: int
    digest: bytes
    """Digest, from `digest_of`, of what the tokens depend on."""


class PrefixChain:
    """The digests of a sequence's full blocks, in order, computed on first use."""

    def __init__(
        self, token_ids: Sequence[int], block_size: int, marks: Sequence[Mark] = ()
    ) -> None:
        """Create the chain of a list of token ids, which may grow later behind all marks."""
        self.block_size = block_size
        self._token_ids = token_ids
        self._marks = marks
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
        end = start + self.block_size
        marks = (
            array("q", (mark.start - start, mark.end - start)).tobytes() + mark.digest
            for mark in self._marks
            if mark.start < end and start < mark.end
        )
        return digest_of(parent, token_ids.tobytes(), *marks)


def digest_of(*parts: bytes) -> bytes:
    """Return the digest of parts whose lengths are known from their number or their place."""
    return hashlib.blake2b(b"".join(parts), digest_size=DIGEST_SIZE).digest()
