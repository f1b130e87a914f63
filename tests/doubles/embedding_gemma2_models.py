"""Tiny EmbeddingGemma 2: transformers' own classes with random weights, in the form of the release.

Windows are smaller than the texts and than pictures, full layers have larger heads than those with
a window, and the folder has towers for pictures and sound beside the text model, as the published
one does.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.tensors import Checkpoint
from export.graph.tasks import graph_module, graph_signature
from export.graph.weights import inverse_frequencies
from tests.doubles.checkpoint_files import values
from tests.doubles.gemma4_models import draw_newer
from tests.doubles.gemma4_seeing import (
    IMAGE_PROCESSOR,
    MARKER_IDS,
    MARKERS,
    TOWER,
    VOCAB,
    draw_towers,
    padded_pictures,
)
from tests.doubles.once import exporter_digest, kept
from tests.doubles.reference import FULL, SHAPE, SLIDING, draw_weights, float64_throughout
from tests.doubles.sentence_model import tokenizer
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

RADIUS = 12
"""Positions on each side that a layer with a window attends to."""
WIDTH = 160
"""Of an embedding."""
TEXT: dict[str, Any] = {
    **SHAPE,
    "vocab_size": VOCAB,
    "num_hidden_layers": 5,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL],
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "sliding_window": RADIUS,
    "hidden_size_per_layer_input": 24,
    "embedding_dim": WIDTH,
}
WIDE_HEADS: dict[str, Any] = {
    **TEXT,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": [SLIDING, FULL],
    "num_attention_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
}
"""The heads of the release, in fewer layers. The factor of its embeddings is 8 in every dtype."""
SHAPES = {"embedding_gemma2": TEXT, "embedding_gemma2_wide": WIDE_HEADS}
_TOWERS: dict[str, dict[str, Any]] = {
    "vision_config": {**TOWER, "use_clipped_linears": True},
    "audio_config": {
        "model_type": "gemma4_audio", "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "subsampling_conv_channels": [128, 4], "output_proj_dims": 24,
    },
}  # fmt: skip
CHAT_TEMPLATE = """\
{%- for msg in messages if msg.get('role') == 'system' -%}
  {%- if msg.get('content') is string -%}{{ msg['content'] }}{%- else -%}
    {%- for item in msg['content'] if item.get('type') == 'text' -%}{{ item['text'] }}{%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- for msg in messages if msg.get('role') != 'system' -%}
  {%- if msg.get('content') is string -%}{{ msg['content'] }}{%- else -%}
    {%- for item in msg['content'] -%}
      {%- if item.get('type') == 'text' -%}{{ item.text }}
      {%- elif item.get('type') == 'image' -%}<|image|>
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
"""
"""What the release's template does with messages, in short."""
PROMPTS = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "Document": "title: none | text: ",
    "Clustering": "task: clustering | query: ",
    "STS": "task: sentence similarity | query: ",
}
"""Some of the release's prompts."""


def text_model(name: str = "embedding_gemma2") -> torch.nn.Module:
    """Return a text model of `SHAPES` in float32, weights drawn by parameter name."""
    config = transformers.EmbeddingGemma2TextConfig(**SHAPES[name])
    model = transformers.EmbeddingGemma2TextModel._from_config(config, attn_implementation="eager")
    draw_weights(model)
    for number, layer in enumerate(model.layers):
        layer.layer_scalar.fill_(0.6 + 0.15 * number)  # 1 at first, which would hide it
    return model


def save_text(name: str, folder: Path, *, chat_template: str | None = None) -> SentenceTransformer:
    """Write a folder of the text model alone, and return the model that reads it.

    Args:
        name: One of `SHAPES`.
        folder: To make.
        chat_template: By which the tokenizer writes texts; None to take texts as they are.
    """
    base = folder / "base"
    text_model(name).save_pretrained(base)
    saved = tokenizer(SHAPE["max_position_embeddings"])
    saved.chat_template = chat_template
    saved.save_pretrained(base)
    model = SentenceTransformer(
        modules=[
            Transformer(str(base), model_kwargs={"attn_implementation": "eager"}),
            Pooling(WIDTH, "mean"),
            Normalize(),
        ],
        prompts=PROMPTS,
        device="cpu",
    )
    model.save(str(folder))
    shutil.rmtree(base)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model(MARKERS))
    return model


@functools.cache
def seeing_model(name: str = "embedding_gemma2", *, towers: bool = True) -> torch.nn.Module:
    """Return the whole model around a text model of `SHAPES`, in float32.

    Args:
        name: One of `SHAPES`.
        towers: Whether the model has what it needs for pictures and sound.
    """
    config = transformers.EmbeddingGemma2Config(
        text_config=SHAPES[name], **MARKER_IDS, **(_TOWERS if towers else {})
    )
    model = transformers.EmbeddingGemma2Model._from_config(config, attn_implementation="eager")
    draw_towers(draw_newer(model))
    model.language_model = text_model(name)
    return model


