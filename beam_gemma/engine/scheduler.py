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
from beam_gemma.engine.sequence import Request, Sequence, Status, Step
from beam_gemma.errors import PromptTooLongError, RecordError
from beam_gemma.model.signature import PREFILL_ROWS, QUERY_TILE, Signature, blocks_for

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
    ) -> None:
        """Create a scheduler of no sequences.

        Args:
            cache: The cache that holds the sequences' blocks.
            signature: The contract of the graph that runs the steps.
            max_num_batched_tokens: Maximum number of new tokens in a step.
            enable_prefix_caching: Whether sequences share the blocks of equal first tokens.
            vision: The contract of the graph that makes pictures' embeddings; None if requests
                cannot have pictures.
        """
        self.num_cached_tokens = 0
        """Number of tokens that admitted sequences found in the cache."""
        self.num_preemptions = 0
        self._cache = cache
        self._signature = signature
        self._vision = vision
        self._num_image_tokens = vision.num_image_tokens if vision else 0
        self._max_num_batched_tokens = max_num_batched_tokens
        all_paged = 0 < len(signature.paged_states) == len(signature.states)
        self._reuses_blocks = enable_prefix_caching and all_paged
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
        self._check_prompt(request)
        self._check_spans(request)
        self._check_pictures(request)
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
            # Called on the engine's thread, since a constraint may serve only one thread.
            sequence.begin(self._signature.candidates)
            if self._reuses_blocks:
                # CUDA decode results differ in bits from prefill: only prefilled blocks are shared.
                token_ids = tuple(sequence.token_ids) if self._is_apart else sequence.token_ids
                marks = sequence.request.marks(self._num_image_tokens)
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

    def _check_prompt(self, request: Request) -> None:
        ids, vocab_size = request.prompt_token_ids, self._signature.vocab_size
        if not ids:
            raise RecordError("prompt: expected at least one token, got none")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise RecordError(
                f"prompt: expected token ids from 0 to {vocab_size - 1}, "
                f"got {min(ids)} to {max(ids)}"
            )
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

    def _check_spans(self, request: Request) -> None:
        if request.spans and "span_ends" not in self._signature.optional_inputs:
            raise RecordError("spans: expected none, since the model attends one way only")
        longest = max((end - start for start, end in request.spans), default=0)
        if longest > self._max_num_batched_tokens:
            raise PromptTooLongError(
                f"prompt of {len(request.prompt_token_ids):,} tokens: expected at most "
                f"{self._max_num_batched_tokens:,} that attend in both directions, got "
                f"{longest:,}; a step computes them together, so shorten the prompt or set "
                f"--max_num_batched_tokens {longest}"
            )

    def _check_pictures(self, request: Request) -> None:
        pictures, num_prompt_tokens = request.pictures, len(request.prompt_token_ids)
        if not pictures:
            return
        if self._vision is None:
            raise RecordError(
                f"pictures: expected none, since the model takes none, got {len(pictures)}"
            )
        size, num_tokens = self._vision.image_size, self._num_image_tokens
        ends = [0, *(picture.start + num_tokens for picture in pictures)]
        for end_before, picture in zip(ends, pictures, strict=False):
            if not end_before <= picture.start <= num_prompt_tokens - num_tokens:
                raise RecordError(
                    f"pictures: expected places of {num_tokens:,} tokens in order inside a prompt "
                    f"of {num_prompt_tokens:,}, got one from token {picture.start:,} on"
                )
            if (got := picture.pixels.shape[1]) != size:
                raise RecordError(f"pictures: expected {size} by {size} pixels, got {got} by {got}")

    def _has_prompts_for_a_step(self, started: list[Sequence], num_completing: int) -> bool:
        """Return whether a step of prompts alone is worth making completions wait."""
        num_slots = len(started) + self._cache.num_free_slots
        if not num_completing or num_slots >= MIN_FREE_SHARE * self._cache.num_slots:
            return True
        room = self._max_num_batched_tokens
        room -= sum(s.prefill_end - s.num_computed_tokens for s in started)
        self._next_waiting()
        for sequence in islice(self._waiting, self._cache.num_free_slots):
            if room <= 0:
                break
            room -= sequence.prefill_end - self._prefix_of(sequence).num_tokens
        return room <= 0

    def _go_on_with_prompts(
        self, started: list[Sequence], *, ahead: bool
    ) -> list[tuple[Sequence, int]]:
        """Start a step with the next chunk of the running prompt; at most one is unfinished."""
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
            num_forced = min(sequence.num_pending_tokens - 1, room)
            room -= num_forced
            step.append((sequence, 1 + num_forced))
        return step

    def _admit_into(self, step: list[tuple[Sequence, int]], *, ahead: bool) -> None:
        """Add waiting sequences to a step while they fit."""
        while self._cache.num_free_slots and (sequence := self._next_waiting()):
            if (step and step[0][0].isolated) or (sequence.isolated and (step or ahead)):
                return
            prefix = self._prefix_of(sequence)
            chunk = self._chunk_beside(step, sequence, prefix.num_tokens)
            if not chunk:
                return
            slot = self._cache.admit(prefix, chunk, num_spare_blocks=len(self._running))
            if slot is None:
                return
            self._start(sequence, slot, prefix.num_tokens)
            step.append((sequence, chunk))

    def _prefix_of(self, sequence: Sequence) -> Prefix:
        """Return the prefix of a waiting sequence that the cache holds."""
        num_reusable_tokens = sequence.num_reusable_tokens
        window = self._signature.shortest_window
        if window is not None and sequence.request.has_wide_spans(self._num_image_tokens):
            # Tokens of such a span may attend to blocks before the window, which the cache gives
            # back; as long as the prefix lies within the window, it holds all blocks.
            num_reusable_tokens = min(num_reusable_tokens, window - 1)
        return self._cache.find_prefix(
            None if sequence.isolated else sequence.chain,
            len(sequence.token_ids),
            num_reusable_tokens=num_reusable_tokens,
        )

    def _chunk_beside(
        self, step: list[tuple[Sequence, int]], sequence: Sequence, start: int
    ) -> int:
        """Return how many prompt tokens from `start` on join a step; 0 if they must wait."""
        if self._is_apart:
            return self._filling_chunk(step, sequence, start)
        if not step:
            return self._chunk(sequence, start)
        chunk = sequence.prefill_end - start  # beside others, only whole
        return chunk if self._fits([*(n for _, n in step), chunk]) else 0

    def _filling_chunk(
        self, step: list[tuple[Sequence, int]], sequence: Sequence, start: int
    ) -> int:
        """Return how many prompt tokens from `start` on fill a CUDA step's tokens or rows."""
        room = self._max_num_batched_tokens - sum(n for _, n in step)
        num_rows = sum(len(s.rows_within(s.num_computed_tokens, n)) for s, n in step)
        if room <= 0 or max(num_rows, len(step)) >= PREFILL_ROWS:
            return 0
        rows = sequence.rows_within(start, room)[PREFILL_ROWS - num_rows :]
        return sequence.chunk(start, rows[0] - start if rows else room, evenly=False)

    def _chunk(self, sequence: Sequence, start: int) -> int:
        """Return how many prompt tokens to compute next: fewer whole tiles as `start` grows."""
        limit = self._max_num_batched_tokens
        tiles = MAX_CHUNK_AREA // (start + limit) // QUERY_TILE
        # A span is never split, even above MAX_CHUNK_AREA.
        rest_of_span = sequence.span_end(start) - start
        return sequence.chunk(start, min(limit, max(max(tiles, 1) * QUERY_TILE, rest_of_span)))

    def _start(self, sequence: Sequence, slot: int, num_cached_tokens: int) -> None:
        self._waiting.popleft()
        self._running.append(sequence)
        sequence.status = Status.RUNNING
        sequence.slot = slot
        sequence.restart(num_cached_tokens)
        sequence.num_cached_tokens = num_cached_tokens
        self.num_cached_tokens += num_cached_tokens

    def _next_waiting(self) -> Sequence | None:
        """Return the head of the queue; once a generation is used up, the next one follows."""
        if not self._waiting:
            self._waiting.extend(_in_order(self._arrived))
            self._arrived = []
        return self._waiting[0] if self._waiting else None

    def _may_decode_beside(self, step: list[tuple[Sequence, int]], decoding: list[int]) -> bool:
        """Return whether decode rows of these lengths fit beside prompts without preemption."""
        if self._is_apart:
            return False
        size = self._signature.block_size
        num_blocks = sum(blocks_for(n + size - 1, size) for n in decoding)
        have_blocks = all(
            self._cache.num_free_blocks(state.group) >= num_blocks
            for state in self._signature.paged_states
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
        slot, sequence.slot = sequence.slot, -1
        num_computed_tokens = sequence.num_computed_tokens
        sharers = [] if clean else self._cache.sharers(slot, num_computed_tokens)
        self._cache.release(slot, num_computed_tokens=num_computed_tokens, clean=clean)
        for other in [s for s in reversed(self._running) if s.slot in sharers]:
            if other.status is Status.RUNNING:
                self.preempt(other, clean=False)


def _in_order(sequences: Iterable[Sequence]) -> Iterable[Sequence]:
    """Return sequences with the most steps first, grouped by their first picture or block."""
    # Requests that score several continuations of one prompt stay adjacent.
    by_length = sorted(
        sequences, key=lambda s: (-s.request.params.max_tokens, -s.num_reusable_tokens)
    )
    groups: dict[bytes | Sequence, list[Sequence]] = {}
    for sequence in by_length:
        groups.setdefault(_beginning(sequence), []).append(sequence)
    return chain.from_iterable(groups.values())


def _beginning(sequence: Sequence) -> bytes | Sequence:
    """Return the digest of the sequence's first picture, or else of its first block.

    Without either, it shares nothing and is returned itself.
    """
    if sequence.request.pictures:
        return sequence.request.pictures[0].digest
    if sequence.chain is None or sequence.chain.block_size > sequence.num_prompt_tokens:
        return sequence
    return sequence.chain.digests(0, 1)[0]
