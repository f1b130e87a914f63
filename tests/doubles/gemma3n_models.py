"""Tiny Gemma 3n: transformers' own class with random weights, and what we make of it.

Windows are smaller than the sequences, the table of per-layer embeddings has fewer rows than the
vocabulary, feed-forwards differ in width as in slices of a MatFormer, and no width is a multiple of
8, so that each product has columns or terms left over.
"""

import contextlib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.tensors import Checkpoint
from export.graph.signatures import decoder_signature
from export.graph.tasks import graph_module
from export.graph.weights import inverse_frequencies
from export.modules.decoder import GemmaLayers
from tests.doubles.once import exporter_digest, kept
from tests.doubles.reference import (
    FULL,
    SHAPE,
    SLIDING,
    VOCAB,
    WINDOW,
    draw_weights,
    float64_throughout,
    save_checkpoint,
)

TABLE_ROWS = 280
"""Rows of the table of per-layer embeddings; ids from there on take the first one."""
HIDDEN = 60
GEMMA3N_SHAPE: dict[str, Any] = {
    **SHAPE,
    "hidden_size": HIDDEN,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "vocab_size_per_layer_input": TABLE_ROWS,
    "hidden_size_per_layer_input": 12,
    "laurel_rank": 9,
    "final_logit_softcapping": 3.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3n": {
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "num_kv_shared_layers": 3,
        "intermediate_size": [300, 220, 300, 148, 300, 220],
        "activation_sparsity_pattern": [0.95, 0.9, 0.0, 0.95, 0.0, 0.0],
    },
    "gemma3n_third_stream": {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, FULL, SLIDING],
        "num_kv_shared_layers": 0,
        "intermediate_size": 100,
        "activation_sparsity_pattern": [0.0, 0.0, 0.3],
        "altup_num_inputs": 3,
        "altup_active_idx": 2,
        "altup_correct_scale": False,
    },
}
"""Shared keys and values and a list of widths; and another active stream, nothing shared, and
streams that gate per-layer embeddings as they are."""

TASKS = {"gemma3n": ("generate", "classify", "embed"), "gemma3n_third_stream": ("generate",)}


def gemma3n_model(name: str, **other: Any) -> torch.nn.Module:
    """Return one of `MODELS` in float32, weights drawn by parameter name.

    Args:
        name: Its name.
        other: Other settings than the model's.
    """
    config = transformers.Gemma3nTextConfig(**{**GEMMA3N_SHAPE, **MODELS[name], **other})
    model = transformers.Gemma3nForCausalLM._from_config(config, attn_implementation="eager")
    return draw_gemma3n(model)


@torch.no_grad()
def draw_gemma3n(model: torch.nn.Module) -> torch.nn.Module:
    """Draw the weights of a model of this shape by parameter name."""
    for parameter_name, parameter in draw_weights(model).named_parameters():
        if parameter_name.endswith("correct_output_scale"):
            parameter.add_(1.0)  # zero at first, which would hide what it scales
        elif parameter_name.endswith("modality_router.weight"):
            parameter.mul_(0.3 * HIDDEN)  # of inputs divided by this width
        elif parameter_name.endswith(("prediction_coefs.weight", "q_norm.weight")):
            parameter.mul_(0.4)  # or errors grow tenfold from layer to layer
    return model


def exact_model(name: str) -> torch.nn.Module:
    """Return one of `MODELS` in float64, with its constant factors in float64 too."""
    model = gemma3n_model(name).double()
    hidden = model.config.hidden_size
    model.model.per_layer_projection_scale.fill_(hidden**-0.5)
    model.model.per_layer_input_scale.fill_(0.5**0.5)
    for layer in model.model.layers:
        layer.altup.router_input_scale.fill_(1 / hidden)
    return model


@dataclass(frozen=True)
class TinyGemma3n:
    """One of `MODELS`: the reference, its checkpoint and what we made of it."""

    name: str
    reference: torch.nn.Module
    checkpoint: Checkpoint

    @property
    def artifact(self) -> Artifact:
        """The export for the CPU with the model's `TASKS`."""
        return Artifact.open(_artifact(self.name))


