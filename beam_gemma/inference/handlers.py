"""Gemma as Beam model handlers, one for each task: what RunInference needs to know of it."""

import copy
import dataclasses
import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from beam_gemma import moved
from beam_gemma.engine.embedding_engine import EmbeddingSteps, check_sight
from beam_gemma.engine.engine import Engine
from beam_gemma.errors import ArtifactError, OptionsError
from beam_gemma.inference.task_handler import TaskHandler
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.row import Row
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.embedding_config import EmbeddingConfig
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.monitoring.progress import METER, Count
from beam_gemma.monitoring.startup_log import FirstRow
from beam_gemma.monitoring.timeline import Pulse, Work
from beam_gemma.runtime.devices import DeviceChoice
from beam_gemma.runtime.download import open_description
from beam_gemma.runtime.limits import FOR_CUDA, Limits
from beam_gemma.runtime.open_session import open_session
from beam_gemma.runtime.step_shapes import num_texts
from beam_gemma.structured.constraint import Constraint
from beam_gemma.structured.json_schema import json_schema_of
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.tasks.classify import Classifier
from beam_gemma.tasks.embed import Embedder
from beam_gemma.tasks.generate import GenerateSettings, Generator, constraint_of
from beam_gemma.tasks.interface import Asked, Encoder, Settings
from beam_gemma.tasks.moderate import ModerateSettings
from beam_gemma.tasks.questions import ClassifySettings, QuestionEncoder
from beam_gemma.tasks.text_encoder import EmbedSettings, TextEncoder

SIGHT_TEXT = "one two three"
"""Its first three tokens differ, whether they are words or letters."""


class EngineHandler(TaskHandler):
    """Runs a task on an engine."""

    def __init__(
        self,
        model: str,
        settings: Settings,
        *,
        device: DeviceChoice = "auto",
        large_model: bool = True,
        **limits: Any,
    ) -> None:
        """Describe a model and what to ask of it; nothing is loaded yet.

        Args:
            model: Folder that `python -m export` wrote, on this machine or on gs://.
            settings: What to ask.
            device: `auto` is CUDA where the model and the machine have it, else the CPU.
            large_model: Whether the processes of a machine share one model.
            limits: Fields of `Limits`, such as `max_num_seqs`.
        """
        super().__init__(model, settings, device=device, large_model=large_model)
        self._limits = _limits_of(device, limits)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(model={self._model!r}, device={self._device!r}, "
            f"{self._limits!r})"
        )


