"""Choice of the sequences that run in the next step, and of how many tokens each computes.

Order. Sequences that arrive while others wait form the next generation. It is sorted as a whole
once the present one has been admitted: rows with a common prefix together, then longest first, so
that the last ones to start have the least left to do and slots stay full until the end of a job.

Steps on the CPU. Prefill (parts of prompts) comes first while a slot is free, which keeps decode
full (one token of every running sequence, and the tokens that its constraint forces after it).
Attention pads each sequence to whole tiles, so prompts join a step only while most of its area is
real tokens. Decode rows seldom meet that limit beside a prompt; if they do, they share the step.

Steps on CUDA. A token must be computed by the same kernels whatever runs beside it. So prefill and
decode never share a step, and it is fixed from the start which of the two computes a token: prefill
the tokens that a request begins with; decode all later ones, one at a time, forced ones included,
and so again after a preemption. Steps are padded to one size, so a prefill step costs the same with
few tokens, while decode waits. Prefill therefore runs only when its step can be filled, when many
slots are free, or when nothing decodes. A prompt may be cut anywhere to fill a step.

Ahead. A step may be scheduled while another is in flight, assuming that the latter succeeds and
that no row ends with the token it chooses. No sequence is preempted then, since all blocks may be
in use; if blocks are short, nothing is scheduled until the steps in flight are over.

Recurrent state. Prefixes are shared only where a snapshot of the state has been made, and a prompt
is cut there (snapshots.py). Sequences that wait for a snapshot let others of the queue pass; those
that make it are running, so it comes, or is given up.

Sources. A sequence starts with its whole source in one step. Sources that start together have as
many tokens as a step may have, or one of them has the step to itself (source_store.py).

Spans. The tokens of a span with attention in both directions run in one step, since each layer
reads what the layer before has made of all of them. If leading tokens of a span are in the cache,
the rest of it runs over these.

Memory. A sequence is admitted when blocks are free for all tokens that it has, and one more for
each running sequence. If no block is free for the next token of a running sequence, the newest one
is preempted: it releases its blocks, waits in front of all others, and is computed again.

Why every request ends. Requests that the empty cache cannot hold are refused, so a sequence that
runs alone never lacks a block. The newest is preempted first, so the oldest would be only when it
is alone, that is, never. Blocks run short only after decode took some, and prefill steps with no
decode between them are finite: each fills a free slot or shortens a prompt. So the oldest goes on
to its last token. The queue is served in order, its head is admitted at the latest when nothing
runs, and generations are finite. Failures add a finite number of steps (executor.py).
"""

from collections import deque
from collections.abc import Iterable
from itertools import chain, islice

from beam_gemma.engine.kv_cache import KVCache, Prefix
from beam_gemma.engine.prefix import PrefixChain
from beam_gemma.engine.request_checks import RequestChecks, wanted
from beam_gemma.engine.sequence import Request, Sequence, Status, Step
from beam_gemma.engine.snapshots import Snapshots
from beam_gemma.errors import PromptTooLongError
from beam_gemma.model.signature import PREFILL_ROWS, QUERY_TILE, Signature, blocks_for
from beam_gemma.runtime.step_shapes import MOST_PLACES

MAX_PADDED_SHARE = 1.5
"""Maximum padded area of a step, relative to its real tokens."""
MAX_CHUNK_AREA = 1 << 23
"""Maximum of a chunk's new tokens times its context on the CPU, which holds all their attention
scores at once: 3 GB of memory with 8 heads of 256 (`benchmarks/long_prompts.py`)."""

MIN_FREE_SHARE = 1 / 16
"""Minimum share of slots without a completion at which CUDA prefill steps need not be full."""