@functools.cache
def tiny_gemma3n(name: str) -> TinyGemma3n:
    """Return one of `MODELS`; its export is made once for an exporter, when it is asked for."""
    reference = gemma3n_model(name)
    folder = kept(
        f"tiny-{name}-checkpoint-{exporter_digest()}",
        lambda folder: save_checkpoint(reference, folder),
    )
    return TinyGemma3n(name=name, reference=reference, checkpoint=read_checkpoint(folder))


@functools.cache
def _artifact(name: str) -> Path:
    checkpoint = tiny_gemma3n(name).checkpoint.path
    return kept(
        f"tiny-{name}-{exporter_digest()}",
        lambda folder: export(checkpoint, folder, tasks=TASKS[name]),
    )


def save_published(name: str, folder: Path) -> Path:
    """Write one of `MODELS` as it is published: the text model of one with towers.

    The towers are stand-ins, so that only the text model can be read. The files hold keys and
    values for layers that read those of others too.
    """
    model = gemma3n_model(name)
    save_checkpoint(model, folder)
    raw = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    found = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
    for i in range(raw["num_hidden_layers"]):
        for part in ("k_proj", "v_proj", "k_norm"):
            of_layer = f"model.language_model.layers.{{}}.self_attn.{part}.weight".format
            found.setdefault(of_layer(i), torch.full_like(found[of_layer(0)], torch.nan))
    found["model.vision_tower.timm_model.blocks.0.weight"] = torch.zeros(2)
    found["model.audio_tower.conformer.0.weight"] = torch.zeros(2)
    found["model.embed_vision.embedding.weight"] = torch.zeros(2, 2)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    outer = {
        "model_type": "gemma3n",
        "architectures": ["Gemma3nForConditionalGeneration"],
        "text_config": raw,
        "vision_config": {"model_type": "gemma3n_vision", "hidden_size": 2048},
        "audio_config": {"model_type": "gemma3n_audio", "hidden_size": 1536},
        "eoi_token_id": 262144,
        "vision_soft_tokens_per_image": 256,
        "audio_soft_tokens_per_image": 188,
    }
    (folder / "config.json").write_text(json.dumps(outer))
    return folder


def gemma3n_decoder(checkpoint: Checkpoint, device: Device, dtype: torch.dtype) -> GemmaLayers:
    """Return our decoder in PyTorch with a checkpoint's weights."""
    config = checkpoint.config
    kind = "bfloat16" if dtype == torch.bfloat16 else "float32"
    signature = decoder_signature(config, device=device, dtype=kind)
    module = graph_module(config, None, signature)
    state = {}
    for name, stored in checkpoint.tensors.items():
        values = np.concatenate(list(stored.chunks())).astype(np.float64)
        state[name] = torch.from_numpy(values)
    for group in config.groups:
        state[f"rotary.{group}.inv_freq"] = torch.from_numpy(inverse_frequencies(config, group))
    module = module.to(dtype)
    module.load_state_dict(state, strict=True)
    assert isinstance(module, GemmaLayers)
    return module.eval()


def sequences(lengths: list[int]) -> list[list[int]]:
    """Return random token ids, of which every second sequence has some beyond the table."""
    rng = np.random.default_rng(7)
    return [rng.integers(3, (TABLE_ROWS, VOCAB)[i % 2], n).tolist() for i, n in enumerate(lengths)]


@torch.no_grad()
def states_of(model: torch.nn.Module, token_ids: list[int]) -> np.ndarray:
    """Return the states [T, D] of one sequence after the final norm."""
    is_double = next(model.parameters()).dtype == torch.float64
    with float64_throughout() if is_double else contextlib.nullcontext():
        return model.model(torch.tensor([token_ids]), use_cache=False).last_hidden_state[0].numpy()
