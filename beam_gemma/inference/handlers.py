"""Gemma as Beam model handlers, one for each task."""

import copy
import dataclasses
import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from beam_gemma.errors import OptionsError
from beam_gemma.inference.media_files import AudioReading, ImageReading, MediaReading
from beam_gemma.inference.task_handler import TaskHandler
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.row import Row
from beam_gemma.inputs.template import column_value
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.runtime.devices import DeviceChoice
from beam_gemma.runtime.download import open_description
from beam_gemma.runtime.limits import Limits
from beam_gemma.structured.json_schema import json_schema_of
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.tasks import open_model
from beam_gemma.tasks.classify import Classifier
from beam_gemma.tasks.embed import Embedder
from beam_gemma.tasks.generate import GenerateSettings, Generator, mask_decoder_of
from beam_gemma.tasks.interface import Asked, Encoder, asked
from beam_gemma.tasks.moderate import ModerateSettings
from beam_gemma.tasks.questions import ClassifySettings
from beam_gemma.tasks.text_encoder import EmbedSettings, TextEncoder


class GemmaGenerateModelHandler(TaskHandler):
    """Completes examples with a Gemma model.

    Args:
        model: The folder that `python -m export` wrote, on this machine or on gs://.
        settings: The settings of the task; by default each example is its own prompt.
        device: `auto` is CUDA if the model and the machine have it, else the CPU.
        limits: Step and memory limits.
        large_model: True if the processes of a machine share one model.
        image_reading: Limits of reading the pictures that rows name by path or URI; by default,
            none of the machine's own disk.

    Raises:
        OptionsError: the limits do not fit the device.

    Example:
        >>> sampling = SamplingParams(max_tokens=4)
        >>> settings = GenerateSettings(prompt="{title} is about", sampling=sampling)
        >>> handler = GemmaGenerateModelHandler(MODEL, settings, limits=Limits(max_num_seqs=8))
        >>> [result] = handler.run_inference([{"title": "Bread"}], handler.load_model())
        >>> result.inference["num_completion_tokens"] <= 4
        True
    """

    token_counters: ClassVar[Mapping[str, str]] = {
        "num_prompt_tokens": "prompt_tokens",
        "num_thinking_tokens": "thinking_tokens",
        "num_completion_tokens": "completion_tokens",
    }
    head: Head = "generate"
    settings: GenerateSettings

    def __init__(
        self,
        model: str,
        settings: GenerateSettings | None = None,
        *,
        device: DeviceChoice = "auto",
        limits: Limits = Limits(),
        large_model: bool = True,
        image_reading: ImageReading = ImageReading(),
        audio_reading: AudioReading = AudioReading(),
    ) -> None:
        super().__init__(
            model,
            settings or GenerateSettings(),
            device=device,
            limits=limits,
            large_model=large_model,
            reading=MediaReading(image=image_reading, audio=audio_reading),
        )

    def encoder(self, artifact: Artifact) -> PromptEncoder:
        """Return the encoder of prompts; no weights are loaded."""
        return open_model.prompt_encoder(artifact, self.settings)

    def check(self, artifact: Artifact) -> None:
        """Check the settings against the model; no weights are loaded."""
        open_model.constraint(artifact, self.settings, self.encoder(artifact))
        mask_decoder_of(self.settings)

    def with_schema(self, schema: Mapping[str, Any] | type) -> "GemmaGenerateModelHandler":
        """Return a copy of the handler whose completions are JSON of a schema.

        Args:
            schema: JSON Schema, or a class with `model_json_schema`, such as a Pydantic model.

        Raises:
            OptionsError: the settings already request structured output, or the schema cannot be
                used.
        """
        if self.settings.structured is not None:
            raise OptionsError(
                "schema: expected a handler without structured output, got one that has it"
            )
        handler = copy.copy(self)
        handler._key = uuid.uuid4().hex
        structured = StructuredOutput(json_schema=json_schema_of(schema))
        handler.settings = dataclasses.replace(self.settings, structured=structured)
        return handler

    def _draw_key(self, row: Row) -> str | None:
        column = self.settings.key_column
        if column is None or isinstance(row, str):
            return None
        value = column_value(row, column)
        return None if value is None else str(value)

    def _load(self, artifact: Artifact, device: Device) -> Generator:
        return open_model.open_generator(artifact, self.settings, device, self._limits)


