"""Merges a PEFT LoRA adapter into a checkpoint: W + B A * scaling, slice by slice.

Only the tensors that an adapter changes are computed and written; all others keep their bytes.
Source: `tuners/lora/layer.py` of PEFT 0.21, `Linear.merge` and `get_delta_weight`.

Dimensions: O rows of a weight, I its columns, r rank of the adapter.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beam_gemma.errors import CheckpointError, nearest
from export.checkpoints.hf_folder import read_safetensors
from export.checkpoints.sidecar_files import read_json
from export.checkpoints.tensors import Checkpoint, StoredTensor

LOGGER = logging.getLogger("export")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FACTOR = re.compile(
    r"base_model\.model\.(language_model\.)?(model\.)?(language_model\.)?"
    r"(?P<layer>layers\.\d+\.\w+\.\w+_proj)\.lora_(?P<side>[AB])\.weight"
)
IMAGE_PARTS = re.compile(r"base_model\.model\.(model\.)?(vision_tower|multi_modal_projector)\.")
# Settings that do not change the sum or whose value follows from the tensors.
IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
})  # fmt: skip
# Supported values; the first is the default. Other initializations also change the base weights.
ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def merge_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return the checkpoint with the adapter in `folder` merged into its weights.

    Raises:
        CheckpointError: the adapter is incomplete, needs more than a sum, or fits another model.
    """
    config = read_json(folder / CONFIG)
    _check(config)
    tensors = dict(checkpoint.tensors)
    for name, (a, b) in _factors(folder).items():
        weight = tensors.get(name)
        if weight is None:
            raise CheckpointError(
                f"adapter: {a.name} changes {name}, which the checkpoint has not"
                f"{nearest(name, tensors)}"
            )
        rank = a.shape[0]
        if (b.shape[0], a.shape[1]) != weight.shape or b.shape[1] != rank:
            raise CheckpointError(
                f"adapter: expected factors of {name} {list(weight.shape)}, got "
                f"{list(b.shape)} and {list(a.shape)}; it was trained on another model"
            )
        scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        tensors[name] = replace(weight, raw=None, rows=_merged_rows(weight, a, b, scaling))
    return replace(checkpoint, name=f"{checkpoint.name} + {folder.name}", tensors=tensors)


def _check(config: Mapping[str, Any]) -> None:
    """Check that merging needs no more than adding B A * scaling to a weight.

    Raises:
        CheckpointError: a key is missing or a setting is not supported.
    """
    for key in ("peft_type", "lora_alpha"):
        if key not in config:
            raise CheckpointError(f"{CONFIG}: expected the key {key!r}, got none")
    for key, allowed in ALLOWED.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise CheckpointError(
                f"{CONFIG}: expected {key} as one of {', '.join(map(str, allowed))}, got {value!r}"
            )
    for key, value in config.items():
        if value and key not in IGNORED and key not in ALLOWED:
            raise CheckpointError(
                f"{CONFIG}: {key} is {value!r}, which cannot be merged here; merge it with PEFT's "
                "merge_and_unload and export what that saves"
            )


def _factors(folder: Path) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Return A [r, I] and B [O, r] for each weight that the adapter changes."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{file}: expected an adapter's weights, got nothing")
    sides: dict[str, dict[str, StoredTensor]] = {}
    for stored in _of_text(read_safetensors(file), folder):
        match = FACTOR.fullmatch(stored.name)
        if match is None:
            raise CheckpointError(
                f"{file}: the tensor {stored.name} is no factor of a layer's projection; only "
                "those can be merged here"
            )
        sides.setdefault(f"{match['layer']}.weight", {})[match["side"]] = stored
    for name, pair in sides.items():
        if len(pair) < 2:
            raise CheckpointError(f"{file}: expected lora_A and lora_B of {name}, got one of them")
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}


def _of_text(tensors: Iterable[StoredTensor], folder: Path) -> list[StoredTensor]:
    found = list(tensors)
    text = [stored for stored in found if not IMAGE_PARTS.match(stored.name)]
    if len(text) < len(found):
        LOGGER.warning("%s: merging the text model's part; the one for images is left out", folder)
    return text


def _merged_rows(
    weight: StoredTensor, a: StoredTensor, b: StoredTensor, scaling: float
) -> Callable[[int, int], np.ndarray]:
    def rows(start: int, stop: int) -> np.ndarray:
        left, right = _float32(b.rows(start, stop)), _float32(a.rows(0, a.shape[0]))
        return (_float32(weight.rows(start, stop)) + left @ right * scaling).numpy()

    return rows


def _float32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
