"""Tiny T5Gemma and T5Gemma 2: transformers' own classes with random weights.

Windows are smaller than the sequences, both softcaps leave a trace, the encoder of a T5Gemma has
another width than its decoder, and a T5Gemma 2 has a tower whose pictures take 16 tokens. One more
T5Gemma has a head of its own.
"""

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.graph_tensors import Device
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.tensors import Checkpoint
from export.graph.signatures import decoder_signature, source_signature
from export.graph.weights import inverse_frequencies
from export.modules.decoder import GemmaLayers
from export.modules.encoder_decoder import SourceDecoder
from export.modules.source_encoder import SourceEncoder
from tests.doubles.once import exporter_digest, kept
from tests.doubles.reference import FULL, ROPE, SLIDING, draw_weights, float64_throughout
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model
from tests.doubles.vision_models import (
    BEGIN_ID,
    END_ID,
    GEMMA3_MARKERS,
    NUM_IMAGE_TOKENS,
    SOFT_ID,
    TOWER,
    drawn,
    preprocessor_settings,
    tokenizer_settings,
)

MODELS = ("t5gemma", "t5gemma_untied", "t5gemma2")
VOCAB = {"t5gemma": 300, "t5gemma_untied": 300, "t5gemma2": 320}
WINDOWS = {"encoder": 5, "decoder": 6}
"""In tokens; odd in the encoder, so that a T5Gemma 2 sees fewer tokens behind than half of it."""
MAX_LENGTH = 192
ENCODER_WIDTH, DECODER_WIDTH = 64, 96
TASKS = {
    "t5gemma": ("generate", "classify", "embed"),
    "t5gemma_untied": ("generate", "classify"),
    "t5gemma2": ("generate", "classify", "embed"),
}
_STACK: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 9,
    "max_position_embeddings": MAX_LENGTH,
}
_SPECIAL = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
_T5GEMMA: dict[str, Any] = {
    **_STACK,
    **_SPECIAL,
    "vocab_size": VOCAB["t5gemma"],
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 2.0,
}
_T5GEMMA2: dict[str, Any] = {
    **_STACK,
    **_SPECIAL,
    "hidden_size": ENCODER_WIDTH,
    "intermediate_size": 96,
    "vocab_size": VOCAB["t5gemma2"],
    "rope_parameters": ROPE,
}


def model_config(name: str) -> Any:
    """Return transformers' configuration of one of `MODELS`, with eager attention throughout."""
    if name == "t5gemma2":
        config = transformers.T5Gemma2Config(
            encoder={
                "text_config": {
                    **_T5GEMMA2,
                    "num_hidden_layers": 2,
                    "sliding_window": WINDOWS["encoder"],
                    "layer_types": [SLIDING, FULL],
                },
                "vision_config": {**TOWER, "image_size": 56},
                "mm_tokens_per_image": NUM_IMAGE_TOKENS,
                "boi_token_index": BEGIN_ID,
                "eoi_token_index": END_ID,
                "image_token_index": SOFT_ID,
            },
            decoder={
                **_T5GEMMA2,
                "num_hidden_layers": 2,
                "sliding_window": WINDOWS["decoder"],
                "layer_types": [SLIDING, FULL],
                "final_logit_softcapping": 2.0,
            },
            image_token_index=SOFT_ID,
        )
    else:
        config = transformers.T5GemmaConfig(
            encoder={
                **_T5GEMMA,
                "hidden_size": ENCODER_WIDTH,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "sliding_window": WINDOWS["encoder"],
            },
            decoder={
                **_T5GEMMA,
                "hidden_size": DECODER_WIDTH,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "sliding_window": WINDOWS["decoder"],
            },
            vocab_size=VOCAB["t5gemma"],
            tie_word_embeddings=name == "t5gemma",
        )
    config._attn_implementation = "eager"
    return config