class GemmaClassifyModelHandler(TaskHandler):
    """Classifies examples with a Gemma model, such as ShieldGemma.

    Args:
        model: The folder that `python -m export` wrote, on this machine or on gs://.
        settings: The settings of the task.
        device: `auto` is CUDA if the model and the machine have it, else the CPU.
        limits: Step and memory limits.
        large_model: True if the processes of a machine share one model.
        image_reading: Limits of reading the pictures that rows name by path or URI; by default,
            none of the machine's own disk.

    Raises:
        OptionsError: the limits do not fit the device.

    Example:
        >>> settings = ClassifySettings(prompt="{text} is", labels=(" good", " bad"))
        >>> handler = GemmaClassifyModelHandler(MODEL, settings)
        >>> [result] = handler.run_inference([{"text": "Bread"}], handler.load_model())
        >>> result.inference["label"] in (" good", " bad")
        True
    """

    head: Head = "score"
    settings: ClassifySettings | ModerateSettings

    def __init__(
        self,
        model: str,
        settings: ClassifySettings | ModerateSettings,
        *,
        device: DeviceChoice = "auto",
        limits: Limits = Limits(),
        large_model: bool = True,
        image_reading: ImageReading = ImageReading(),
        audio_reading: AudioReading = AudioReading(),
    ) -> None:
        super().__init__(
            model,
            settings,
            device=device,
            limits=limits,
            large_model=large_model,
            reading=MediaReading(image=image_reading, audio=audio_reading),
        )

    def encoder(self, artifact: Artifact) -> Encoder:
        """Return the encoder of a row's first prompt; no weights are loaded."""
        encode = open_model.question_encoders(artifact, self.settings)[0]
        return lambda row: encode(row).prompt

    def asks(self, artifact: Artifact) -> Callable[[Row], Asked]:
        """Return a function from a row to the token ids to compute; no weights are loaded."""
        encoders = open_model.question_encoders(artifact, self.settings)

        def asks(row: Row) -> Asked:
            questions = [encode(row) for encode in encoders]
            paths = ((q.prompt, path.token_ids) for q in questions for path in q.plan.paths)
            return asked([question.prompt for question in questions], paths)

        return asks

    def _identify(self, artifact: Artifact) -> Callable[[Row], Any]:
        encoders = open_model.question_encoders(artifact, self.settings)
        return lambda row: [encode(row).identity for encode in encoders]

    def _load(self, artifact: Artifact, device: Device) -> Classifier:
        return open_model.open_classifier(artifact, self.settings, device, self._limits)


class GemmaEmbedModelHandler(TaskHandler):
    """Embeds examples with a Gemma model, such as EmbeddingGemma.

    The model's manifest is read when the handler is made, since the type of a result holds the
    width of the embeddings.

    Args:
        model: The folder that `python -m export` wrote, on this machine or on gs://.
        settings: The settings of the task; by default each example is a text.
        device: `auto` is CUDA if the model and the machine have it, else the CPU.
        limits: Limits of steps and memory; whole texts know only `max_num_batched_tokens` and
            `gpu_memory_utilization`.
        large_model: True if the processes of a machine share one model.
        image_reading: Limits of reading the pictures that rows name by path or URI; by default,
            none of the machine's own disk.

    Raises:
        ArtifactError: the folder is missing, damaged, or has no embedding graph.
        OptionsError: the embeddings cannot be cut as the settings say, or the limits do not fit.

    Example:
        >>> handler = GemmaEmbedModelHandler(MODEL, EmbedSettings(text_column="text"))
        >>> [result] = handler.run_inference([{"text": "Bread"}], handler.load_model())
        >>> len(result.inference["embedding"]) > 0
        True
    """

    token_counters: ClassVar[Mapping[str, str]] = {"num_tokens": "prompt_tokens"}
    head: Head = "embed"
    settings: EmbedSettings

    def __init__(
        self,
        model: str,
        settings: EmbedSettings | None = None,
        *,
        device: DeviceChoice = "auto",
        limits: Limits = Limits(),
        large_model: bool = True,
        image_reading: ImageReading = ImageReading(),
    ) -> None:
        limits.check_whole_texts()
        artifact = open_description(model)
        open_model.embedding_of(artifact)
        size = next(s.embedding_size for (h, _), s in artifact.signatures.items() if h == "embed")
        settings = (settings or EmbedSettings()).of_size(size)
        super().__init__(
            model,
            settings,
            device=device,
            limits=limits,
            large_model=large_model,
            reading=MediaReading(image=image_reading),
        )

    def encoder(self, artifact: Artifact) -> TextEncoder:
        """Return the encoder of texts and pictures; no weights are loaded."""
        return open_model.text_encoder(artifact, self.settings)

    def _load(self, artifact: Artifact, device: Device) -> Embedder:
        return open_model.open_embedder(artifact, self.settings, device, self._limits)
