"""Open a model folder for a task: encoders, which need no weights, and loaded models.

This module does not use Beam.

Example:
    >>> from beam_gemma.engine.sampling import SamplingParams
    >>> from beam_gemma.model.artifact import Artifact
    >>> sampling = SamplingParams(max_tokens=4)
    >>> settings = GenerateSettings(prompt="{title} is about", sampling=sampling)
    >>> generator = open_generator(Artifact.open(MODEL), settings, "cpu")
    >>> [result] = generator([{"title": "Bread"}])
    >>> result["num_completion_tokens"] <= 4
    True
"""

import dataclasses

from beam_gemma.engine.embedding_engine import EmbeddingSteps, check_sight
from beam_gemma.engine.engine import Engine
from beam_gemma.engine.media_store import MediaStore, check_encoder
from beam_gemma.engine.sequence import Picture
from beam_gemma.errors import ArtifactError, OptionsError
from beam_gemma.inputs.decoder_prompt import Decoder
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.embedding_config import EmbeddingConfig
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.model.vision_config import VisionConfig
from beam_gemma.monitoring.progress import METER, Count
from beam_gemma.monitoring.startup_log import FirstRow
from beam_gemma.monitoring.timeline import Pulse, Work
from beam_gemma.runtime.limits import Limits
from beam_gemma.runtime.open_session import open_session
from beam_gemma.runtime.sound_session import SoundSession
from beam_gemma.runtime.step_shapes import num_texts
from beam_gemma.runtime.vision_session import VisionSession
from beam_gemma.structured.constraint import Constraint
from beam_gemma.tasks.classify import Classifier
from beam_gemma.tasks.embed import Embedder
from beam_gemma.tasks.generate import GenerateSettings, Generator, check_boxes, constraint_of
from beam_gemma.tasks.media_requests import MediaDecoder
from beam_gemma.tasks.moderate import ModerateSettings
from beam_gemma.tasks.questions import ClassifySettings, QuestionEncoder
from beam_gemma.tasks.text_encoder import EmbedSettings, TextEncoder
from beam_gemma.tasks.thoughts import check_thinking

SIGHT_TEXT = "one two three"
"""Text for `check_sight`; its first three tokens differ, be they words or letters."""


def prompt_encoder(artifact: Artifact, settings: GenerateSettings) -> PromptEncoder:
    """Return the encoder that turns rows into prompts.

    Raises:
        ArtifactError: the tokenizer is missing or damaged.
        OptionsError: the model does not support the settings.
    """
    tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
    check_boxes(settings, tokenizer)
    if settings.thinking:
        check_thinking(tokenizer, settings.chat_template or artifact.chat_template)
    room = settings.max_prompt(artifact.config.max_position_embeddings)
    return PromptEncoder(
        tokenizer,
        settings,
        chat_template=artifact.chat_template,
        max_tokens=_prompt_limit(artifact, "generate", room),
        vision=artifact.vision,
        sound=artifact.sound,
        vocab_size=artifact.reader.vocab_size,
        decoder=_decoder(artifact, room),
        enable_thinking=settings.thinking,
        tools=settings.openai_tools,
    )


def _prompt_limit(artifact: Artifact, head: Head, room: int) -> int:
    """Return the longest prompt in tokens, on whatever device it runs.

    Args:
        artifact: The model folder.
        head: Head of the graph that reads it, or whose encoder does.
        room: Tokens that the decoder has for it, if there is no encoder.
    """
    if artifact.encoder is None:
        return room
    limits = [s.max_source_len for (of, _), s in artifact.signatures.items() if of == head]
    return min([*limits, artifact.encoder.max_position_embeddings])


def _decoder(artifact: Artifact, max_tokens: int) -> Decoder | None:
    """Return what prompts depend on of a decoder whose source an encoder reads, else None."""
    if artifact.encoder is None:
        return None
    return Decoder(model_type=artifact.config.model_type, max_tokens=max_tokens)


