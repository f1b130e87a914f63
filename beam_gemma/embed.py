"""The embed task: rows to texts, texts to embeddings, one result for each row.

A text that several rows have in common is computed once. What is wrong with one row ends as that
row's `error`; its neighbours never see it.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from beam_gemma.embedding_steps import EmbeddingSteps, Result
from beam_gemma.errors import RecordError
from beam_gemma.progress import Count
from beam_gemma.prompt_encoder import Prompt, Row
from beam_gemma.pulse import Pulse
from beam_gemma.text_encoder import EmbedSettings, TextEncoder

LEAST_LENGTH = 1e-12
"""What an embedding is divided by if it is all zeros, as in sentence-transformers."""
NOT_FINITE = "embedding: expected finite numbers, got infinity in float16; take float32"


class Embedder:
    """Embeds rows by steps that many threads share."""

    def __init__(
        self,
        steps: EmbeddingSteps,
        encoder: TextEncoder,
        settings: EmbedSettings,
        *,
        pulse: Pulse,
        on_result: Callable[[Count], None],
    ) -> None:
        """Join what makes embeddings and what makes texts.

        Args:
            steps: Run the model.
            encoder: Makes token ids of rows.
            settings: What to embed, and in which form.
            pulse: Samples of what the steps have done.
            on_result: Called with the rows that are done, from any thread.
        """
        self._steps = steps
        self._encoder = encoder
        self._settings = settings
        self._pulse = pulse
        self._on_result = on_result
        self._names = settings.result_schema.names
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()  # guarded by the lock

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the result columns of each row, in the order of the rows."""
        prompts = [self._prompt(row) for row in rows]
        texts = [prompt.token_ids for prompt in prompts if isinstance(prompt, Prompt)]
        unique = list(dict.fromkeys(texts))
        with self._lock:
            self._counts["duplicate_rows"] += len(texts) - len(unique)
        vectors = dict(zip(unique, map(self._formed, self._steps(unique)), strict=True))
        results = [
            self._result(prompt, vectors[prompt.token_ids])
            if isinstance(prompt, Prompt)
            else dict.fromkeys(self._names) | {"error": prompt}
            for prompt in prompts
        ]
        failed = sum(result["error"] is not None for result in results)
        self._on_result(Count(rows=len(results), failed=failed))
        return results

    def take_counts(self) -> dict[str, int]:
        """Return what has been counted and no call has returned yet."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def take_pulse(self) -> dict[str, Any]:
        """Return the samples of the steps that no call has returned yet."""
        return self._pulse.take()

    def _prompt(self, row: Row) -> Prompt | str:
        """Return a row's text, or the error that ends it here."""
        try:
            return self._encoder(row)
        except RecordError as error:
            return str(error)

    def _formed(self, result: Result) -> list[float] | str:
        """Return an embedding as it was asked for."""
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
    """Return the first numbers of an embedding, at length 1; None keeps it as it is."""
    if size is None or size == len(vector):
        return vector
    kept = vector[:size].astype(np.float64)
    return (kept / max(np.sqrt((kept * kept).sum()), LEAST_LENGTH)).astype(np.float32)
