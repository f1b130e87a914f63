"""Tiny Gemma 4 models that see: transformers' own classes with random weights.

A patch has 4 pixels of a side and a token 2 x 2 patches, so that a picture of 16 x 24 pixels takes
6 tokens. Bounds of products are drawn so that they cut some of the numbers.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from beam_gemma.model.gemma4_vision import BEGIN_TOKEN, END_TOKEN, IMAGE_TOKEN
from tests.doubles.gemma4_models import GEMMA4_MODELS, GEMMA4_SHAPE, draw_newer
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

PATCH, KERNEL = 4, 2
STEP = PATCH * KERNEL
BEGIN_ID, IMAGE_ID, END_ID = 300, 301, 302
VOCAB = 320
TOWER: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": PATCH,
    "pooling_kernel_size": KERNEL,
    "position_embedding_size": 64,
}
SQUARES: dict[str, Any] = {
    "patch_size": PATCH,
    "pooling_kernel_size": KERNEL,
    "mm_embed_dim": 40,
    "mm_posemb_size": 64,
    "output_proj_dims": 40,
}
MARKER_IDS: dict[str, Any] = {
    "boi_token_id": BEGIN_ID,
    "eoi_token_id": END_ID,
    "image_token_id": IMAGE_ID,
    "video_token_id": 303,
    "audio_token_id": 304,
}
MARKERS = (BEGIN_TOKEN, IMAGE_TOKEN, END_TOKEN)
"""Pieces of the tokenizer behind its other ones, by the ids above."""
IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "Gemma4ImageProcessor",
    "do_convert_rgb": True,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.0] * 3,
    "image_std": [1.0] * 3,
    "max_soft_tokens": 70,
    "patch_size": PATCH,
    "pooling_kernel_size": KERNEL,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
"""Settings of the processor of pictures, as they are published."""
SEEING = {
    # Name: text model, whether tokens of a picture attend to later ones, settings of the tower.
    "gemma4_e2b": ("gemma4_e2b", None, {**TOWER, "use_clipped_linears": True}),
    "gemma4_dense": ("gemma4_dense", "vision", {**TOWER, "standardize": True}),
    "gemma4_unified": ("gemma4_dense", "vision", None),
}
"""Like E2B and E4B, like 31B and 26B-A4B, and like 12B, which has no tower."""


def seeing_gemma4(name: str) -> torch.nn.Module:
    """Return one of `SEEING` in float32, weights drawn by parameter name."""
    text_name, two_sided, tower = SEEING[name]
    shape = {**GEMMA4_SHAPE, **GEMMA4_MODELS[text_name]}
    rows = {"vocab_size": VOCAB}
    if "vocab_size_per_layer_input" in shape:
        rows["vocab_size_per_layer_input"] = VOCAB
    text = {**shape, **rows, "num_hidden_layers": len(shape["layer_types"])}
    text["use_bidirectional_attention"] = two_sided
    if tower is None:
        text.pop("hidden_size_per_layer_input")
        config: Any = transformers.Gemma4UnifiedConfig(
            text_config=text, vision_config=SQUARES, audio_config=None, **MARKER_IDS
        )
        model_class: Any = transformers.Gemma4UnifiedForConditionalGeneration
    else:
        config = transformers.Gemma4Config(
            text_config=text, vision_config=tower, audio_config=None, **MARKER_IDS
        )
        model_class = transformers.Gemma4ForConditionalGeneration
    model = model_class._from_config(config, attn_implementation="eager")
    return draw_towers(draw_newer(model))


@torch.no_grad()
def draw_towers(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model with what `draw_newer` leaves: places, biases, bounds and scales."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(tensor.shape, generator=generator)
        leaf = name.split(".")[-1]
        if leaf in ("position_embedding_table", "pos_embedding", "std_bias", "bias"):
            tensor.copy_(0.3 * noise)
        elif leaf == "std_scale":
            tensor.copy_(1 + 0.3 * noise)
        elif leaf.endswith(("_min", "_max")):
            tensor.copy_((1.0 + 0.2 * noise.abs()) * (-1 if leaf.endswith("_min") else 1))
        elif name.endswith(("input_proj.weight", "patch_dense.weight")):
            tensor.copy_(noise * 1.5 / tensor.shape[1] ** 0.5)
    return model


def picture_features(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return transformers' features [L, D] of the pixels [3, I, J] of one picture in uint8."""
    patches, places = _patches(model, pixels)
    with torch.no_grad():
        inner: Any = getattr(model, "model", model)
        found = inner.get_image_features(patches[None], places[None])
    output = found.pooler_output
    return output if isinstance(output, torch.Tensor) else torch.cat(list(output))


def save_seeing_gemma4(model: torch.nn.Module, folder: Path) -> Path:
    """Write a model as a Hugging Face folder, as it is published."""
    model.save_pretrained(folder)
    settings = {
        "image_processor": IMAGE_PROCESSOR,
        "image_seq_length": 70,
        "processor_class": "Gemma4Processor",
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model(MARKERS))
    return folder


def padded_pictures(
    model: torch.nn.Module, pictures: Sequence[np.ndarray]
) -> dict[str, torch.Tensor]:
    """Return transformers' inputs for pictures of several sizes, padded to one length."""
    made = [_patches(model, torch.from_numpy(pixels)) for pixels in pictures]
    longest = 4 * KERNEL**2 * max(len(places) for _, places in made)
    values = torch.zeros(len(made), longest, made[0][0].shape[1], dtype=made[0][0].dtype)
    places = torch.full((len(made), longest, 2), -1)
    for i, (patches, own) in enumerate(made):
        values[i, : len(patches)], places[i, : len(own)] = patches, own
    return {"pixel_values": values, "image_position_ids": places}


def _patches(model: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the patches of a picture in rows from 0 to 1, and the column and row of each."""
    config: Any = model.config
    size = STEP if config.model_type == "gemma4_unified" else PATCH
    height, width = pixels.shape[1] // size, pixels.shape[2] // size
    colors = pixels.to(next(model.parameters()).dtype) / 255
    patches = colors.reshape(3, height, size, width, size).permute(1, 3, 2, 4, 0)
    grid = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    return patches.reshape(height * width, -1), torch.stack(grid, dim=-1).reshape(-1, 2)
