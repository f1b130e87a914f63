"""Which sequences run in the next step, and how many tokens of each.

Order. What arrives while others wait makes up the next generation, which is put in order as a whole
once the present one has been admitted: rows with a common prefix together, then longest first, so
that what starts last has the least left to do and the end of a job keeps its slots full.

Steps. Prefill (parts of prompts) comes first while a slot is free, which keeps decode (one token of
every running sequence, and those that its constraint forces to follow) full. On the CPU, attention
pads each sequence to whole tiles, so prompts join a step only while most of its area is real.
Decode rows seldom meet that beside a prompt; where they do, and on CUDA, they run with it.

Memory. A sequence is admitted when blocks are free for all tokens that it has, and one more for
each running sequence. Where a running sequence finds none for its next token, the newest one is
preempted: it lets go of its blocks, waits in front of all others, and is computed again.

Why every request ends. What the empty cache cannot hold is refused, so a sequence that runs alone
never lacks a block; and as the newest is preempted first, the oldest is only when it is alone, that
is, never. Blocks run short only where decode took some, and prefill steps with no decode between
them are finite: each admits to a free slot or shortens a prompt. So the oldest goes on to its last
token. The queue is served in order, its head is admitted at the latest when nothing runs, and
generations are finite. What failures add is finite too (executor.py).
"""

from collections import deque
from collections.abc import Iterable
from itertools import chain

from beam_gemma.errors import PromptTooLongError, RecordError
from beam_gemma.kv_cache import KVCache
from beam_gemma.prefix import PrefixChain
from beam_gemma.sequence import Request, Sequence, Status, Step
from beam_gemma.signature import QUERY_TILE, Signature, blocks_for

MAX_PADDED_SHARE = 1.5
"""Limit of a step's padded area, relative to its real tokens."""
MAX_CHUNK_AREA = 1 << 23
"""Limit of a chunk's new tokens times its context on the CPU, which holds the scores of all of them
at once: 3 GB of memory with 8 heads of 256 (`benchmarks/long_prompts.py`)."""