class GemmaGenerateModelHandler(EngineHandler):
    """Completes examples with a Gemma model."""

    token_counters: ClassVar[Mapping[str, str]] = {
        "num_prompt_tokens": "prompt_tokens",
        "num_completion_tokens": "completion_tokens",
    }
    head: Head = "generate"
    settings: GenerateSettings

    def __init__(self, model: str, settings: GenerateSettings | None = None, **engine: Any) -> None:
        """Describe a model and what to ask of it, by default each example as its own prompt.

        Args:
            model: Folder that `python -m export` wrote, on this machine or on gs://.
            settings: What to ask.
            engine: As for `EngineHandler`.
        """
        super().__init__(model, settings or GenerateSettings(), **engine)

    def encoder(self, artifact: Artifact) -> PromptEncoder:
        """Return what makes prompts of rows; no weights are loaded."""
        return PromptEncoder(
            Tokenizer.from_file(artifact.tokenizer_path),
            self.settings,
            chat_template=artifact.chat_template,
            max_tokens=self.settings.max_prompt(artifact.config.max_position_embeddings),
        )

    def check(self, artifact: Artifact) -> None:
        """Compare the settings with the model; no weights are loaded."""
        self._constraint(artifact, self.encoder(artifact))

    def with_schema(self, schema: Mapping[str, Any] | type) -> "GemmaGenerateModelHandler":
        """Return a handler alike, whose completions are JSON of a schema.

        Args:
            schema: JSON Schema, or a class with `model_json_schema`, such as a Pydantic model.

        Raises:
            OptionsError: the settings ask for structured output already, or the schema cannot be
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

    def _constraint(self, artifact: Artifact, encoder: PromptEncoder) -> Constraint | None:
        return constraint_of(self.settings, encoder.tokenizer, artifact.eos_token_ids)

    def _load(self, artifact: Artifact, device: Device) -> Generator:
        encoder = self.encoder(artifact)
        constraint = self._constraint(artifact, encoder)
        if constraint is not None:
            # What the first one takes seconds to make is made before any row waits for it.
            constraint.start()
        engine = start_engine(artifact, self.head, device, self._limits)
        on_result = FirstRow(METER.add, engine.pulse.note_first_row)
        return Generator(engine, encoder, self.settings, constraint=constraint, on_result=on_result)


class GemmaClassifyModelHandler(EngineHandler):
    """Classifies examples with a Gemma model, such as ShieldGemma."""

    head: Head = "score"
    settings: ClassifySettings | ModerateSettings

    def encoder(self, artifact: Artifact) -> Encoder:
        """Return what makes the first prompt of rows; no weights are loaded."""
        encode = self._encoders(artifact)[0]
        return lambda row: encode(row).prompt

    def asks(self, artifact: Artifact) -> Callable[[Row], Asked]:
        """Return what tells what the model computes of a row; no weights are loaded."""
        encoders = self._encoders(artifact)

        def asks(row: Row) -> Asked:
            questions = [encode(row) for encode in encoders]
            return Asked(
                prompts=tuple(question.prompt for question in questions),
                sequences=tuple(
                    path.token_ids for question in questions for path in question.plan.paths
                ),
            )

        return asks

    def _identify(self, artifact: Artifact) -> Callable[[Row], Any]:
        encoders = self._encoders(artifact)
        return lambda row: [encode(row).identity for encode in encoders]

    def _load(self, artifact: Artifact, device: Device) -> Classifier:
        encoders = self._encoders(artifact)
        engine = start_engine(artifact, self.head, device, self._limits)
        on_result = FirstRow(METER.add, engine.pulse.note_first_row)
        return Classifier(engine, encoders, self.settings, on_result=on_result)

    def _encoders(self, artifact: Artifact) -> list[QuestionEncoder]:
        tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
        return [
            QuestionEncoder(
                tokenizer,
                question,
                chat_template=artifact.chat_template,
                max_model_len=artifact.config.max_position_embeddings,
            )
            for question in self.settings.questions
        ]


class GemmaEmbedModelHandler(TaskHandler):
    """Embeds examples with a Gemma model, such as EmbeddingGemma."""

    token_counters: ClassVar[Mapping[str, str]] = {"num_tokens": "prompt_tokens"}
    head: Head = "embed"
    settings: EmbedSettings

    def __init__(
        self,
        model: str,
        settings: EmbedSettings | None = None,
        *,
        device: DeviceChoice = "auto",
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float | None = None,
        large_model: bool = True,
    ) -> None:
        """Describe a model and what to embed; of its folder only the manifest is read.

        Args:
            model: Folder that `python -m export` wrote, on this machine or on gs://.
            settings: What to embed.
            device: `auto` is CUDA where the model and the machine have it, else the CPU.
            max_num_batched_tokens: Tokens of one step; None for what suits the device.
            gpu_memory_utilization: Share of a GPU's memory to use; None for most of it.
            large_model: Whether the processes of a machine share one model.

        Raises:
            ArtifactError: the folder is missing, damaged, or not for embeddings.
            OptionsError: the model's embeddings cannot be cut as asked.
        """
        # The type of a result holds its width, which only the model knows.
        artifact = open_description(model)
        _embedding_of(artifact)
        size = next(s.embedding_size for (h, _), s in artifact.signatures.items() if h == "embed")
        settings = (settings or EmbedSettings()).of_size(size)
        super().__init__(model, settings, device=device, large_model=large_model)
        limits = {
            "max_num_batched_tokens": max_num_batched_tokens,
            "gpu_memory_utilization": gpu_memory_utilization,
        }
        self._limits = _limits_of(device, limits)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(model={self._model!r}, device={self._device!r}, "
            f"{self._limits!r})"
        )

    def encoder(self, artifact: Artifact) -> TextEncoder:
        """Return what makes token ids of rows; no weights are loaded."""
        tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
        return TextEncoder(tokenizer, self.settings, _embedding_of(artifact))

    def _load(self, artifact: Artifact, device: Device) -> Embedder:
        encoder = self.encoder(artifact)
        budget = self._limits.embed_tokens(device)
        session = open_session(artifact, self.head, device, self._limits)
        check_sight(
            session,
            encoder.tokenizer.encode([Text(SIGHT_TEXT)], add_bos=False)[:3],
            is_two_sided=artifact.config.use_bidirectional_attention,
        )
        pulse = Pulse(device, stats=session.stats)

        def on_step(num_tokens: int) -> None:
            METER.add(Count(prompt_tokens=num_tokens))
            # One text may have more tokens than a step is meant to have.
            slots = max(num_tokens, budget)
            pulse.add(Work(prompt_tokens=num_tokens, used_slots=num_tokens, slots=slots))

        steps = EmbeddingSteps(
            session,
            max_num_batched_tokens=budget,
            max_num_seqs=num_texts(budget) if device == "cuda" else None,
            on_step=on_step,
        )
        on_result = FirstRow(METER.add, pulse.note_first_row)
        return Embedder(steps, encoder, self.settings, pulse=pulse, on_result=on_result)


def _embedding_of(artifact: Artifact) -> EmbeddingConfig:
    if artifact.embedding is None:
        raise ArtifactError(
            f"{artifact.path}: expected a graph to embed, got none; export the model again with "
            "--tasks embed"
        )
    return artifact.embedding


def start_engine(artifact: Artifact, head: Head, device: Device, limits: Limits) -> Engine:
    """Load a model folder's graph and start an engine over it."""
    session = open_session(artifact, head, device, limits)
    config = dataclasses.replace(limits.engine_config(device), eos_token_ids=artifact.eos_token_ids)
    return Engine(session, config, on_step=METER.add, device_stats=session.stats)


def _limits_of(device: DeviceChoice, given: Mapping[str, Any]) -> Limits:
    """Return limits, unless the device that was asked for has no use for them."""
    limits = Limits(**given)
    if device != "auto":
        limits.check(device)
    elif all(getattr(limits, name) is None for name in FOR_CUDA):
        limits.check("cpu")
    return limits


def __getattr__(name: str) -> Any:
    """Find the handler under its name of version 0.7."""
    return moved.attribute(__name__, name)
