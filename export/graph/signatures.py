"""Signatures of exported models: the inputs, state and outputs of each graph."""

from beam_gemma.errors import ArtifactError
from beam_gemma.model.config import FULL, SLIDING, GemmaConfig
from beam_gemma.model.graph_tensors import Device, Head, PagedState
from beam_gemma.model.signature import Signature, block_size_for

MAX_HEAD_DIM = 256
"""Most channels that one query-key product sums at once on the CPU; see `CONTEXT_ALIGNMENT`."""


def decoder_signature(
    config: GemmaConfig, *, device: Device, dtype: str, head: Head = "generate"
) -> Signature:
    """Return the signature of a text decoder, with one group of paged layers per layer type."""
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
        optional_inputs=("position_ids",) if device == "cuda" else (),
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


def _check_head_dim(config: GemmaConfig, device: Device) -> None:
    if device == "cpu" and config.head_dim > MAX_HEAD_DIM:
        raise ArtifactError(
            f"head_dim: expected at most {MAX_HEAD_DIM} on the CPU, got {config.head_dim}"
        )