def tiny_encoder_decoder(name: str) -> torch.nn.Module:
    """Return one of `MODELS` in float32, weights drawn by parameter name.

    Embeddings are small: with a tied head, the likeliest token after a large one is the token
    itself, whatever the source is.
    """
    if name == "t5gemma2":
        model = drawn(transformers.T5Gemma2ForConditionalGeneration(model_config(name)))
    else:
        model = draw_weights(transformers.T5GemmaForConditionalGeneration(model_config(name)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("embed_tokens.weight"):
                parameter.mul_(0.05)
    return model


def save_encoder_decoder(
    model: torch.nn.Module,
    folder: Path,
    *,
    chat_template: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model as a Hugging Face folder, as it is published.

    Args:
        model: One of `tiny_encoder_decoder`.
        folder: Folder to write.
        chat_template: Content of `chat_template.jinja`; None for none.
        dtype: Type of the numbers; None for that of the model.
    """
    config: Any = model.config
    has_tower = config.model_type == "t5gemma2"
    model.save_pretrained(folder)
    if dtype is not None:
        tensors = {n: t.detach().to(dtype).contiguous() for n, t in model.named_parameters()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    markers = GEMMA3_MARKERS if has_tower else ()
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model(markers))
    if has_tower:
        for file, content in (
            ("preprocessor_config.json", preprocessor_settings("gemma3")),
            ("tokenizer_config.json", tokenizer_settings("gemma3")),
        ):
            (folder / file).write_text(json.dumps(content))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


@dataclass(frozen=True)
class TinyPair:
    """One of `MODELS`: the reference, its checkpoint and what we made of it."""

    name: str
    reference: torch.nn.Module
    checkpoint: Checkpoint

    @property
    def artifact(self) -> Artifact:
        """The export for the CPU with the model's `TASKS`."""
        return _artifact(self.name)


@functools.cache
def tiny_pair(name: str) -> TinyPair:
    """Return one of `MODELS`; its export is made once for an exporter, when it is asked for."""
    reference = tiny_encoder_decoder(name)
    folder = kept(
        f"tiny-{name}-checkpoint-{exporter_digest()}",
        lambda folder: save_encoder_decoder(reference, folder),
    )
    return TinyPair(name=name, reference=reference, checkpoint=read_checkpoint(folder))


@functools.cache
def _artifact(name: str) -> Artifact:
    checkpoint = tiny_pair(name).checkpoint.path
    folder = kept(
        f"tiny-{name}-{exporter_digest()}",
        lambda folder: export(checkpoint, folder, tasks=TASKS[name]),
    )
    return Artifact.open(folder)


def source_encoder(pair: TinyPair, dtype: torch.dtype) -> SourceEncoder:
    """Return our encoder with the checkpoint's weights."""
    encoder = pair.checkpoint.encoder
    assert encoder is not None
    signature = source_signature(
        encoder, device="cpu", dtype="float32", vision=pair.checkpoint.vision
    )
    module = SourceEncoder(encoder, signature)
    _load(module, pair, encoder, dtype, lambda name: module.stored_name(name))
    _widen_factor(module.encoder, dtype)
    return module


def source_decoder(pair: TinyPair, dtype: torch.dtype, *, device: Device = "cpu") -> SourceDecoder:
    """Return our decoder with the checkpoint's weights."""
    config = pair.checkpoint.config
    signature = decoder_signature(
        config, device=device, dtype="float32", encoder=pair.checkpoint.encoder
    )
    module = SourceDecoder(config, signature)
    _load(module, pair, config, dtype, lambda name: name)
    _widen_factor(module, dtype)
    return module


def _load(
    module: torch.nn.Module,
    pair: TinyPair,
    config: GemmaConfig,
    dtype: torch.dtype,
    stored_name: Callable[[str], str],
) -> None:
    module.to(dtype)
    state = {}
    for name in module.state_dict():
        if name.endswith("inv_freq"):
            values = inverse_frequencies(config, name.split(".")[-2]).astype(np.float64)
        else:
            stored = pair.checkpoint.tensors[stored_name(name)]
            values = np.concatenate(list(stored.chunks())).astype(np.float64)
        state[name] = torch.from_numpy(values + (1 if name.endswith("norm.weight") else 0))
    module.load_state_dict(state, strict=True)
    module.eval()


def _widen_factor(layers: GemmaLayers, dtype: torch.dtype) -> None:
    """Take the root of the width in float64, as a T5Gemma in float64 does."""
    if dtype == torch.float64 and layers.config.model_type == "t5gemma":
        layers.embedding_factor = layers.config.hidden_size**0.5


@torch.no_grad()
def encoder_decoder_outputs(
    model: torch.nn.Module, source: list[int], target: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the encoder's states [C, U] and the logits [T, V], both computed in one pass."""
    is_double = next(model.parameters()).dtype == torch.float64
    with float64_throughout() if is_double else contextlib.nullcontext():
        # Without a mask, a T5Gemma takes the id of padding for padding.
        outputs = model(
            input_ids=torch.tensor([source]),
            attention_mask=torch.ones(1, len(source), dtype=torch.long),
            decoder_input_ids=torch.tensor([target]),
            decoder_attention_mask=torch.ones(1, len(target), dtype=torch.long),
            use_cache=False,
        )
    return outputs.encoder_last_hidden_state[0].numpy(), outputs.logits[0].numpy()