def constraint(
    artifact: Artifact, settings: GenerateSettings, encoder: PromptEncoder
) -> Constraint | None:
    """Return the constraint for the requested structured output, or None if there is none.

    Raises:
        OptionsError: `max_tokens` is too small for any valid output.
    """
    return constraint_of(settings, encoder.tokenizer, artifact.eos_token_ids)


def question_encoders(
    artifact: Artifact, settings: ClassifySettings | ModerateSettings
) -> list[QuestionEncoder]:
    """Return the encoders of a task's questions, one per question.

    Raises:
        ArtifactError: the tokenizer is missing or damaged.
        OptionsError: the model does not support the settings.
    """
    if artifact.encoder is not None and isinstance(settings, ModerateSettings):
        raise OptionsError(
            f"policies: expected a model such as ShieldGemma, which knows them, got an "
            f"encoder-decoder of type {artifact.config.model_type}; pass labels of your own"
        )
    tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
    room = artifact.config.max_position_embeddings
    return [
        QuestionEncoder(
            tokenizer,
            question,
            chat_template=artifact.chat_template,
            max_model_len=_prompt_limit(artifact, "score", room),
            vision=artifact.vision,
            sound=artifact.sound,
            vocab_size=artifact.reader.vocab_size,
            decoder=_decoder(artifact, room),
        )
        for question in settings.questions_for(artifact.chat_template)
    ]


def text_encoder(artifact: Artifact, settings: EmbedSettings) -> TextEncoder:
    """Return the encoder that turns rows into texts to embed.

    Raises:
        ArtifactError: the tokenizer is missing or damaged, or the model has no embedding graph.
        OptionsError: the model does not support the settings.
    """
    embedding, vision = embedding_of(artifact), embedded_vision(artifact)
    if vision is None and settings.image_columns:
        raise OptionsError(
            f"image_columns: expected a model that embeds pictures, such as EmbeddingGemma 2, for "
            f"{', '.join(settings.image_columns)}, got {artifact.path}, which embeds texts alone"
        )
    return TextEncoder(
        Tokenizer.from_file(artifact.tokenizer_path),
        settings,
        embedding,
        vision=vision,
        vocab_size=artifact.reader.vocab_size,
    )


def embedded_vision(artifact: Artifact) -> VisionConfig | None:
    """Return what a model says of the pictures that it embeds; None if it embeds texts alone."""
    signatures = (s for (head, _), s in artifact.signatures.items() if head == "embed")
    takes = any("inputs_embeds" in signature.optional_inputs for signature in signatures)
    return artifact.vision if takes else None


def embedding_of(artifact: Artifact) -> EmbeddingConfig:
    """Return the embedding configuration of a model.

    Raises:
        OptionsError: no folder of such a model has an embedding graph.
        ArtifactError: the folder has no embedding graph.
    """
    if artifact.config.is_recurrent:
        raise OptionsError(
            "model: expected one that embeds texts, got a RecurrentGemma, whose layers do not read "
            "whole texts at once; take another Gemma"
        )
    if artifact.embedding is None:
        raise ArtifactError(
            f"{artifact.path}: expected a graph to embed, got none; export the model again with "
            "--tasks embed"
        )
    return artifact.embedding


def open_generator(
    artifact: Artifact, settings: GenerateSettings, device: Device, limits: Limits = Limits()
) -> Generator:
    """Load the generation graph and return a model that completes rows."""
    encoder = prompt_encoder(artifact, settings)
    held = constraint(artifact, settings, encoder)
    if held is not None:
        # The first mask takes seconds to prepare, so start before any row waits for it.
        held.start()
    has_media = bool(settings.media_columns)
    engine = start_engine(artifact, "generate", device, limits, has_media=has_media)
    on_result = FirstRow(METER.add, engine.pulse.note_first_row)
    return Generator(
        engine,
        encoder,
        settings,
        constraint=held,
        vision=artifact.vision,
        sound=artifact.sound,
        on_result=on_result,
    )


