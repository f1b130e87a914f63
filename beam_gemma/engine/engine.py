"""The step loop: token ids in, token ids out.

One engine runs one session. Any number of threads submit requests and wait; one daemon thread
schedules and executes steps, so requests of all callers share steps. A submission is queued as a
whole, so the first step of a batch is as full as any other. An error in a request ends that request
alone; a failure of the device, or of this code, ends the engine and all requests that it holds.
"""

import atexit
import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future

from beam_gemma.engine.executor import Executor, failure
from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.launched_step import StepCount
from beam_gemma.engine.media_store import MediaEncoder, MediaStore, check_encoder
from beam_gemma.engine.scheduler import Scheduler
from beam_gemma.engine.sequence import Completion, Medium, Picture, Request, Sequence, Sound
from beam_gemma.engine.snapshots import Snapshots
from beam_gemma.engine.source_store import SourceStore, check_source_encoder
from beam_gemma.engine.stats import EngineStats
from beam_gemma.errors import EngineError, OptionsError, RecordError
from beam_gemma.monitoring.progress import Count
from beam_gemma.monitoring.timeline import DeviceStats, Pulse, Work
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.runtime.step_interface import Runner, SourceEncoder


class Engine:
    """Completes the requests of many threads in shared steps."""

    def __init__(
        self,
        session: Runner,
        config: EngineConfig,
        *,
        vision: MediaEncoder | None = None,
        sound: MediaEncoder | None = None,
        encoder: SourceEncoder | None = None,
        on_step: Callable[[Count], None] = lambda _: None,
        device_stats: Callable[[], DeviceStats] = DeviceStats,
    ) -> None:
        """Start the engine and its thread.

        Args:
            session: The session that runs the steps.
            config: The size limits of steps.
            vision: The session that makes embeddings of pictures; without one, requests with
                pictures are refused.
            sound: The session that makes embeddings of sounds; likewise.
            encoder: The session that reads sources, if the model has an encoder.
            on_step: Called after each step with the number of tokens that it computed.
            device_stats: Called after each step to read GPU statistics; all zero by default.

        Raises:
            OptionsError: the session has fewer recurrent state slots than the config needs.
            ArtifactError: the embeddings of media or the states of sources do not suit the
                session's graph.
        """
        found = {Picture: vision, Sound: sound}
        encoders = {kind: each for kind, each in found.items() if each is not None}
        _check(session, config, encoders.values(), encoder)
        self.signature = session.signature
        self.pulse = Pulse(self.signature.device, stats=device_stats)
        self._config = config
        self._on_step = on_step
        self._assemble(session, encoders, encoder)
        self._stats = EngineStats(max_num_seqs=config.max_num_seqs)
        self._futures: dict[Sequence, Future[Completion]] = {}
        self._inbox: list[list[Sequence]] = []
        self._stopped: EngineError | None = None
        self._gives_up = False
        """True if waiting requests are to be given up."""
        self._is_leaving = False
        """True if the process is exiting, even with work left."""
        self._condition = threading.Condition()  # guards the six above
        self._thread = threading.Thread(target=self._loop, name="beam-gemma-engine", daemon=True)
        self._thread.start()
        # ONNX Runtime aborts a process that exits during a step.
        atexit.register(self._leave)

    @property
    def stats(self) -> EngineStats:
        """Snapshot of the engine's counts."""
        with self._condition:
            return dataclasses.replace(self._stats)

    def submit(self, requests: Iterable[Request]) -> list[Future[Completion]]:
        """Queue requests as one batch; return futures of their completions, in the same order.

        A request that can never run gets its error at once. Single futures cannot be canceled.

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
                refused.append((future, failure(str(error))))
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
        self._refuse(gives_up=False)
        self._thread.join()
        atexit.unregister(self._leave)

    def drain(self) -> None:
        """Refuse further work and give up waiting requests: their futures raise `CancelledError`.

        Requests that run are completed.
        """
        self._refuse(gives_up=True)

    def _assemble(
        self,
        session: Runner,
        encoders: Mapping[type[Medium], MediaEncoder],
        encoder: SourceEncoder | None,
    ) -> None:
        """Create the parts that the engine's thread works with."""
        config = self._config
        cache = KVCache(
            self.signature,
            num_blocks=session.num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._cache = cache
        self._scheduler = Scheduler(
            cache,
            self.signature,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            vision=encoders[Picture].signature if Picture in encoders else None,
            sound=encoders[Sound].signature if Sound in encoders else None,
            encoder=encoder.signature if encoder else None,
            snapshots=_snapshots(session, config),
        )
        self._media = MediaStore(encoders) if encoders else None
        limit = config.max_num_batched_tokens
        self._sources = (
            SourceStore(encoder, max_num_batched_tokens=limit, media=self._media)
            if encoder
            else None
        )
        self._executor = Executor(
            session,
            cache,
            self._scheduler,
            on_run=self._count,
            media=self._media,
            sources=self._sources,
        )

    def _refuse(self, *, gives_up: bool) -> None:
        with self._condition:
            self._gives_up |= gives_up
            if self._stopped is None:
                self._stopped = EngineError("engine: closed, and takes no further requests")
            self._condition.notify()

    def _leave(self) -> None:
        with self._condition:
            self._is_leaving = True
            self._condition.notify()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while self._receive():
                self._step()
            while self._executor.is_busy:
                self._executor.collect()
        except Exception as error:  # waiting callers must learn of any error
            self._fail(error)
        finally:
            # Frees the sessions' memory for the next ones.
            del self._executor, self._media, self._sources

    def _receive(self) -> bool:
        """Queue submitted requests, waiting for some if idle; return False when all is done."""
        with self._condition:
            while not (
                self._inbox or self._scheduler.has_unfinished or self._stopped or self._is_leaving
            ):
                self._condition.wait()
            batches, self._inbox = self._inbox, []
            gives_up, self._gives_up = self._gives_up, False
        for batch in batches:
            self._scheduler.add(batch)
        if gives_up:
            self._give_up(self._scheduler.drop_waiting())
        return self._scheduler.has_unfinished and not self._is_leaving

    def _give_up(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            with self._condition:
                future = self._futures.pop(sequence)
            future.set_exception(CancelledError())

    def _step(self) -> None:
        """Launch a step, collect one if no more can be launched, and deliver ended completions."""
        executor = self._executor
        step = () if executor.is_full else self._scheduler.schedule(ahead=executor.is_busy)
        if step:
            executor.launch(step)
        if executor.is_full or not step:
            executor.collect()
        for sequence, completion in executor.take_ended():
            with self._condition:
                future = self._futures.pop(sequence)
                self._stats.num_finished += 1
                self._stats.num_failed += completion.error is not None
            future.set_result(completion)

    def _fail(self, error: Exception) -> None:
        """Stop for good: fail all held requests with the error and refuse submissions."""
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

    def _count(self, count: StepCount) -> None:
        num_sequences, num_prompt_tokens, num_new_tokens = count
        is_decode = not num_prompt_tokens
        has_backlog = is_decode and self._scheduler.num_waiting > 0
        with self._condition:
            stats = self._stats
            stats.num_prefill_steps += not is_decode
            stats.num_decode_steps += is_decode
            stats.num_decode_rows += num_sequences if is_decode else 0
            stats.num_backlog_decode_steps += has_backlog
            stats.num_backlog_decode_rows += num_sequences if has_backlog else 0
            stats.num_prompt_tokens += num_prompt_tokens
            num_cached_tokens = self._scheduler.num_cached_tokens - stats.num_cached_tokens
            stats.num_cached_tokens += num_cached_tokens
            stats.num_preemptions = self._scheduler.num_preemptions
            stats.num_completion_tokens += num_new_tokens
            if self._media is not None:
                stats.num_pictures = self._media.num_computed[Picture]
                stats.num_reused_pictures = self._media.num_reused[Picture]
                stats.num_sounds = self._media.num_computed[Sound]
                stats.num_reused_sounds = self._media.num_reused[Sound]
            if self._sources is not None:
                stats.num_sources = self._sources.num_computed
                stats.num_reused_sources = self._sources.num_reused
        used_cache, whole_cache = self._cache.use
        self.pulse.add(
            Work(
                prompt_tokens=num_prompt_tokens,
                cached_tokens=num_cached_tokens,
                completion_tokens=num_new_tokens,
                used_slots=num_sequences if is_decode else 0,
                slots=self._config.max_num_seqs if is_decode else 0,
                used_cache=used_cache,
                cache=whole_cache,
            )
        )
        self._on_step(Count(prompt_tokens=num_prompt_tokens, completion_tokens=num_new_tokens))

    def _end_token_ids(self, request: Request) -> frozenset[int]:
        eos_token_ids = () if request.params.ignore_eos else self._config.eos_token_ids
        return frozenset((*eos_token_ids, *request.params.stop_token_ids))


def _snapshots(session: Runner, config: EngineConfig) -> Snapshots:
    """Return the slots of recurrent state beyond those of sequences, without the spare one."""
    is_cuda = session.signature.device == "cuda"
    has_any = session.signature.has_recurrent_state and config.enable_prefix_caching
    end = session.num_state_slots - is_cuda if has_any else 0
    return Snapshots(range(config.max_num_seqs, end))


def _check(
    session: Runner,
    config: EngineConfig,
    encoders: Iterable[MediaEncoder],
    encoder: SourceEncoder | None,
) -> None:
    slots = session.num_state_slots
    if session.signature.has_recurrent_state and slots < config.max_num_seqs:
        raise OptionsError(
            f"max_num_seqs: expected at most the session's {slots} state slots, got "
            f"{config.max_num_seqs}"
        )
    check_source_encoder(encoder.signature if encoder else None, session.signature)
    for each in encoders:
        check_encoder(each.signature, encoder.signature if encoder else session.signature)
