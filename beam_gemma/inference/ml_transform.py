"""Embeddings for Beam's own transforms: MLTransform, and the ingestion of `apache_beam.ml.rag`."""

from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference
from apache_beam.ml.rag.embeddings.base import create_text_adapter
from apache_beam.ml.rag.types import EmbeddableItem
from apache_beam.ml.transforms.base import EmbeddingsManager

from beam_gemma.beam_internals import text_embedding_handler
from beam_gemma.errors import RecordError
from beam_gemma.inference.handlers import GemmaEmbedModelHandler
from beam_gemma.runtime.devices import DeviceChoice
from beam_gemma.runtime.limits import Limits
from beam_gemma.tasks.interface import Model
from beam_gemma.tasks.text_encoder import EmbedSettings


class GemmaTextEmbeddings(EmbeddingsManager):
    """Embeds texts with a Gemma model within MLTransform.

    With `columns`, elements are dicts, and the text in each of these columns becomes its embedding.
    Without, elements are items of `apache_beam.ml.rag` such as a `Chunk`, which gain an embedding.
    Results cannot carry errors: a text without an embedding fails its batch, which
    `MLTransform.with_exception_handling` sets aside.

    Example:
        >>> from apache_beam.ml.transforms.base import MLTransform
        >>> embed = MLTransform(write_artifact_location=OUT)
        >>> embed = embed.with_transform(GemmaTextEmbeddings(MODEL, columns=["text"]))
        >>> with beam.Pipeline(runner="FnApiRunner") as pipeline:
        ...     rows = pipeline | beam.Create([{"text": "Bread"}]) | embed
    """

    def __init__(
        self,
        model: str,
        *,
        columns: list[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate: bool = False,
        truncate_dim: int | None = None,
        device: DeviceChoice = "auto",
        max_num_batched_tokens: int | None = None,
    ) -> None:
        """Create the transform for a model and its settings.

        Args:
            model: The folder that `python -m export` wrote.
            columns: The dict keys of texts; None for items of `apache_beam.ml.rag`.
            prompt_name: The name of one of the model's prompts, such as `document`.
            prompt: The prefix for each text, instead of one of the model's prompts.
            truncate: True to cut off the end of a text that is too long.
            truncate_dim: The number of values to keep of each embedding; None for all.
            device: `auto` is CUDA if the model and the machine have it, else the CPU.
            max_num_batched_tokens: Most tokens per step; None for the device's default.
        """
        super().__init__(columns=columns, type_adapter=create_text_adapter())
        self._model = model
        # Plain values: MLTransform writes its transforms to JSON.
        self._settings = {
            "prompt_name": prompt_name,
            "prompt": prompt,
            "truncate": truncate,
            "truncate_dim": truncate_dim,
        }
        self._device: DeviceChoice = device
        self._max_num_batched_tokens = max_num_batched_tokens

    def get_model_handler(self) -> "VectorHandler":
        """Return the handler that embeds texts."""
        settings = EmbedSettings(**self._settings)  # type: ignore[arg-type]
        limits = Limits(max_num_batched_tokens=self._max_num_batched_tokens)
        return VectorHandler(
            self._model, settings, device=self._device, limits=limits, large_model=False
        )

    def get_ptransform_for_processing(self, **kwargs: Any) -> beam.PTransform[Any, Any]:
        """Return the transform that MLTransform applies."""
        del kwargs
        transform = RunInference(text_embedding_handler(self))
        return transform if self.columns else transform.with_output_types(EmbeddableItem)


class VectorHandler(GemmaEmbedModelHandler):
    """A handler whose results are the embeddings alone."""

    def run_inference(  # type: ignore[override]
        self,
        batch: Sequence[str],
        model: Model,
        inference_args: dict[str, Any] | None = None,
    ) -> list[list[float]]:
        """Return the embedding of each text.

        Raises:
            RecordError: a text has no embedding.
        """
        predictions = super().run_inference(batch, model, inference_args)
        results: list[Any] = [prediction.inference for prediction in predictions]
        for position, result in enumerate(results):
            # The error ends the job and is logged, so that it quotes no text.
            if error := result["error"]:
                raise RecordError(
                    f"text {position} of a batch of {len(batch)} (the first is 0): expected an "
                    f"embedding, got: {error}"
                )
        return [result["embedding"] for result in results]