def open_classifier(
    artifact: Artifact,
    settings: ClassifySettings | ModerateSettings,
    device: Device,
    limits: Limits = Limits(),
) -> Classifier:
    """Load the scoring graph and return a model that classifies rows."""
    encoders = question_encoders(artifact, settings)
    has_media = bool(settings.media_columns)
    engine = start_engine(artifact, "score", device, limits, has_media=has_media)
    on_result = FirstRow(METER.add, engine.pulse.note_first_row)
    return Classifier(
        engine,
        encoders,
        settings,
        vision=artifact.vision,
        sound=artifact.sound,
        on_result=on_result,
    )


def open_embedder(
    artifact: Artifact, settings: EmbedSettings, device: Device, limits: Limits = Limits()
) -> Embedder:
    """Load the embedding graph and return a model that embeds rows.

    Raises:
        ArtifactError: the graph's attention direction differs from its model's.
    """
    encoder = text_encoder(artifact, settings)
    budget = limits.embed_tokens(device)
    store = _embedded_pictures(artifact, settings, device)
    session = open_session(artifact, "embed", device, limits)
    check_sight(
        session,
        encoder.tokenizer.encode([Text(SIGHT_TEXT)], add_bos=False)[:3],
        is_two_sided=artifact.reader.use_bidirectional_attention,
    )
    pulse = Pulse(device, stats=session.stats)

    def on_step(num_tokens: int) -> None:
        METER.add(Count(prompt_tokens=num_tokens))
        # A single text may have more tokens than the token budget of a step.
        slots = max(num_tokens, budget)
        pulse.add(Work(prompt_tokens=num_tokens, used_slots=num_tokens, slots=slots))

    steps = EmbeddingSteps(
        session,
        max_num_batched_tokens=budget,
        max_num_seqs=num_texts(budget) if device == "cuda" else None,
        on_step=on_step,
        media=store,
    )
    on_result = FirstRow(METER.add, pulse.note_first_row)
    vision = None if store is None else artifact.vision
    return Embedder(
        steps,
        encoder,
        settings,
        pictures=None if vision is None else MediaDecoder(vision, None, settings),
        pulse=pulse,
        on_result=on_result,
    )


def _embedded_pictures(
    artifact: Artifact, settings: EmbedSettings, device: Device
) -> MediaStore | None:
    """Return the embeddings of pictures for an embedding graph; None if no row has pictures.

    On a GPU the graph of pictures is loaded here, and otherwise with the first picture.
    """
    if not settings.image_columns:
        return None
    tower = VisionSession.of(artifact, device)
    check_encoder(tower.signature, artifact.signature("embed", device))
    if device == "cuda":
        tower.load()
    return MediaStore({Picture: tower})


def start_engine(
    artifact: Artifact, head: Head, device: Device, limits: Limits, *, has_media: bool = True
) -> Engine:
    """Load a graph of a model folder and start an engine that runs it.

    The graphs of pictures and of sounds, if there are any, are loaded with the first of these. On a
    GPU, where the decoder's caches take what memory is left, they are loaded before the decoder,
    and so is the encoder of an encoder-decoder. On the CPU caches leave room for the weights of
    all.

    Args:
        artifact: The model folder.
        head: Head of the graph.
        device: Device that runs it.
        limits: Limits on steps and memory.
        has_media: Whether rows may have pictures or sounds.
    """
    limits = limits.for_pictures(artifact.vision, device)
    has_tower = artifact.vision is not None and ("vision", device) in artifact.signatures
    vision = VisionSession.of(artifact, device) if has_tower else None
    has_ears = artifact.sound is not None and ("sound", device) in artifact.signatures
    sound = SoundSession.of(artifact, device) if has_ears else None
    for each in (vision, sound):
        if each is not None and device == "cuda" and has_media:
            each.load()
    encoder = None
    if artifact.encoder is not None and device == "cuda":
        encoder = open_session(artifact, "encode", device, limits)
    session = open_session(artifact, head, device, limits)
    if artifact.encoder is not None and device == "cpu":
        encoder = open_session(artifact, "encode", device, limits)
    config = dataclasses.replace(limits.engine_config(device), eos_token_ids=artifact.eos_token_ids)
    return Engine(
        session,
        config,
        vision=vision,
        sound=sound,
        encoder=encoder,
        on_step=METER.add,
        device_stats=session.stats,
    )
