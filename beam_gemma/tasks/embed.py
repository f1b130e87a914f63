"""The embed task: turns rows into texts and embeddings, and returns one result per row.

A row has a text, pictures, or both, and one embedding. Rows with the same text and pictures share
one computation. A row that fails reports the failure in its `error` column and does not affect
other rows.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from beam_gemma.engine.embedding_engine import EmbeddingSteps, Result
from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inputs.row import Prompt, Row
from beam_gemma.monitoring.progress import Count
from beam_gemma.monitoring.timeline import Pulse
from beam_gemma.tasks.encoded_rows import request_in
from beam_gemma.tasks.interface import in_order
from beam_gemma.tasks.media_requests import MediaDecoder, Work
from beam_gemma.tasks.picture_texts import embedded, work_of
from beam_gemma.tasks.text_encoder import EmbedSettings, TextEncoder

LEAST_LENGTH = 1e-12
"""Lower bound of the divisor when an embedding is rescaled, as in sentence-transformers."""
NOT_FINITE = "embedding: expected finite numbers, got infinity in float16; take float32"


class Embedder:
    """Embeds rows; many threads can share one embedder."""

    def __init__(
        self,
        steps: EmbeddingSteps,
        encoder: TextEncoder,
        settings: EmbedSettings,
        *,
        pictures: MediaDecoder | None = None,
        pulse: Pulse,
        on_result: Callable[[Count], None],
    ) -> None:
        """Initialize the embedder.

        Args:
            steps: The steps that run the model.
            encoder: The encoder that turns rows into token ids.
            settings: The settings of the task.
            pictures: The decoder of pictures; None if rows have none.
            pulse: Recorder of the steps' work.
            on_result: Called with the count of finished rows, from any thread.
        """
        self._steps = steps
        self._encoder = encoder
        self._settings = settings
        self._pictures = pictures
        self._pulse = pulse
        self._on_result = on_result
        self._names = settings.result_schema.names
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()  # _lock guards both counters
        self._told: Counter[str] = Counter()
        """Counts of the pulse and of pictures that `take_counts` has already returned."""

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the result columns of each row, in the order of the rows."""
        return in_order(self.stream(rows))

    def stream(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row's index and result columns as soon as they are known.

        Rows with pictures come behind the others.
        """
        owners: dict[Any, list[tuple[int, Prompt]]] = {}
        for index, row in enumerate(rows):
            try:
                prompt = request_in(row, self._encoder, Prompt.of_identity)
            except RecordError as error:
                self._on_result(Count(rows=1, failed=1))
                yield index, dict.fromkeys(self._names) | {"error": str(error)}
            else:
                shown = tuple(file.digest for file in prompt.files)
                same = prompt.token_ids, prompt.places, shown
                owners.setdefault(same, []).append((index, prompt))
        with self._lock:
            self._counts["duplicate_rows"] += sum(map(len, owners.values())) - len(owners)
        shared = list(owners.values())
        for number, result in self._embedded([rows[0][1] for rows in shared]):
            vector = self._formed(result)
            for index, prompt in shared[number]:
                self._on_result(Count(rows=1, failed=int(isinstance(vector, str))))
                yield index, self._result(prompt, vector)

    def drain(self) -> None:
        """Stop starting steps."""
        self._steps.drain()

    def num_tokens(self) -> int:
        """Return the number of tokens that the steps have computed."""
        return self._steps.num_tokens

    def take_counts(self) -> dict[str, int]:
        """Return the counts since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            totals = self._pulse.counts() + self._steps.picture_counts()
            counts += totals - self._told
            self._told = totals
        return dict(counts)

    def take_pulse(self) -> dict[str, Any]:
        """Return the samples of the steps since the last call."""
        return self._pulse.take()

    def _embedded(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Result]]:
        """Yield the index and the result of each prompt."""
        texts = [number for number, prompt in enumerate(prompts) if not prompt.places]
        for number, result in self._steps([prompts[number].token_ids for number in texts]):
            yield texts[number], result
        seen: list[Work] = [work_of(n, prompt) for n, prompt in enumerate(prompts) if prompt.places]
        if not seen:
            return
        if self._pictures is None:
            raise OptionsError("pictures: expected a model that embeds pictures, got one without")
        yield from embedded(seen, self._pictures, self._steps)

    def _formed(self, result: Result) -> list[float] | str:
        """Return the embedding in the requested width and precision, or the error message."""
        if isinstance(result, str):
            return result
        vector = shortened(result, self._settings.truncate_dim)
        with np.errstate(over="ignore"):
            vector = vector.astype(self._settings.embedding_dtype)
        return vector.tolist() if np.isfinite(vector).all() else NOT_FINITE

    def _result(self, prompt: Prompt, vector: list[float] | str) -> dict[str, Any]:
        is_error = isinstance(vector, str)
        return {
            "embedding": None if is_error else vector,
            "num_tokens": len(prompt.token_ids),
            "truncated": prompt.truncated,
            "error": vector if is_error else None,
        }


def shortened(vector: np.ndarray, size: int | None) -> np.ndarray:
    """Return the first `size` values, rescaled to length 1; None returns the vector unchanged."""
    if size is None or size == len(vector):
        return vector
    kept = vector[:size].astype(np.float64)
    return (kept / max(np.sqrt((kept * kept).sum()), LEAST_LENGTH)).astype(np.float32)
