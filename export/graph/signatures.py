"""Signatures of exported models: the inputs, state and outputs of each graph."""

from beam_gemma.errors import ArtifactError
from beam_gemma.model.config import FULL, SLIDING, GemmaConfig
from beam_gemma.model.graph_tensors import Device, Head, PagedState
from beam_gemma.model.signature import Signature, block_size_for
from beam_gemma.model.vision_config import VisionConfig

MAX_HEAD_DIM = 256
"""Most channels that one query-key product sums at once on the CPU; see `CONTEXT_ALIGNMENT`."""


def decoder_signature(
    config: GemmaConfig,
    *,
    device: Device,
    dtype: str,
    head: Head = "generate",
    vision: VisionConfig | None = None,
) -> Signature:
    """Return the signature of a decoder, with one group of paged layers per layer type.

    Args:
        config: The decoder.
        device: Device of the graph.
        dtype: Dtype of matrices and caches.
        head: Head of the graph.
        vision: The tower of a model that takes pictures; its decoder then takes embeddings of them.
    """
    _check_head_dim(config, device)
    states = tuple(
        PagedState(
            group=group,
            layers=config.layers_of(group),
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            sliding_window=config.window(group),
        )
        for group in (FULL, SLIDING)
        if config.layers_of(group)
    )
    return Signature(
        head=head,
        device=device,
        dtype=dtype,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_model_len=config.max_position_embeddings,
        states=states,
        block_size=block_size_for(device, config.head_dim),
        optional_inputs=_optional_inputs(config, device, vision),
    )


def vision_signature(
    config: GemmaConfig, vision: VisionConfig, *, device: Device, dtype: str
) -> Signature:
    """Return the signature of the tower of a decoder."""
    return Signature(
        head="vision",
        device=device,
        dtype=dtype,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_model_len=config.max_position_embeddings,
        states=(),
        image_size=vision.image_size,
        num_image_tokens=vision.num_image_tokens,
    )


def encoder_signature(
    config: GemmaConfig, *, device: Device, dtype: str, embedding_size: int, max_model_len: int
) -> Signature:
    """Return the signature of a model that returns one embedding per text."""
    _check_head_dim(config, device)
    return Signature(
        head="embed",
        device=device,
        dtype=dtype,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_model_len=max_model_len,
        states=(),
        embedding_size=embedding_size,
    )


def _optional_inputs(
    config: GemmaConfig, device: Device, vision: VisionConfig | None
) -> tuple[str, ...]:
    """Return the optional inputs of a decoder, in the order of `OPTIONAL_INPUTS`."""
    names = ["inputs_embeds", "span_ends"] if vision is not None else []
    # On CUDA, each kind of reach is an attention of its own, so that none is input.
    is_wide = vision is not None and vision.bidirectional == "prefix" and SLIDING in config.groups
    if is_wide and device == "cpu":
        names.append("first_keys")
    return (*names, "position_ids") if device == "cuda" else tuple(names)


def _check_head_dim(config: GemmaConfig, device: Device) -> None:
    if device == "cpu" and config.head_dim > MAX_HEAD_DIM:
        raise ArtifactError(
            f"head_dim: expected at most {MAX_HEAD_DIM} on the CPU, got {config.head_dim}"
        )
