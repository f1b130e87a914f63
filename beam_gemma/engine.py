"""The step loop: token ids in, token ids out.

One engine runs one session. Any number of threads submit requests and wait; one daemon thread
schedules, packs, runs and samples, so requests of all callers share steps. A submission is seen
whole or not at all, so the first step of a batch is as full as any. What is wrong with a request
ends that request alone; an exception of the session ends the engine and everything it holds.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

import numpy as np

from beam_gemma.errors import EngineError, OptionsError, RecordError
from beam_gemma.kv_cache import KVCache
from beam_gemma.packing import pack
from beam_gemma.progress import Count
from beam_gemma.sampling import needs_logits, sample
from beam_gemma.scheduler import Scheduler
from beam_gemma.sequence import Completion, FinishReason, Request, Sequence, Step
from beam_gemma.session import StepOutput
from beam_gemma.signature import Signature


@runtime_checkable
class Runner(Protocol):
    """What an engine asks of a session."""

    signature: Signature
    num_blocks: dict[str, int]
    num_state_slots: int

    def run(self, feeds: Mapping[str, np.ndarray], *, with_logits: bool = False) -> StepOutput:
        """Run one step."""

    def zero_blocks(self, group: str, blocks: list[int]) -> None:
        """Overwrite cache blocks with zeros."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much work a step may hold."""

    max_num_seqs: int = 64
    """Sequences that run at once."""
    max_num_batched_tokens: int = 1024
    """New tokens of one step."""
    eos_token_ids: tuple[int, ...] = ()
    """The model's own end tokens; they end a completion unless its request ignores them."""

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise OptionsError(f"max_num_seqs: expected at least 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise OptionsError(
                f"max_num_batched_tokens: expected at least max_num_seqs ({self.max_num_seqs}), "
                f"one token for each sequence, got {self.max_num_batched_tokens}"
            )


@dataclasses.dataclass(slots=True)
class EngineStats:
    """Counts since the engine started."""

    max_num_seqs: int
    num_requests: int = 0
    """Submitted."""
    num_finished: int = 0
    """Of these, failed ones included."""
    num_failed: int = 0
    num_prefill_steps: int = 0
    num_decode_steps: int = 0
    num_prompt_tokens: int = 0
    """Computed by prefill steps."""
    num_completion_tokens: int = 0
    """Chosen, end tokens included."""
    num_decode_rows: int = 0
    """Sequences of all decode steps."""

    @property
    def occupancy(self) -> float:
        """Mean share of the slots that a decode step used."""
        return self.num_decode_rows / max(1, self.num_decode_steps * self.max_num_seqs)


