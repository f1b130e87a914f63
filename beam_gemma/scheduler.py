"""Which sequences run in the next step, and how many tokens of each.

A step is either prefill (parts of prompts) or decode (one token of every running sequence), never
both: attention pads a step to sequences x longest chunk, so one prompt beside many single tokens
would compute mostly padding. Prefill comes first while a slot is free, which keeps decode full.

Why every request ends: a request that the empty cache could hold is the only kind that is queued; a
running sequence never lacks blocks (kv_cache.py), so each decode step brings all of them closer to
`max_tokens`; submissions are served in order, so the head of the queue is admitted at the latest
when nothing runs; and the first sequence of a prefill step always gets at least one token.
"""

from collections import deque
from collections.abc import Iterable

from beam_gemma.errors import PromptTooLongError, RecordError
from beam_gemma.kv_cache import KVCache
from beam_gemma.sequence import Request, Sequence, Status, Step
from beam_gemma.signature import Signature

MAX_PADDED_SHARE = 1.5
"""Limit of a prefill step's padded area, relative to its real tokens."""


class Scheduler:
    """The queue of waiting sequences and the set of running ones."""

    def __init__(
        self, cache: KVCache, signature: Signature, *, max_num_batched_tokens: int
    ) -> None:
        self._cache = cache
        self._signature = signature
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    def check(self, request: Request) -> None:
        """Refuse what could never run, or would bring others down.

        Raises:
            RecordError: the prompt is not one for this model, or too long for a limit.
        """
        self._check_prompt(request)
        num_prompt_tokens, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
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
        """Queue one submission behind earlier ones; its longest prompts run first.

        What starts last has the least left to do, so the end of a job keeps its slots full. Order
        holds within a submission only, else short prompts could wait behind newer ones for ever.
        """
        self._waiting += sorted(sequences, key=lambda s: -s.num_prompt_tokens)

    def schedule(self) -> Step:
        """Return the next step, with cache blocks in place; empty if nothing is left to run."""
        step = self._prefill() or tuple((sequence, 1) for sequence in self._running)
        for sequence, num_new_tokens in step:
            self._cache.extend(sequence.slot, sequence.num_computed_tokens, num_new_tokens)
        return step

    def finish(self, sequence: Sequence, *, clean: bool = True) -> None:
        """Release what a running sequence holds; `clean=False` if it may have stored a NaN."""
        self._running.remove(sequence)
        self._cache.release(sequence.slot, clean=clean)
        sequence.slot = -1
        sequence.status = Status.FINISHED

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
        longest = max((end - start for start, end in request.spans), default=0)
        if longest > self._max_num_batched_tokens:
            raise RecordError(
                f"span of {longest:,} tokens: expected at most {self._max_num_batched_tokens:,} "
                "(max_num_batched_tokens), since a span is never split over steps"
            )

    def _prefill(self) -> Step:
        """Return chunks of unfinished prompts, first of a running sequence, then of new ones.

        A prompt joins others only whole, so at most one running prompt is unfinished at a time.
        """
        step = [(s, self._chunk(s)) for s in self._running if s.is_prefilling]
        num_tokens = sum(n for _, n in step)
        longest = num_tokens
        while self._waiting:
            sequence = self._waiting[0]
            chunk = sequence.num_pending_tokens if step else self._chunk(sequence)
            num_tokens += chunk
            longest = max(longest, chunk)
            padded = (len(step) + 1) * longest
            if num_tokens > self._max_num_batched_tokens or padded > MAX_PADDED_SHARE * num_tokens:
                break
            if not self._admit(sequence):
                break
            step.append((self._waiting.popleft(), chunk))
        return tuple(step)

    def _admit(self, sequence: Sequence) -> bool:
        slot = self._cache.admit(sequence.num_prompt_tokens, sequence.request.params.max_tokens)
        if slot is None:
            return False
        sequence.slot = slot
        sequence.status = Status.RUNNING
        self._running.append(sequence)
        return True

    def _chunk(self, sequence: Sequence) -> int:
        """Return how much of the rest of a prompt to compute in one step.

        The rest is cut evenly, so that no step is left with a few tokens. Where the cut would fall
        into a span it moves to the span's end, or to its start if the step cannot hold that.
        """
        budget = self._max_num_batched_tokens
        num_chunks = -(-sequence.num_pending_tokens // budget)
        chunk = -(-sequence.num_pending_tokens // num_chunks)
        start = sequence.num_computed_tokens
        for span_start, span_end in sequence.request.spans:
            if span_start < start + chunk < span_end:
                return (span_end if span_end - start <= budget else span_start) - start
        return chunk