class Scheduler:
    """The queue of waiting sequences and the set of running ones."""

    def __init__(
        self,
        cache: KVCache,
        signature: Signature,
        *,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool,
    ) -> None:
        self.num_cached_tokens = 0
        """Tokens that admitted sequences found in the cache."""
        self.num_preemptions = 0
        self._cache = cache
        self._signature = signature
        self._max_num_batched_tokens = max_num_batched_tokens
        all_paged = 0 < len(signature.paged_states) == len(signature.states)
        self._reuses_blocks = enable_prefix_caching and all_paged
        self._tile = QUERY_TILE if signature.device == "cpu" else 1
        self._waiting: deque[Sequence] = deque()
        self._arrived: list[Sequence] = []
        self._running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run yet, or not at present."""
        return len(self._waiting) + len(self._arrived)

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._arrived or self._running)

    def check(self, request: Request) -> None:
        """Refuse what could never run, or would bring others down.

        Raises:
            RecordError: the prompt is not one for this model, or too long for a limit.
        """
        self._check_prompt(request)
        num_prompt_tokens, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
        if request.constraint and (too_few := request.constraint.shortage(max_tokens)):
            raise RecordError(too_few)
        num_tokens, limit = num_prompt_tokens + max_tokens, self._signature.max_model_len
        wanted = f"prompt of {num_prompt_tokens:,} tokens with max_tokens {max_tokens:,}"
        if num_tokens > limit:
            raise PromptTooLongError(
                f"{wanted}: expected at most {limit:,} together, got {num_tokens:,}; shorten either"
            )
        shortage = self._cache.shortage(num_prompt_tokens, max_tokens)
        if shortage:
            raise PromptTooLongError(f"{wanted}: needs {shortage}; shorten either")

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences for the next generation."""
        for sequence in sequences:
            # Here rather than where requests come from, since a constraint serves one thread.
            sequence.begin()
            if self._reuses_blocks and not sequence.request.spans:
                sequence.chain = PrefixChain(sequence.token_ids, self._signature.block_size)
            self._arrived.append(sequence)

    def drop_waiting(self) -> list[Sequence]:
        """Forget all sequences that do not run at present, and return them."""
        dropped = [*self._waiting, *self._arrived]
        self._waiting.clear()
        self._arrived = []
        return dropped

    def schedule(self) -> Step:
        """Return the next step, with cache blocks in place; empty if nothing is left to run."""
        step = self._go_on_with_prompts()
        decoding = self._go_on_with_completions([s for s in self._running if not s.is_prefilling])
        self._admit_into(step)
        if not step or self._may_decode_beside(step, [n for _, n in decoding]):
            step += [(s, n) for s, n in decoding if self._extend(s, n)]
        return tuple(step)

    def finish(self, sequence: Sequence, *, clean: bool = True) -> None:
        """End a running sequence; `clean=False` if its blocks may not be what they should be."""
        self._release(sequence, clean=clean)
        sequence.status = Status.FINISHED

    def preempt(self, sequence: Sequence, *, clean: bool = True, isolated: bool = False) -> None:
        """Put a running sequence before all that wait, to be computed again from its tokens.

        Args:
            sequence: What to put back.
            clean: False if its blocks may not be what they should be.
            isolated: Whether to compute it alone then, on blocks of its own.
        """
        self._release(sequence, clean=clean)
        sequence.status = Status.WAITING
        sequence.isolated |= isolated
        sequence.num_computed_tokens = 0
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _check_prompt(self, request: Request) -> None:
        ids, vocab_size = request.prompt_token_ids, self._signature.vocab_size
        if not ids:
            raise RecordError("prompt: expected at least one token, got none")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise RecordError(
                f"prompt: expected token ids from 0 to {vocab_size - 1}, "
                f"got {min(ids)} to {max(ids)}"
            )
        if request.spans and "span_ends" not in self._signature.optional_inputs:
            raise RecordError("spans: expected none, since the model attends one way only")
        wants_targets = self._signature.head == "score"
        if wants_targets != bool(request.targets):
            raise RecordError(
                f"targets: expected {'some' if wants_targets else 'none'} for the head "
                f"{self._signature.head}, got {len(request.targets)}"
            )
        for _, token_id in request.targets:
            if not 0 <= token_id < vocab_size:
                raise RecordError(
                    f"targets: expected token ids from 0 to {vocab_size - 1}, got {token_id}"
                )
        longest = max((end - start for start, end in request.spans), default=0)
        if longest > self._max_num_batched_tokens:
            raise RecordError(
                f"span of {longest:,} tokens: expected at most {self._max_num_batched_tokens:,} "
                "(max_num_batched_tokens), since a span is never split over steps"
            )

    def _go_on_with_prompts(self) -> list[tuple[Sequence, int]]:
        """Start a step with the next chunk of a running prompt; at most one is unfinished."""
        step = []
        for sequence in [s for s in self._running if s.is_prefilling]:
            chunk = self._chunk(sequence, sequence.num_computed_tokens)
            if self._extend(sequence, chunk):
                step.append((sequence, chunk))
        return step

    def _go_on_with_completions(self, decoding: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Return what each completion has to compute: one token, and those forced after it."""
        room = self._max_num_batched_tokens - len(decoding)
        step = []
        for sequence in decoding:
            num_forced = min(sequence.num_pending_tokens - 1, room)
            room -= num_forced
            step.append((sequence, 1 + num_forced))
        return step

    def _admit_into(self, step: list[tuple[Sequence, int]]) -> None:
        """Add waiting sequences to a step while they fit; beside others, only whole."""
        while self._cache.num_free_slots and (sequence := self._next_waiting()):
            prefix = self._cache.find_prefix(
                None if sequence.isolated else sequence.chain,
                len(sequence.token_ids),
                num_reusable_tokens=sequence.num_reusable_tokens,
            )
            chunk = len(sequence.token_ids) - prefix.num_tokens
            if not step:
                chunk = self._chunk(sequence, prefix.num_tokens)
            elif sequence.isolated or step[0][0].isolated:
                return
            if not self._fits([*(n for _, n in step), chunk]):
                return
            slot = self._cache.admit(prefix, chunk, num_spare_blocks=len(self._running))
            if slot is None:
                return
            self._start(sequence, slot, prefix.num_tokens)
            step.append((sequence, chunk))

    def _chunk(self, sequence: Sequence, start: int) -> int:
        """Return how much of a prompt to compute next: less, in whole tiles, the further it is."""
        limit = self._max_num_batched_tokens
        # A span is never split, whatever it takes.
        if self._signature.device == "cpu" and not sequence.request.spans:
            tiles = MAX_CHUNK_AREA // (start + limit) // QUERY_TILE
            limit = min(limit, max(tiles, 1) * QUERY_TILE)
        return sequence.chunk(start, limit)

    def _start(self, sequence: Sequence, slot: int, num_cached_tokens: int) -> None:
        self._waiting.popleft()
        self._running.append(sequence)
        sequence.status = Status.RUNNING
        sequence.slot = slot
        sequence.num_computed_tokens = sequence.num_cached_tokens = num_cached_tokens
        self.num_cached_tokens += num_cached_tokens

    def _next_waiting(self) -> Sequence | None:
        """Return the head of the queue; when a generation is through, the next one takes over."""
        if not self._waiting:
            self._waiting.extend(_in_order(self._arrived))
            self._arrived = []
        return self._waiting[0] if self._waiting else None

    def _may_decode_beside(self, step: list[tuple[Sequence, int]], decoding: list[int]) -> bool:
        """Return whether decode rows of these lengths fit beside prompts, and none makes room."""
        size = self._signature.block_size
        num_blocks = sum(blocks_for(n + size - 1, size) for n in decoding)
        have_blocks = all(
            self._cache.num_free_blocks(state.group) >= num_blocks
            for state in self._signature.paged_states
        )
        lengths = [n for _, n in step] + decoding
        return have_blocks and self._fits(lengths) and not step[0][0].isolated

    def _fits(self, lengths: list[int]) -> bool:
        """Return whether chunks of these lengths make a step: few enough, and not mostly padding.

        A sequence alone always does, if few enough.
        """
        longest, num_tokens = max(lengths), sum(lengths)
        tile = -(-longest // -(-longest // self._tile))
        padded = tile * sum(-(-n // tile) for n in lengths)
        return (
            num_tokens <= self._max_num_batched_tokens and padded <= MAX_PADDED_SHARE * num_tokens
        )

    def _extend(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Get a sequence its blocks, at the cost of newer ones; False if it was preempted."""
        while sequence.status is Status.RUNNING:
            if self._cache.extend(sequence.slot, sequence.num_computed_tokens, num_new_tokens):
                return True
            self.preempt(self._running[-1])
        return False

    def _release(self, sequence: Sequence, *, clean: bool) -> None:
        """Take a sequence's slot; whoever counts on blocks that it will not compute starts anew."""
        self._running.remove(sequence)
        slot, sequence.slot = sequence.slot, -1
        num_computed_tokens = sequence.num_computed_tokens
        sharers = [] if clean else self._cache.sharers(slot, num_computed_tokens)
        self._cache.release(slot, num_computed_tokens=num_computed_tokens, clean=clean)
        for other in [s for s in reversed(self._running) if s.slot in sharers]:
            if other.status is Status.RUNNING:
                self.preempt(other, clean=False)


def _in_order(sequences: Iterable[Sequence]) -> Iterable[Sequence]:
    """Return sequences with the most steps first, then those that share their first block."""
    # Requests that score several continuations of one prompt stay neighbours.
    by_length = sorted(
        sequences, key=lambda s: (-s.request.params.max_tokens, -s.num_reusable_tokens)
    )
    groups: dict[bytes | Sequence, list[Sequence]] = {}
    for sequence in by_length:
        groups.setdefault(_first_block(sequence), []).append(sequence)
    return chain.from_iterable(groups.values())


def _first_block(sequence: Sequence) -> bytes | Sequence:
    """Return what the first block of a sequence holds, or the sequence if it shares none."""
    if sequence.chain is None or sequence.chain.block_size > sequence.num_prompt_tokens:
        return sequence
    return sequence.chain.digests(0, 1)[0]
