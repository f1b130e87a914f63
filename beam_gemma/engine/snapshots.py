"""Snapshots of recurrent state at the ends of prefixes that many sequences share.

A block of keys and values belongs to its own tokens, so it can be shared at any time. The state of
a recurrent layer stands for all tokens so far, and each new token overwrites it. So a prefix can be
shared only if its state is copied after its last token and before the next one. That takes a plan:

    A *boundary* is the end of a block at which at least `MIN_SHARERS` sequences want to start: the
    sequences that share no more than this prefix, and one for each longer shared prefix. Boundaries
    are found when a generation of sequences is sorted.
    The first sequence that needs a boundary *makes* it: it ends a chunk exactly there. When that
    step has settled, its state is copied to a slot of its own, known by the digest of the prefix.
    Other sequences that need the boundary wait meanwhile, and then start from the copy, as long as
    the cache holds the blocks in their window before it.

The slots are few. The snapshot that was used the longest time ago is replaced first. At most half
as many boundaries are made at once, so that those just made outlast the sequences that waited for
them. A snapshot is forgotten if a sequence that started from it, or made it, may hold wrong values.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable

from beam_gemma.engine.sequence import Sequence

MIN_SHARERS = 4
"""Fewest sequences that must want to start at the end of a prefix. A snapshot costs a copy, and
one step in which the others wait; with two or three sequences these outweigh a short prefix."""


class Snapshots:
    """The slots of recurrent state that hold snapshots; the tensors belong to the session."""

    def __init__(self, slots: Iterable[int] = ()) -> None:
        """Start with all slots empty.

        Args:
            slots: Slots of recurrent state that no sequence runs in; without any, none is kept.
        """
        self._empty = list(slots)[::-1]
        self._max_makings = max(1, len(self._empty) // 2)
        self._kept: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        """Slot and number of tokens by digest, the latest used last."""
        self._makers: dict[bytes, Sequence] = {}
        self.has_slots = bool(self._empty)

    @property
    def is_making(self) -> bool:
        """True if running sequences make snapshots."""
        return bool(self._makers)

    def plan(self, sequences: Iterable[Sequence]) -> None:
        """Set the boundaries of sequences that arrive together."""
        going = [s for s in sequences if s.chain is not None] if self.has_slots else []
        num_tokens = 0
        while going:
            longer = [_digest_after(s, num_tokens) for s in going]
            counts = Counter(longer)
            shares = [d is not None and counts[d] >= MIN_SHARERS for d in longer]
            starters: defaultdict[bytes | None, set[object]] = defaultdict(set)
            own = [_digest_before(s, num_tokens) for s in going]
            for sequence, digest, after, goes_on in zip(going, own, longer, shares, strict=True):
                starters[digest].add(after if goes_on else sequence)
            for sequence, digest in zip(going, own, strict=True):
                if num_tokens and len(starters[digest]) >= MIN_SHARERS:
                    sequence.boundaries += (num_tokens,)
            going = [s for s, goes_on in zip(going, shares, strict=True) if goes_on]
            num_tokens += going[0].chain.block_size if going and going[0].chain else 0

    def lengths(self, sequence: Sequence) -> list[int]:
        """Return the lengths of a sequence's prefixes that have snapshots, longest first; then 0.

        Only prefixes whose outputs the sequence does not need are meant.
        """
        if sequence.chain is None or sequence.isolated:
            return [0]
        most = sequence.num_reusable_tokens
        known = {n for _, n in self._kept.values() if n <= most}
        kept = (n for n in known if _digest_before(sequence, n) in self._kept)
        return [*sorted(kept, reverse=True), 0]

    def must_wait(self, sequence: Sequence, num_tokens: int) -> bool:
        """Return whether a sequence that could start at `num_tokens` waits for a later snapshot."""
        if sequence.isolated or not self._makers:
            return False
        boundary = next((b for b in sequence.boundaries if b > num_tokens), None)
        return boundary is not None and (
            _digest_before(sequence, boundary) in self._makers
            or len(self._makers) >= self._max_makings
        )

    def set_cuts(self, sequence: Sequence, num_tokens: int) -> None:
        """Set the boundaries at which a sequence ends chunks if it starts at `num_tokens`."""
        sequence.cuts = tuple(
            b
            for b in sequence.boundaries
            if b > num_tokens
            and not sequence.isolated
            and _digest_before(sequence, b) not in self._makers
        )

    def start(self, sequence: Sequence, num_tokens: int) -> None:
        """Have a sequence start from the snapshot at `num_tokens`, and make those of its cuts."""
        if self.has_slots and num_tokens:
            digest = _digest_before(sequence, num_tokens)
            self._kept.move_to_end(digest)
            sequence.snapshot_slot = self._kept[digest][0]
        for boundary in sequence.cuts:
            self._makers[_digest_before(sequence, boundary)] = sequence

    def keep(self, sequence: Sequence) -> int | None:
        """Return the slot to copy a sequence's state to; None if it is at none of its cuts."""
        num_tokens = sequence.num_settled_tokens
        if num_tokens not in sequence.cuts:
            return None
        sequence.cuts = tuple(cut for cut in sequence.cuts if cut != num_tokens)
        digest = _digest_before(sequence, num_tokens)
        del self._makers[digest]
        if digest not in self._kept:
            if not self._empty:
                self._empty.append(self._kept.popitem(last=False)[1][0])
            self._kept[digest] = (self._empty.pop(), num_tokens)
        self._kept.move_to_end(digest)
        return self._kept[digest][0]

    def leave(self, sequence: Sequence, *, clean: bool) -> None:
        """Give up the snapshots that a sequence makes; forget its prefixes' too unless `clean`."""
        for cut in sequence.cuts:
            del self._makers[_digest_before(sequence, cut)]
        sequence.cuts = ()
        sequence.snapshot_slot = -1
        if clean:
            return
        for num_tokens in self.lengths(sequence)[:-1]:
            slot, _ = self._kept.pop(_digest_before(sequence, num_tokens))
            self._empty.append(slot)


def _digest_before(sequence: Sequence, num_tokens: int) -> bytes:
    """Return the digest of a sequence's first `num_tokens`; empty for none."""
    chain = sequence.chain
    assert chain is not None
    end = num_tokens // chain.block_size
    return chain.digests(end - 1, end)[0] if end else b""


def _digest_after(sequence: Sequence, num_tokens: int) -> bytes | None:
    """Return the digest of one block more than `num_tokens`; None if its outputs are needed."""
    assert sequence.chain is not None
    longer = num_tokens + sequence.chain.block_size
    return _digest_before(sequence, longer) if longer <= sequence.num_reusable_tokens else None
