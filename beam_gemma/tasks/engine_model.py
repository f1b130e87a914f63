"""Base class of `Generator` and `Classifier`, which run on an engine."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sequence import Completion
from beam_gemma.engine.stats import Tally
from beam_gemma.errors import EngineError, OptionsError, RecordError
from beam_gemma.inputs.row import Row
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.vision_config import VisionConfig
from beam_gemma.monitoring.progress import Count
from beam_gemma.tasks.interface import Settings, in_order
from beam_gemma.tasks.media_requests import MediaDecoder, MediaWindow, W

ROWS_PER_SLOT = 2
"""Rows with media that are decoded and not finished, per row that the engine runs at once."""
MAX_DECODED_BYTES = 256 << 20
"""Most bytes of the decoded files of these rows."""


class EngineModel(ABC, Generic[W]):
    """Runs a task on an engine; many threads can share one model."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        *,
        vision: VisionConfig | None,
        sound: SoundConfig | None,
        on_result: Callable[[Count], None],
    ) -> None:
        """Initialize the model.

        Args:
            engine: The engine that runs the model.
            settings: The settings of the task.
            vision: The model's picture half; None if it has none.
            sound: The model's sound half; None if it has none.
            on_result: Called with a count of each row as soon as the row is done, from any thread.
                The engine counts tokens itself.
        """
        self._engine = engine
        self._media = None
        if vision is not None or sound is not None:
            self._media = MediaDecoder(vision, sound, settings)
        self._on_result = on_result
        self._names = settings.result_schema.names
        self._tally = Tally(engine)
        self._is_drained = False
        self._lock = threading.Lock()  # guards num_left of all rows

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the result columns of each row, in the order of the rows."""
        return in_order(self.stream(rows))

    def stream(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row's index and result columns as soon as they are known.

        Rows of text are submitted at once, in their order. Rows with media are submitted as
        they are decoded, see `media_requests.py`.
        """
        works: list[W] = []
        failures: list[tuple[int, str]] = []
        for index, row in enumerate(rows):
            try:
                works.append(self._work(index, row))
            except RecordError as error:
                failures.append((index, str(error)))
        done: SimpleQueue[W] = SimpleQueue()
        self._submit([work for work in works if not work.has_media], done.put)
        with self._window([work for work in works if work.has_media], done):
            for index, failure in failures:
                yield index, self._failure(failure)
            for _ in works:
                work = done.get()
                try:
                    result = self._outcome(work)
                except CancelledError:
                    continue
                finally:
                    work.futures = []  # they refer to the row, and would keep its media
                yield work.index, result

    @abstractmethod
    def _work(self, index: int, row: Row) -> W:
        """Return the requests of a row.

        Raises:
            RecordError: the row makes none.
        """

    @abstractmethod
    def _result(self, work: W) -> dict[str, Any]:
        """Return the result columns of a row whose requests are finished."""

    def drain(self) -> None:
        """Stop starting rows; rows that have started still finish."""
        self._is_drained = True
        self._engine.drain()

    def num_tokens(self) -> int:
        """Return the number of tokens that the engine has computed."""
        return self._engine.stats.num_tokens

    def take_counts(self) -> dict[str, int]:
        """Return the engine's counts since the last call."""
        return self._tally.take()

    def take_pulse(self) -> dict[str, Any]:
        """Return the engine's samples since the last call."""
        return self._engine.pulse.take()

    def _submit(self, works: Sequence[W], on_end: Callable[[W], None]) -> None:
        """Submit the requests of rows as one batch."""
        requests = [
            request if self._media is None else self._media.completed(prompt, request, work.decoded)
            for work in works
            for prompt, request in work.asked
        ]
        futures = iter(self._engine.submit(requests))
        for work in works:
            work.futures = [next(futures) for _ in work.asked]
        for work in works:
            for future in work.futures:
                future.add_done_callback(partial(self._settle, work, on_end))

    def _window(self, works: Sequence[W], done: SimpleQueue[W]) -> AbstractContextManager[Any]:
        """Start the rows with media; leaving the context keeps those that wait from starting."""
        if not works:
            return nullcontext()
        if self._media is None:
            raise OptionsError("media: expected a model that takes pictures or sounds, got none")
        window = MediaWindow(
            works,
            self._media,
            send=self._send,
            on_end=done.put,
            max_rows=ROWS_PER_SLOT * self._engine.stats.max_num_seqs,
            max_bytes=MAX_DECODED_BYTES,
        )
        return closing(window)

    def _send(self, work: W, on_end: Callable[[W], None]) -> None:
        """Submit a row with its media, or give it up if the model is drained."""
        try:
            self._submit([work], on_end)
        except EngineError:
            if self._is_drained:
                raise CancelledError from None
            raise

    def _settle(self, work: W, on_end: Callable[[W], None], _: Future[Completion]) -> None:
        """Count a finished request, and the row with its last one."""
        with self._lock:
            work.num_left -= 1
            if work.num_left:
                return
        try:
            if not any(future.exception() is not None for future in work.futures):
                failed = any(future.result().error is not None for future in work.futures)
                self._on_result(Count(rows=1, failed=int(failed)))
        finally:
            on_end(work)

    def _outcome(self, work: W) -> dict[str, Any]:
        """Return the result of a row that is finished or has a fault, which is raised otherwise."""
        if isinstance(work.fault, RecordError):
            return self._failure(str(work.fault))
        if work.fault is not None:
            raise work.fault
        return self._result(work)

    def _failure(self, error: str) -> dict[str, Any]:
        """Count a row that failed before reaching the engine, and return its result."""
        self._on_result(Count(rows=1, failed=1))
        return dict.fromkeys(self._names) | {"error": error}
