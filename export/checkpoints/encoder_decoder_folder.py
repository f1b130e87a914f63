"""Reads what a Hugging Face folder of a T5Gemma or a T5Gemma 2 has beside that of a decoder."""

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from beam_gemma.errors import CheckpointError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.encoder_decoder_config import picture_settings, start_token_id
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.model.vision_config import VisionConfig
from export.checkpoints.sidecar_files import read_optional_json
from export.checkpoints.tensors import (
    EMBEDDING,
    ENCODER,
    EOI,
    HEAD,
    StoredTensor,
    without_copy,
    without_head,
)
from export.checkpoints.vision_folder import check_markers, read_vision
from export.checkpoints.vision_tensors import is_of_pictures, vision_name

CLASSIFIER = "score."
"""Start of the names of a classifier's head."""
DECODER = "decoder."
OWN_HEADS = ("lm_head.out_proj.weight", HEAD)
NORMS = {
    ".pre_self_attn_layernorm.": ".input_layernorm.",
    ".post_self_attn_layernorm.": ".post_attention_layernorm.",
}
"""Names of norms in each layer, and those of Gemma 2 and 3."""
SHARED = {"embed_tokens.weight": EMBEDDING, "embed_tokens.eoi_embedding": EOI}
"""What encoder and decoder share in T5Gemma 2, and our names for it."""


def stack_name(name: str, model_type: str) -> str | None:
    """Return our name of a Hugging Face tensor, or None if no graph needs it.

    The decoder's have no prefix, and the encoder's have `encoder.`. What the two share in T5Gemma 2
    has the name of the encoder's; a copy in the decoder keeps its prefix, for `without_copies`.
    """
    if name in OWN_HEADS:
        return HEAD
    name = name.removeprefix("model.")
    is_shared = model_type == "t5gemma2"
    inner = name.removeprefix(ENCODER)
    if is_shared and is_of_pictures(inner):
        return vision_name(inner)
    if name.startswith(ENCODER) and is_shared:
        inner = inner.removeprefix("text_model.")
        return SHARED[inner] if inner in SHARED else ENCODER + _layer_name(inner)
    if name.startswith(DECODER):
        own = name.removeprefix(DECODER)
        return DECODER + SHARED[own] if is_shared and own in SHARED else _layer_name(own)
    return _layer_name(name)


def _layer_name(name: str) -> str:
    for theirs, ours in NORMS.items():
        name = name.replace(theirs, ours)
    return name


def without_copies(
    tensors: Mapping[str, StoredTensor], config: GemmaConfig
) -> dict[str, StoredTensor]:
    """Return the tensors of a model without those that must equal another.

    Raises:
        CheckpointError: two of them are not equal, or the model is a classifier.
    """
    for name, stored in tensors.items():
        if name.startswith(CLASSIFIER):
            raise CheckpointError(
                f"checkpoint: expected a {config.model_type} model with a head for tokens, got "
                f"{stored.name}, the head of a classifier; export the model that it was made from"
            )
    rest = dict(tensors)
    for shared in SHARED.values() if config.model_type == "t5gemma2" else ():
        if shared not in rest and DECODER + shared in rest:
            rest[shared] = rest.pop(DECODER + shared)
        reason = "since the encoder and the decoder share it"
        rest = without_copy(rest, DECODER + shared, shared, reason)
    return without_head(rest) if config.tie_word_embeddings else rest


def check_start(folder: Path, raw: Mapping[str, Any], tokenizer_model: Callable[[], bytes]) -> None:
    """Check that a decoder starts with the tokenizer's `<bos>`.

    Raises:
        CheckpointError: `generation_config.json` or the tokenizer names another token.
    """
    expected = start_token_id(raw)
    found = Tokenizer(tokenizer_model()).bos_token_id
    given = read_optional_json(folder, "generation_config.json")
    keys = ("decoder_start_token_id", "bos_token_id")
    ids = [found, *(given[key] for key in keys if given.get(key) is not None)]
    if any(token_id != expected for token_id in ids):
        raise CheckpointError(
            f"{folder}: expected {expected}, the bos_token_id of config.json, as that of the "
            "tokenizer and as the decoder_start_token_id of generation_config.json, got "
            f"{reprlib.repr(ids)}"
        )


def read_pictures(
    folder: Path, raw: Mapping[str, Any], tokenizer_model: Callable[[], bytes]
) -> VisionConfig:
    """Read the tower of a T5Gemma 2, which its encoder has.

    Raises:
        CheckpointError: a file is damaged, or the tokenizer has other pieces around a picture.
        ConfigError: a setting is missing, unknown or not supported.
    """
    settings = picture_settings(raw)
    vision = read_vision(folder, settings)
    check_markers(folder, vision, settings, tokenizer_model)
    return vision