def save_release(name: str, folder: Path, *, towers: bool = True) -> SentenceTransformer:
    """Write a folder in the form of the release, and return a model with the same embeddings.

    That model takes texts as they are, since the release's processor needs packages for pictures.

    Args:
        name: One of `SHAPES`.
        folder: To make.
        towers: Whether the model has what it needs for pictures and sound.
    """
    reference = save_text(name, folder)
    seeing_model(name, towers=towers).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    del raw["text_config"]["model_type"]  # the published file has none
    raw["text_config"]["max_position_embeddings"] = 262_144
    (folder / "config.json").write_text(json.dumps(raw))
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    forward = settings["modality_config"]["text"]
    settings["modality_config"] |= dict.fromkeys(("image", "audio", "video"), forward)
    settings["modality_config"]["message"] = {**forward, "format": "structured"}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens["model_max_length"] = 1000000000000000019884624838656
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    processor = {
        "image_processor": IMAGE_PROCESSOR,
        "image_seq_length": 70,
        "processor_class": "EmbeddingGemma2Processor",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return reference


@dataclass(frozen=True)
class TinyEmbedder:
    """One of `SHAPES`: the reference, its checkpoint and what we made of it."""

    name: str
    reference: torch.nn.Module
    checkpoint: Checkpoint
    """The text model alone."""

    @property
    def artifact(self) -> Artifact:
        """The export of the text model alone for the CPU."""
        return Artifact.open(_artifact(self.name, text_only=True))

    @property
    def seeing(self) -> Artifact:
        """The export for the CPU with the tower of pictures."""
        return Artifact.open(_artifact(self.name, text_only=False))


@functools.cache
def tiny_embedder(name: str = "embedding_gemma2") -> TinyEmbedder:
    """Return one of `SHAPES`; its folder is written once for an exporter."""
    folder = kept(
        f"tiny-{name}-checkpoint-{exporter_digest()}",
        lambda folder: _written(save_release(name, folder)),
    )
    return TinyEmbedder(name, text_model(name), read_checkpoint(folder, text_only=True))


def _written(_: SentenceTransformer) -> None:
    """Return nothing for the model of a folder that is written."""


@functools.cache
def _artifact(name: str, *, text_only: bool) -> Path:
    checkpoint = tiny_embedder(name).checkpoint.path
    return kept(
        f"tiny-{name}-{'text' if text_only else 'seeing'}-{exporter_digest()}",
        lambda folder: export(checkpoint, folder, text_only=text_only),
    )


def encoder_module(
    tiny: TinyEmbedder, device: Device, dtype: torch.dtype, *, sees: bool = False
) -> torch.nn.Module:
    """Return our module with the checkpoint's weights.

    Args:
        tiny: The model.
        device: Device of the graph.
        dtype: Of all weights.
        sees: Whether texts may have pictures.
    """
    checkpoint = read_checkpoint(tiny.checkpoint.path) if sees else tiny.checkpoint
    config, embedding = checkpoint.config, checkpoint.embedding
    signature = graph_signature("embed", config, embedding, device, "float32", checkpoint.vision)
    module = graph_module(config, embedding, signature)
    names = set(module.state_dict())
    state = {n: torch.from_numpy(values(t)) for n, t in checkpoint.tensors.items() if n in names}
    for group in config.groups:
        frequencies = inverse_frequencies(config, group)
        state[f"rotary.{group}.inv_freq"] = torch.from_numpy(frequencies)
    module.load_state_dict(state, strict=True)
    return module.to(dtype).eval()


@torch.no_grad()
def token_states(model: torch.nn.Module, token_ids: Sequence[int]) -> np.ndarray:
    """Return the reference's projected state of each token [T, W]."""
    is_double = next(model.parameters()).dtype == torch.float64
    with float64_throughout() if is_double else contextlib.nullcontext():
        return model(torch.tensor([list(token_ids)])).last_hidden_state[0].numpy()


@torch.no_grad()
def seen_states(
    model: torch.nn.Module, token_ids: Sequence[int], pixels: Sequence[np.ndarray]
) -> np.ndarray:
    """Return the reference's projected state of each token [T, W] of a text with pictures.

    Args:
        model: A `seeing_model`.
        token_ids: The tokens of the text.
        pixels: [3, I, J] uint8 of each picture, whose tokens have the id of `MARKER_IDS`.
    """
    is_double = next(model.parameters()).dtype == torch.float64
    with float64_throughout() if is_double else contextlib.nullcontext():
        pictures = padded_pictures(model, pixels) if pixels else {}
        ids = torch.tensor([list(token_ids)])
        return model(input_ids=ids, **pictures).last_hidden_state[0].numpy()


def embedding_of(states: np.ndarray) -> np.ndarray:
    """Return the embedding [W] of projected states [T, W]: their mean, of length 1."""
    mean = states.mean(axis=0)
    return mean / np.linalg.norm(mean)
