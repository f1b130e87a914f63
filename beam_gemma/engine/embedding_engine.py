"""Embedding of many texts, in steps of about equal cost.

Texts are sorted by length and packed without padding, up to a token budget. Media in them are
computed just before the step that needs them. A step that fails is tried again by halves, down to
single texts; a text that fails twice alone gets an error. Several such errors with no success
between them mean that the device has failed.

Dimensions: T tokens, B texts, W width of an embedding.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, repeat
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from beam_gemma.engine.media_store import MediaStore
from beam_gemma.engine.packing import NO_FEATURES, place_embeddings
from beam_gemma.engine.sequence import Medium, Picture
from beam_gemma.errors import ArtifactError, EngineError
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.step_interface import EmbedOutput

SPREAD = 2
"""Maximum size of a step with every text padded to the longest, as a multiple of the token budget;
some kernels use that layout."""
MAX_FAILURES_IN_A_ROW = 3
"""Consecutive text failures, with no successful step between them, that stop the engine."""
TokenIds: TypeAlias = Sequence[int]
Result: TypeAlias = np.ndarray | str
"""An embedding [W], or an error message."""
Media: TypeAlias = Mapping[int, Sequence[Medium]]
"""The pictures of texts, by the index of the text; texts without pictures may be missing."""
NO_MEDIA: Media = {}


@runtime_checkable
class Runner(Protocol):
    """Interface of the session that runs the steps."""

    signature: Signature

    def embed(self, feeds: Mapping[str, np.ndarray]) -> EmbedOutput:
        """Run one step on whole texts."""


class EmbeddingSteps:
    """Runs embedding steps on a session that many threads share."""

    def __init__(
        self,
        session: Runner,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int | None = None,
        on_step: Callable[[int], None],
        media: MediaStore | None = None,
    ) -> None:
        """Wrap a session.

        Args:
            session: The session that runs the graph.
            max_num_batched_tokens: Maximum tokens per step, unless a single text has more.
            max_num_seqs: Maximum texts per step; None for no limit.
            on_step: Called with the number of tokens of each step that succeeds.
            media: The embeddings of pictures; None if no text has pictures.
        """
        self._session = session
        self.max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._on_step = on_step
        self._media = media
        self._lock = threading.Lock()
        self._num_failures = 0  # consecutive failures; guarded by the lock
        self.num_tokens = 0  # tokens of steps that succeeded; guarded by the lock
        self.is_drained = False

    def __call__(
        self, texts: Sequence[TokenIds], media: Media = NO_MEDIA
    ) -> Iterator[tuple[int, Result]]:
        """Yield the index and the result of each text, step by step; texts must not be empty.

        Args:
            texts: The token ids of each text, with ids in the places of pictures.
            media: The pictures of texts.

        Raises:
            EngineError: the device failed.
        """
        lengths = [len(text) for text in texts]
        for step in whole_text_steps(lengths, self.max_num_batched_tokens, self._max_num_seqs):
            if self.is_drained:
                return
            yield from self._run(texts, media, step)

    def drain(self) -> None:
        """Start no further step: calls end after their current one."""
        self.is_drained = True

    def picture_counts(self) -> Counter[str]:
        """Return how many pictures were computed, and how many were kept from earlier steps."""
        store = self._media
        if store is None:
            return Counter()
        return Counter(
            pictures=store.num_computed[Picture], reused_pictures=store.num_reused[Picture]
        )

    def _run(
        self, texts: Sequence[TokenIds], media: Media, step: list[int]
    ) -> Iterator[tuple[int, Result]]:
        """Yield the index and the result of each text of a step."""
        num_tokens = sum(len(texts[i]) for i in step)
        for _ in range(2 if len(step) == 1 else 1):
            try:
                with self._lock:
                    output = self._embedded(
                        [texts[i] for i in step], [media.get(i, ()) for i in step]
                    )
                    self._num_failures = 0
                    self.num_tokens += num_tokens
            except Exception as error:  # any kind; halving finds the text at fault
                failure = f"{type(error).__name__}: {error}"
            else:
                self._on_step(num_tokens)
                yield from zip(step, map(_checked, output.embedding), strict=True)
                return
        if len(step) > 1:
            middle = len(step) // 2
            for half in (step[:middle], step[middle:]):
                yield from self._run(texts, media, half)
            return
        self._count_failure(failure)
        yield step[0], f"model: expected an embedding, got twice {failure}"

    def _embedded(
        self, texts: Sequence[TokenIds], media: Sequence[Sequence[Medium]]
    ) -> EmbedOutput:
        """Run one step over texts, each with its pictures."""
        features = NO_FEATURES
        shown = list(chain.from_iterable(media))
        if self._media is not None and shown:
            features = self._media.prepare(shown)
        inputs = feeds(texts)
        signature = self._session.signature
        if "inputs_embeds" in signature.optional_inputs:
            starts = inputs["cu_seqlens"].tolist()
            ranges = zip(starts, repeat(0), map(len, texts), media, strict=False)
            inputs |= place_embeddings(ranges, starts[-1], signature, features)
        return self._session.embed(inputs)

    def _count_failure(self, failure: str) -> None:
        with self._lock:
            self._num_failures += 1
            if self._num_failures >= MAX_FAILURES_IN_A_ROW:
                raise EngineError(
                    f"engine: {self._num_failures} texts failed one after another, with no success "
                    f"between them, the last with {failure}"
                )


def check_sight(session: Runner, token_ids: TokenIds, *, is_two_sided: bool) -> None:
    """Check that the graph's attention direction is that of its model.

    Args:
        session: The session that runs the graph.
        token_ids: Three different token ids.
        is_two_sided: Whether the model's tokens also attend to later tokens.

    Raises:
        ArtifactError: the graph's attention direction differs from its model's.
    """
    first, *others = token_ids
    texts = [[first, other] for other in others]
    inputs = feeds(texts)
    if "inputs_embeds" in session.signature.optional_inputs:
        inputs |= place_embeddings((), sum(map(len, texts)), session.signature, NO_FEATURES)
    states = session.embed(inputs).first_state
    if np.array_equal(states[0], states[1]) == is_two_sided:
        sides = ("causal", "two-sided") if is_two_sided else ("two-sided", "causal")
        raise ArtifactError(
            f"graph: expected {sides[1]} attention as the model's configuration says, got "
            f"{sides[0]}; export the model again"
        )


def whole_text_steps(
    lengths: Sequence[int], budget: int, max_num_seqs: int | None
) -> Iterator[list[int]]:
    """Yield the indices of the texts of each step.

    Texts come longest first, so that running out of memory shows before any work is done.

    Args:
        lengths: Number of tokens of each text.
        budget: Maximum tokens per step, unless a single text has more.
        max_num_seqs: Maximum texts per step; None for no limit.
    """
    step: list[int] = []
    num_tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        is_full = len(step) == max_num_seqs or num_tokens + lengths[i] > budget
        if step and (is_full or (len(step) + 1) * lengths[step[0]] > SPREAD * budget):
            yield step
            step, num_tokens = [], 0
        step.append(i)
        num_tokens += lengths[i]
    if step:
        yield step


def feeds(texts: Sequence[TokenIds]) -> dict[str, np.ndarray]:
    """Return the graph inputs of a step over these texts."""
    return {
        "input_ids": np.array(list(chain.from_iterable(texts)), np.int64),
        "cu_seqlens": np.array([0, *accumulate(map(len, texts))], np.int32),
    }


def _checked(embedding: np.ndarray) -> Result:
    if np.isfinite(embedding).all():
        return embedding
    return "model: expected a finite embedding, got NaN or infinity"