class Engine:
    """Completes requests of many threads in shared steps."""

    def __init__(
        self,
        session: Runner,
        config: EngineConfig,
        *,
        on_step: Callable[[Count], None] = lambda _: None,
    ) -> None:
        """Start the thread.

        Args:
            session: Runs the steps.
            config: How large they may be.
            on_step: Called after each step with the tokens that it computed.

        Raises:
            OptionsError: the session keeps less recurrent state than the config needs.
        """
        self.signature = session.signature
        if self.signature.has_recurrent_state and session.num_state_slots < config.max_num_seqs:
            raise OptionsError(
                f"max_num_seqs: expected at most the session's {session.num_state_slots} state "
                f"slots, got {config.max_num_seqs}"
            )
        self._session = session
        self._config = config
        self._on_step = on_step
        self._cache = KVCache(
            self.signature,
            num_blocks=session.num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._scheduler = Scheduler(
            self._cache, self.signature, max_num_batched_tokens=config.max_num_batched_tokens
        )
        self._stats = EngineStats(max_num_seqs=config.max_num_seqs)
        self._futures: dict[Sequence, Future[Completion]] = {}
        self._inbox: list[list[Sequence]] = []
        self._stopped: EngineError | None = None
        self._condition = threading.Condition()  # guards the four above
        self._thread = threading.Thread(target=self._loop, name="beam-gemma-engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the counts."""
        with self._condition:
            return dataclasses.replace(self._stats)

    def submit(self, requests: Iterable[Request]) -> list[Future[Completion]]:
        """Queue requests as one batch; return their completions to come, in the same order.

        A request that can never run has its error at once. Futures cannot be cancelled.

        Raises:
            EngineError: the engine was closed, or stopped by an error.
        """
        futures: list[Future[Completion]] = []
        batch: dict[Sequence, Future[Completion]] = {}
        refused: list[tuple[Future[Completion], Completion]] = []
        for request in requests:
            future: Future[Completion] = Future()
            future.set_running_or_notify_cancel()
            futures.append(future)
            try:
                self._scheduler.check(request)
            except RecordError as error:
                refused.append((future, _failure(str(error))))
            else:
                batch[Sequence(request, self._end_token_ids(request))] = future
        with self._condition:
            if self._stopped is not None:
                raise EngineError(str(self._stopped)) from self._stopped.__cause__
            self._futures |= batch
            self._stats.num_requests += len(futures)
            self._stats.num_finished += len(refused)
            self._stats.num_failed += len(refused)
            if batch:
                self._inbox.append(list(batch))
                self._condition.notify()
        for future, completion in refused:
            future.set_result(completion)
        return futures

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Submit requests, wait for all, and return their completions in the same order."""
        return [future.result() for future in self.submit(requests)]

    def close(self) -> None:
        """Refuse further work, finish what was submitted, and end the thread."""
        with self._condition:
            if self._stopped is None:
                self._stopped = EngineError("engine: closed, and takes no further requests")
            self._condition.notify()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while self._receive():
                self._step()
        except Exception as error:  # whatever it is, callers that wait must hear of it
            self._fail(error)

    def _receive(self) -> bool:
        """Queue what was submitted, waiting for it if idle; return False when all is done."""
        with self._condition:
            while not (self._inbox or self._scheduler.has_unfinished or self._stopped):
                self._condition.wait()
            batches, self._inbox = self._inbox, []
        for batch in batches:
            self._scheduler.add(batch)
        return self._scheduler.has_unfinished

    def _step(self) -> None:
        step = self._scheduler.schedule()
        for group, blocks in self._cache.take_unclean().items():
            self._session.zero_blocks(group, blocks)
        rows = [sequence for sequence, n in step if n == sequence.num_pending_tokens]
        candidates = self.signature.candidates
        output = self._session.run(
            pack(step, self.signature, self._cache),
            with_logits=any(needs_logits(s.request.params, candidates) for s in rows),
        )
        self._count(step, len(rows))
        for sequence, num_new_tokens in step:
            sequence.num_computed_tokens += num_new_tokens
        if rows:
            self._choose(rows, output)

    def _choose(self, rows: list[Sequence], output: StepOutput) -> None:
        """Give each row its next token."""
        finite = np.isfinite(output.logsumexp) & np.isfinite(output.topk_logits[:, 0])
        best_ids = output.topk_ids[:, 0].tolist()
        best_logprobs = (output.topk_logits[:, 0] - output.logsumexp).tolist()
        for row, (sequence, is_finite) in enumerate(zip(rows, finite.tolist(), strict=True)):
            if not is_finite:
                self._finish(sequence, _failure(_not_finite(sequence)), clean=False)
                continue
            token_id, logprob = best_ids[row], best_logprobs[row]
            if sequence.request.params.temperature > 0:
                token_id, logprob = _draw(sequence, output, row)
            self._accept(sequence, token_id, logprob)

    def _accept(self, sequence: Sequence, token_id: int, logprob: float) -> None:
        """Append a token, and finish the sequence if it ends with it."""
        try:
            finish_reason: FinishReason | None = sequence.accept(token_id, logprob)
        except Exception as error:  # the record boundary: should_stop belongs to one request
            message = f"should_stop: {type(error).__name__}: {error}"
            self._finish(sequence, _failure(message))
            return
        if finish_reason is not None:
            self._finish(sequence, sequence.completion(finish_reason))

    def _finish(self, sequence: Sequence, completion: Completion, *, clean: bool = True) -> None:
        self._scheduler.finish(sequence, clean=clean)
        with self._condition:
            future = self._futures.pop(sequence)
            self._stats.num_finished += 1
            self._stats.num_failed += completion.error is not None
        future.set_result(completion)

    def _fail(self, error: Exception) -> None:
        """Stop for good: everything held fails with the error, and submissions are refused."""
        message = f"engine: stopped by {type(error).__name__}: {error}"
        with self._condition:
            self._stopped = EngineError(message)
            self._stopped.__cause__ = error
            futures, self._futures = self._futures, {}
            self._inbox = []
        for future in futures.values():
            failure = EngineError(message)  # one each: raising adds a caller's traceback to it
            failure.__cause__ = error
            future.set_exception(failure)

    def _count(self, step: Step, num_rows: int) -> None:
        is_prefill = step[0][0].is_prefilling
        num_prompt_tokens = sum(n for _, n in step) if is_prefill else 0
        with self._condition:
            stats = self._stats
            stats.num_prefill_steps += is_prefill
            stats.num_decode_steps += not is_prefill
            stats.num_decode_rows += 0 if is_prefill else len(step)
            stats.num_prompt_tokens += num_prompt_tokens
            stats.num_completion_tokens += num_rows
        self._on_step(Count(prompt_tokens=num_prompt_tokens, completion_tokens=num_rows))

    def _end_token_ids(self, request: Request) -> frozenset[int]:
        eos_token_ids = () if request.params.ignore_eos else self._config.eos_token_ids
        return frozenset((*eos_token_ids, *request.params.stop_token_ids))


def _draw(sequence: Sequence, output: StepOutput, row: int) -> tuple[int, float]:
    """Return a sampled row's next token and its log-probability at temperature 1."""
    request = sequence.request
    logits, ids = output.topk_logits[row], output.topk_ids[row]
    if needs_logits(request.params, len(ids)):
        assert output.logits is not None
        logits, ids = output.logits[row], np.arange(output.logits.shape[1])
    position = len(sequence.token_ids)
    token_id = sample(request.params, logits, ids, key=request.sampling_key, position=position)
    logit = logits[np.flatnonzero(ids == token_id)[0]]
    return token_id, float(logit - output.logsumexp[row])


def _failure(message: str) -> Completion:
    return Completion(token_ids=(), finish_reason="error", logprob=0.0, error=message)


def _not_finite(sequence: Sequence) -> str:
    num_tokens = len(sequence.token_ids) - sequence.num_prompt_tokens
    return (
        f"model: expected finite logits, got NaN or infinity after {num_tokens} tokens of the "
        "completion; a precision of wider range may help"
    )