class Scheduler:
    """The queue of waiting sequences and the set of running ones."""

    def __init__(
        self,
        cache: KVCache,
        signature: Signature,
        *,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool,
        vision: Signature | None = None,
        sound: Signature | None = None,
        encoder: Signature | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        """Create a scheduler of no sequences.

        Args:
            cache: The cache that holds the sequences' blocks.
            signature: The contract of the graph that runs the steps.
            max_num_batched_tokens: Maximum number of new tokens in a step.
            enable_prefix_caching: Whether sequences share the blocks of equal first tokens.
            vision: The contract of the graph that makes pictures' embeddings; None if requests
                cannot have pictures.
            sound: Likewise, that of sounds.
            encoder: The contract of the graph that reads sources; None for a model without one.
            snapshots: The slots for snapshots of recurrent state; None for no snapshots.
        """
        self.num_cached_tokens = 0
        """Number of tokens that admitted sequences found in the cache."""
        self.num_preemptions = 0
        self._cache = cache
        self._signature = signature
        self._checks = RequestChecks(
            signature=signature,
            max_num_batched_tokens=max_num_batched_tokens,
            vision=vision,
            sound=sound,
            encoder=encoder,
        )
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_prompt_tokens = signature.prefill_tokens(max_num_batched_tokens)
        self._snapshots = snapshots or Snapshots()
        """Prefixes of sequences with recurrent state are shared only where there are snapshots."""
        can_share = self._snapshots.has_slots or not signature.has_recurrent_state
        can_share &= bool(signature.states) and not signature.has_source
        self._reuses_blocks = enable_prefix_caching and can_share
        self._ring = signature.ring
        windows = (s.sliding_window or signature.max_model_len for s in signature.paged_states)
        self._longest_reach = max(windows, default=0)
        """Most tokens before a chunk that its tokens attend to."""
        self._is_apart = signature.device == "cuda"
        """True if prefill and decode run in separate steps."""
        self._waiting: deque[Sequence] = deque()
        self._arrived: list[Sequence] = []
        self._running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        """Number of sequences that wait to run, preempted ones included."""
        return len(self._waiting) + len(self._arrived)

    @property
    def has_unfinished(self) -> bool:
        """True if any sequence waits or runs."""
        return bool(self._waiting or self._arrived or self._running)

    def check(self, request: Request) -> None:
        """Check that a request can run and cannot harm others.

        Raises:
            RecordError: the request does not suit this model, or exceeds a limit.
        """
        self._checks.check(request)
        shortage = self._cache.shortage(
            len(request.prompt_token_ids),
            request.max_new_tokens,
            num_source_tokens=len(request.source_token_ids),
        )
        if shortage:
            raise PromptTooLongError(f"{wanted(request)}: needs {shortage}; shorten either")

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences for the next generation."""
        for sequence in sequences:
            # Called on the engine's thread, since a constraint may serve only one thread.
            sequence.begin(self._signature.candidates)
            if self._reuses_blocks:
                # CUDA decode results differ in bits from prefill: only prefilled blocks are shared.
                token_ids = tuple(sequence.token_ids) if self._is_apart else sequence.token_ids
                marks = sequence.request.marks()
                sequence.chain = PrefixChain(token_ids, self._signature.block_size, marks)
            self._arrived.append(sequence)

    def drop_waiting(self) -> list[Sequence]:
        """Remove all waiting sequences from the queue and return them."""
        dropped = [*self._waiting, *self._arrived]
        self._waiting.clear()
        self._arrived = []
        return dropped

    def schedule(self, *, ahead: bool = False) -> Step:
        """Return the next step, with cache blocks in place; empty if there is nothing to run.

        Args:
            ahead: Whether a step is in flight; no sequence is preempted then.
        """
        step: list[tuple[Sequence, int]] = []
        going = [s for s in self._running if s.goes_on]
        started = [s for s in going if s.is_prefilling]
        completing = [s for s in going if not s.is_prefilling] if started else going
        if not self._is_apart or self._has_prompts_for_a_step(started, len(completing)):
            step = self._go_on_with_prompts(started, ahead=ahead)
            if started and ahead and not step:
                return ()
            self._admit_into(step, ahead=ahead)
        decoding = self._next_of_completions(completing)
        if not step or self._may_decode_beside(step, [n for _, n in decoding]):
            step += self._with_blocks(decoding, ahead=ahead)
        return tuple(step)

    def finish(self, sequence: Sequence, *, clean: bool = True) -> None:
        """End a sequence; `clean=False` if its blocks may hold wrong values.

        While a step in flight includes it, it keeps its slot and blocks; call this again after it.
        """
        sequence.status = Status.FINISHED
        if sequence.slot >= 0 and not sequence.is_in_flight:
            self._release(sequence, clean=clean)

    def preempt(self, sequence: Sequence, *, clean: bool = True, isolated: bool = False) -> None:
        """Move a running sequence to the head of the queue, to be computed again from its tokens.

        Args:
            sequence: The sequence to put back.
            clean: False if its blocks may hold wrong values.
            isolated: Whether to compute it alone, on blocks of its own.
        """
        self._release(sequence, clean=clean)
        sequence.status = Status.WAITING
        sequence.isolated |= isolated
        sequence.restart(0)
        if not self._is_apart:
            sequence.prefill_end = len(sequence.token_ids)
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def snapshot_to_take(self, sequence: Sequence) -> int | None:
        """Return the slot to copy a sequence's state to after a step; None for no copy."""
        return self._snapshots.keep(sequence) if sequence.status is Status.RUNNING else None

    def _has_prompts_for_a_step(self, started: list[Sequence], num_completing: int) -> bool:
        """Return whether a step of prompts alone is worth making completions wait."""
        num_slots = len(started) + self._cache.num_free_slots
        if not num_completing or num_slots >= MIN_FREE_SHARE * self._cache.num_slots:
            return True
        room, source_room = self._max_num_prompt_tokens, self._max_num_batched_tokens
        room -= sum(s.prefill_end - s.num_computed_tokens for s in started)
        self._fill_queue()
        for sequence in islice(self._waiting, self._cache.num_free_slots):
            if min(room, source_room) <= 0:
                break
            source_room -= sequence.num_source_tokens
            num_tokens = self._prefix_of(sequence).num_tokens
            if not self._snapshots.must_wait(sequence, num_tokens):
                room -= sequence.prefill_end - num_tokens
        return min(room, source_room) <= 0

    def _go_on_with_prompts(
        self, started: list[Sequence], *, ahead: bool
    ) -> list[tuple[Sequence, int]]:
        """Start a step with the next chunk of each running prompt that fits.

        At most one is unfinished, unless a window that goes round or snapshots bound the chunks.
        """
        step: list[tuple[Sequence, int]] = []
        for sequence in started:
            if chunk := self._chunk_beside(step, sequence, sequence.num_computed_tokens):
                step += self._with_blocks([(sequence, chunk)], ahead=ahead)
        return step

    def _next_of_completions(self, completing: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Return each completion's number of new tokens: one, and those forced after it."""
        decoding = [s for s in completing if s.status is Status.RUNNING]  # others were preempted
        if self._is_apart:
            alone = [s for s in decoding if s.isolated]
            return [(s, 1) for s in alone[:1] or decoding]
        room = self._max_num_batched_tokens - len(decoding)
        step = []
        for sequence in decoding:
            most = self._most_from(sequence.num_computed_tokens)
            num_forced = min(sequence.num_pending_tokens, most) - 1
            num_forced = min(num_forced, room)
            room -= num_forced
            step.append((sequence, 1 + num_forced))
        return step

    def _admit_into(self, step: list[tuple[Sequence, int]], *, ahead: bool) -> None:
        """Add waiting sequences to a step while they fit."""
        while self._cache.num_free_slots and (sequence := self._next_waiting()):
            if (step and step[0][0].isolated) or (sequence.isolated and (step or ahead)):
                return
            prefix = self._prefix_of(sequence)
            self._snapshots.set_cuts(sequence, prefix.num_tokens)
            chunk = self._chunk_beside(step, sequence, prefix.num_tokens)
            if not chunk or not self._has_room_for_source(step, sequence):
                return
            slot = self._cache.admit(prefix, chunk, num_spare_blocks=len(self._running))
            if slot is None:
                return
            self._start(sequence, slot, prefix.num_tokens)
            step.append((sequence, chunk))

    def _prefix_of(self, sequence: Sequence) -> Prefix:
        """Return the prefix of a waiting sequence that the cache holds."""
        if not self._signature.has_recurrent_state:
            return self._cached_prefix(sequence, sequence.num_reusable_tokens)
        lengths = self._snapshots.lengths(sequence)
        prefixes = (self._cached_prefix(sequence, n) for n in lengths)
        # The cache may have lost blocks in the window before a snapshot, which is of no use then.
        return next(p for n, p in zip(lengths, prefixes, strict=True) if p.num_tokens == n)

    def _cached_prefix(self, sequence: Sequence, num_reusable_tokens: int) -> Prefix:
        """Return the longest prefix of which the cache holds all blocks in reach."""
        window = self._signature.shortest_window
        if window is not None and sequence.request.has_wide_spans():
            # Tokens of such a span may attend to blocks before the window, which the cache gives
            # back; as long as the prefix lies within the window, it holds all blocks.
            num_reusable_tokens = min(num_reusable_tokens, window - 1)
        return self._cache.find_prefix(
            None if sequence.isolated else sequence.chain,
            len(sequence.token_ids),
            num_reusable_tokens=num_reusable_tokens,
            num_source_tokens=sequence.num_source_tokens,
        )

    def _has_room_for_source(self, step: list[tuple[Sequence, int]], sequence: Sequence) -> bool:
        """Return whether a step can start a sequence beside others, as far as sources go.

        A step holds keys and values of the sources of all sequences that it starts, so these have
        at most as many tokens as a step may have. A sequence with a longer source has the step to
        itself: on CUDA, other products would have another shape beside it, and so other bits.
        """
        before = sum(s.num_source_tokens for s, _ in step if not s.num_computed_tokens)
        return not step or before + sequence.num_source_tokens <= self._max_num_batched_tokens

    def _most_from(self, start: int) -> int:
        """Return how many tokens from position `start` on one step may compute of a sequence.

        Where a window goes round in its cells, a token takes the cell of the one that has just left
        the window. So a step computes either tokens before the first of these, or one.
        """
        limit = self._max_num_batched_tokens
        return limit if self._ring is None else min(limit, max(self._ring - start, 1))

    def _chunk_beside(
        self, step: list[tuple[Sequence, int]], sequence: Sequence, start: int
    ) -> int:
        """Return how many prompt tokens from `start` on join a step; 0 if they must wait."""
        if self._is_apart:
            return self._filling_chunk(step, sequence, start)
        if not step:
            return self._chunk(sequence, start)
        chunk = sequence.next_cut(start) - start  # beside others, only whole
        if self._ring is not None:
            chunk = min(chunk, self._most_from(start))  # or as much of it as a step may compute
        return chunk if self._fits([*(n for _, n in step), chunk]) else 0

    def _filling_chunk(
        self, step: list[tuple[Sequence, int]], sequence: Sequence, start: int
    ) -> int:
        """Return how many prompt tokens from `start` on fill a CUDA step's tokens or rows."""
        room = self._max_num_prompt_tokens - sum(n for _, n in step)
        room = min(room, self._most_from(start), self._most_places_beside(step))
        room = min(room, self._most_reached_beside(step) - start)
        num_rows = sum(len(s.rows_within(s.num_computed_tokens, n)) for s, n in step)
        if room <= 0 or max(num_rows, len(step)) >= PREFILL_ROWS:
            return 0
        rows = sequence.rows_within(start, room)[PREFILL_ROWS - num_rows :]
        return sequence.chunk(start, rows[0] - start if rows else room, evenly=False)

    def _most_places_beside(self, step: list[tuple[Sequence, int]]) -> int:
        """Return how many tokens a further sequence of a CUDA step may have, as to its places.

        With recurrent state, a step's sequences lie side by side, each as wide as the longest.
        """
        most = MOST_PLACES * self._max_num_batched_tokens // (len(step) + 1)
        if not self._signature.has_recurrent_state:
            return self._max_num_batched_tokens
        return most if max((n for _, n in step), default=0) <= most else 0

    def _most_reached_beside(self, step: list[tuple[Sequence, int]]) -> int:
        """Return how many tokens a further sequence of a CUDA step may attend to.

        Layers with heads too wide for flash attention gather the keys and values of all sequences
        of a prefill step. There is room for those of one sequence of any length.
        """
        most = self._signature.max_model_len
        if self._signature.gathered_heads:
            most -= sum(s.num_computed_tokens + n for s, n in step)
        return most

    def _chunk(self, sequence: Sequence, start: int) -> int:
        """Return how many prompt tokens to compute next: fewer whole tiles as `start` grows."""
        limit = self._most_from(start)
        context = sequence.num_source_tokens + min(start, self._longest_reach)
        tiles = MAX_CHUNK_AREA // (context + limit) // QUERY_TILE
        # A span is never split, even above MAX_CHUNK_AREA.
        rest_of_span = sequence.span_end(start) - start
        limit = min(limit, max(max(tiles, 1) * QUERY_TILE, rest_of_span))
        return sequence.chunk(start, limit, evenly=self._ring is None)

    def _start(self, sequence: Sequence, slot: int, num_cached_tokens: int) -> None:
        self._waiting.remove(sequence)
        self._running.append(sequence)
        self._snapshots.start(sequence, num_cached_tokens)
        sequence.status = Status.RUNNING
        sequence.slot = slot
        sequence.restart(num_cached_tokens)
        sequence.num_cached_tokens = num_cached_tokens
        self.num_cached_tokens += num_cached_tokens

    def _next_waiting(self) -> Sequence | None:
        """Return the first of the queue that need not wait for a snapshot."""
        self._fill_queue()
        # As many as could run; others of the queue want the same snapshots as a rule.
        first = islice(self._waiting, self._cache.num_slots)
        return next((s for s in first if not self._must_wait(s)), None)

    def _fill_queue(self) -> None:
        """Queue the next generation once the present one is used up."""
        if not self._waiting:
            self._snapshots.plan(self._arrived)
            self._waiting.extend(_in_order(self._arrived))
            self._arrived = []

    def _must_wait(self, sequence: Sequence) -> bool:
        """Return whether a sequence waits for a snapshot that another one is making."""
        if not self._snapshots.is_making:
            return False
        return self._snapshots.must_wait(sequence, self._prefix_of(sequence).num_tokens)

    def _may_decode_beside(self, step: list[tuple[Sequence, int]], decoding: list[int]) -> bool:
        """Return whether decode rows of these lengths fit beside prompts without preemption."""
        if self._is_apart:
            return False
        size = self._signature.block_size
        num_blocks = sum(blocks_for(n + size - 1, size) for n in decoding)
        have_blocks = all(
            self._cache.num_free_blocks(state.group) >= num_blocks
            for state in self._signature.paged_states
            if state.holds != "source"
        )
        lengths = [n for _, n in step] + decoding
        return have_blocks and self._fits(lengths) and not step[0][0].isolated

    def _fits(self, lengths: list[int]) -> bool:
        """Return whether chunks of these lengths fit a step's token limit and padding limit.

        A single chunk within the token limit always fits.
        """
        longest, num_tokens = max(lengths), sum(lengths)
        tile = -(-longest // -(-longest // QUERY_TILE))
        padded = tile * sum(-(-n // tile) for n in lengths)
        return (
            num_tokens <= self._max_num_batched_tokens and padded <= MAX_PADDED_SHARE * num_tokens
        )

    def _with_blocks(
        self, wanted: list[tuple[Sequence, int]], *, ahead: bool
    ) -> list[tuple[Sequence, int]]:
        """Return the sequences that get blocks, preempting newer ones; if `ahead`, all or none."""
        got = [(s, n) for s, n in wanted if self._extend(s, n, may_preempt=not ahead)]
        return got if len(got) == len(wanted) or not ahead else []

    def _extend(self, sequence: Sequence, num_new_tokens: int, *, may_preempt: bool) -> bool:
        """Get a sequence its blocks; return False if none are free or it was itself preempted."""
        while sequence.status is Status.RUNNING:
            num_computed = sequence.num_computed_tokens
            if self._cache.extend(
                sequence.slot,
                num_computed,
                num_new_tokens,
                num_in_flight=num_computed - sequence.num_settled_tokens,
            ):
                return True
            if not may_preempt:
                return False
            self.preempt(self._running[-1])
        return False

    def _release(self, sequence: Sequence, *, clean: bool) -> None:
        """Free a sequence's slot; preempt sequences that rely on blocks it will not compute."""
        self._running.remove(sequence)
        self._snapshots.leave(sequence, clean=clean)
        slot, sequence.slot = sequence.slot, -1
        num_computed_tokens = sequence.num_computed_tokens
        sharers = [] if clean else self._cache.sharers(slot, num_computed_tokens)
        self._cache.release(slot, num_computed_tokens=num_computed_tokens, clean=clean)
        for other in [s for s in reversed(self._running) if s.slot in sharers]:
            if other.status is Status.RUNNING:
                self.preempt(other, clean=False)


def _in_order(sequences: Iterable[Sequence]) -> Iterable[Sequence]:
    """Return sequences with the most steps first, grouped by source, first medium or block."""
    # Requests that score several continuations of one prompt stay adjacent.
    by_length = sorted(
        sequences,
        key=lambda s: (
            -s.request.max_new_tokens,
            -s.num_source_tokens - s.num_reusable_tokens,
        ),
    )
    groups: dict[bytes | Sequence, list[Sequence]] = {}
    for sequence in by_length:
        groups.setdefault(_beginning(sequence), []).append(sequence)
    return chain.from_iterable(groups.values())


def _beginning(sequence: Sequence) -> bytes | Sequence:
    """Return the digest of the sequence's source, its first medium, or else its first block.

    Without any, it shares nothing and is returned itself.
    """
    if sequence.source_digest:
        return sequence.source_digest
    if sequence.request.media:
        return sequence.request.media[0].digest
    if sequence.chain is None or sequence.chain.block_size > sequence.num_prompt_tokens:
        return sequence
    return sequence.chain.digests(0, 1)[0]
