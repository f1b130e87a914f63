"""Many texts to one embedding each, in steps of about equal cost.

Texts are sorted by length and packed without padding, up to a number of tokens. A step that fails
is tried again by halves, down to a text that fails alone, and again: then it is that text's error.
Several of these with no success between them are the device's fault.

Dimensions: T tokens, B texts, W width of an embedding.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from beam_gemma.errors import ArtifactError, EngineError
from beam_gemma.runtime.step_interface import EmbedOutput

SPREAD = 2
"""Most places that the texts of a step take side by side, as long as the longest, for each token of
the budget: some kernels lay them so."""
MAX_FAILURES_IN_A_ROW = 3
"""Texts that may fail one after another, with no step between them that succeeds."""
TokenIds: TypeAlias = Sequence[int]
Result: TypeAlias = np.ndarray | str
"""An embedding [W], or what went wrong."""


@runtime_checkable
class Runner(Protocol):
    """What the steps ask of a session."""

    def embed(self, feeds: Mapping[str, np.ndarray]) -> EmbedOutput:
        """Run one step over whole texts."""


class EmbeddingSteps:
    """Runs steps on a session that many threads share."""

    def __init__(
        self,
        session: Runner,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int | None = None,
        on_step: Callable[[int], None],
    ) -> None:
        """Join a session.

        Args:
            session: Runs the graph.
            max_num_batched_tokens: Tokens of one step, unless one text has more.
            max_num_seqs: Texts of one step; None for no limit.
            on_step: Called with the tokens of each step that succeeded.
        """
        self._session = session
        self._budget = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._on_step = on_step
        self._lock = threading.Lock()
        self._num_failures = 0  # in a row; guarded by the lock
        self.num_tokens = 0  # of steps that succeeded; guarded by the lock
        self._is_drained = False

    def __call__(self, texts: Sequence[TokenIds]) -> Iterator[tuple[int, Result]]:
        """Yield the index and the result of each text, step by step; none is empty.

        Raises:
            EngineError: the device failed.
        """
        # The longest first, so that what needs too much memory fails before anything is done.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        for step in self._steps(texts, order):
            if self._is_drained:
                return
            yield from self._run(texts, step)

    def drain(self) -> None:
        """Run no other step: calls end with the one that runs."""
        self._is_drained = True

    def _steps(self, texts: Sequence[TokenIds], order: Sequence[int]) -> Iterator[list[int]]:
        step: list[int] = []
        num_tokens = 0
        for i in order:
            is_full = len(step) == self._max_num_seqs or num_tokens + len(texts[i]) > self._budget
            if step and (is_full or (len(step) + 1) * len(texts[step[0]]) > SPREAD * self._budget):
                yield step
                step, num_tokens = [], 0
            step.append(i)
            num_tokens += len(texts[i])
        if step:
            yield step

    def _run(self, texts: Sequence[TokenIds], step: list[int]) -> Iterator[tuple[int, Result]]:
        """Yield the results of a step."""
        num_tokens = sum(len(texts[i]) for i in step)
        for _ in range(2 if len(step) == 1 else 1):
            try:
                with self._lock:
                    output = self._session.embed(feeds([texts[i] for i in step]))
                    self._num_failures = 0
                    self.num_tokens += num_tokens
            except Exception as error:  # a graph fails in any way; the text at fault is sought
                failure = f"{type(error).__name__}: {error}"
            else:
                self._on_step(num_tokens)
                yield from zip(step, map(_checked, output.embedding), strict=True)
                return
        if len(step) > 1:
            middle = len(step) // 2
            for half in (step[:middle], step[middle:]):
                yield from self._run(texts, half)
            return
        self._count_failure(failure)
        yield step[0], f"model: expected an embedding, got twice {failure}"

    def _count_failure(self, failure: str) -> None:
        with self._lock:
            self._num_failures += 1
            if self._num_failures >= MAX_FAILURES_IN_A_ROW:
                raise EngineError(
                    f"engine: {self._num_failures} texts failed one after another, with no success "
                    f"between them, the last with {failure}"
                )


def check_sight(session: Runner, token_ids: TokenIds, *, is_two_sided: bool) -> None:
    """Refuse a graph that sees what its model does not see, or does not see what its model sees.

    Args:
        session: Runs the graph.
        token_ids: Three that differ.
        is_two_sided: Whether a token of the model sees what comes after it.

    Raises:
        ArtifactError: the graph is not that of its model.
    """
    first, *others = token_ids
    states = session.embed(feeds([[first, other] for other in others])).first_state
    if np.array_equal(states[0], states[1]) == is_two_sided:
        sides = ("causal", "two-sided") if is_two_sided else ("two-sided", "causal")
        raise ArtifactError(
            f"graph: expected {sides[1]} attention as the model's configuration says, got "
            f"{sides[0]}; export the model again"
        )


def feeds(texts: Sequence[TokenIds]) -> dict[str, np.ndarray]:
    """Return the inputs of a step."""
    return {
        "input_ids": np.array(list(chain.from_iterable(texts)), np.int64),
        "cu_seqlens": np.array([0, *accumulate(map(len, texts))], np.int32),
    }


def _checked(embedding: np.ndarray) -> Result:
    if np.isfinite(embedding).all():
        return embedding
    return "model: expected a finite embedding, got NaN or infinity"
