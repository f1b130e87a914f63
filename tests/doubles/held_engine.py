"""An engine that answers requests when a test lets it, by a function of the request."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.engine.stats import EngineStats
from beam_gemma.errors import EngineError
from beam_gemma.monitoring.timeline import Pulse


def completion(*token_ids: int, scores: tuple[float, ...] = ()) -> Completion:
    """Return a completion of these tokens."""
    return Completion(token_ids=token_ids, finish_reason="length", logprob=None, scores=scores)


class HeldEngine(Engine):
    """Holds requests until `release`, or answers each at once.

    Leaving it as a context answers all, so that a test that fails leaves nobody waiting.
    """

    def __init__(
        self,
        answer: Callable[[Request], Completion],
        *,
        max_num_seqs: int = 3,
        is_held: bool = False,
    ) -> None:
        self.pulse = Pulse("cpu")
        self.requests: list[Request] = []
        """All requests so far."""
        self.batches: list[int] = []
        """Number of requests of each submission."""
        self.most_held = 0
        self.arrived = threading.Semaphore(0)
        """Counts requests that have come."""
        self._answer = answer
        self._max_num_seqs = max_num_seqs
        self._is_held = is_held
        self._refusal: EngineError | None = None
        self._held: list[tuple[Request, Future[Completion]]] = []
        self._guard = threading.Lock()

    def __enter__(self) -> "HeldEngine":
        return self

    def __exit__(self, *_: object) -> None:
        """Answer all that is held, and all that comes."""
        self._is_held = False
        self.release()

    @property
    def stats(self) -> EngineStats:
        """Counts, of which only the number of rows at once matters here."""
        return EngineStats(max_num_seqs=self._max_num_seqs)

    def submit(self, requests: Iterable[Request]) -> list[Future[Completion]]:
        """Take requests."""
        pairs = [(request, Future[Completion]()) for request in requests]
        with self._guard:
            if self._refusal is not None:
                raise EngineError(str(self._refusal))
            self.requests += [request for request, _ in pairs]
            self.batches.append(len(pairs))
            self._held += pairs
            self.most_held = max(self.most_held, len(self._held))
        for _ in pairs:
            self.arrived.release()
        if not self._is_held:
            self.release()
        return [future for _, future in pairs]

    def release(self, number: int | None = None) -> None:
        """Answer the oldest requests, or all."""
        with self._guard:
            count = len(self._held) if number is None else number
            some, self._held = self._held[:count], self._held[count:]
        for request, future in some:
            future.set_result(self._answer(request))

    def drain(self) -> None:
        """Give up what waits, answer what runs, and take no more."""
        self._refusal = EngineError("engine: closed, and takes no further requests")
        self.release(self._max_num_seqs)
        self._end(CancelledError())

    def fail(self, message: str) -> None:
        """Stop as an engine does whose device fails."""
        self._refusal = EngineError(message)
        self._end(self._refusal)

    def _end(self, error: Exception) -> None:
        with self._guard:
            held, self._held = self._held, []
        for _, future in held:
            future.set_exception(error)
