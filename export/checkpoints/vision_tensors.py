"""Names and shapes of the tensors of a tower and its projector, as in `export.modules.vision`."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from beam_gemma.model.vision_config import VisionConfig
from export.checkpoints.gemma4_vision import gemma4_vision_shapes
from export.checkpoints.mobilenet_v5 import mobilenet_shapes
from export.checkpoints.tensors import StoredTensor

TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."
OF_PICTURES = (TOWER, PROJECTOR, "vision_embedder.", "embed_vision.")
"""Starts of the names of all that a model may have for pictures."""
PATCHES = "vision_tower.embeddings.patch_embedding.weight"
HEAD = "vision_tower.head."
"""Prefix of the pooling head of SigLIP, which no Gemma uses."""
PROJECTION = "multi_modal_projector.mm_input_projection_weight"


def vision_shapes(config: VisionConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor for pictures.

    Args:
        config: The tower.
        hidden_size: Width of the decoder.
    """
    if config.image_step:
        return gemma4_vision_shapes(config, hidden_size)
    if config.projector == "mobilenet":
        return mobilenet_shapes(config, hidden_size)
    width, wide = config.hidden_size, config.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        **_affine("mlp.fc1", wide, width),
        **_affine("mlp.fc2", width, wide),
        **_affine("layer_norm1", width),
        **_affine("layer_norm2", width),
    }
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= _affine(f"self_attn.{name}", width, width)
    tower: dict[str, tuple[int, ...]] = {
        **_affine("embeddings.patch_embedding", width, 3 * config.patch_size**2),
        "embeddings.position_embedding.weight": (config.num_patches, width),
        **{
            f"encoder.layers.{i}.{name}": shape
            for i in range(config.num_hidden_layers)
            for name, shape in layer.items()
        },
        **_affine("post_layernorm", width),
    }
    projector: dict[str, tuple[int, ...]] = (
        _affine("linear", hidden_size, width)
        if config.projector == "linear"
        else {
            "mm_soft_emb_norm.weight": (width,),
            "mm_input_projection_weight": (width, hidden_size),
        }
    )
    return {TOWER + name: shape for name, shape in tower.items()} | {
        PROJECTOR + name: shape for name, shape in projector.items()
    }


def _affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def is_of_pictures(name: str) -> bool:
    """Return whether a tensor, by its name without prefixes, belongs to a tower or projector."""
    return name.startswith(OF_PICTURES)


def vision_name(name: str) -> str | None:
    """Return our name of a Hugging Face tensor for pictures.

    Files have the tower under `vision_tower.vision_model.` or `vision_tower.`, as they come from
    older or newer releases of transformers.

    Args:
        name: Name without the prefix of the whole model.

    Returns:
        None if no Gemma uses the tensor.
    """
    if name.startswith(TOWER):
        name = TOWER + name.removeprefix(TOWER).removeprefix("vision_model.")
    return None if name.startswith(HEAD) else name


def with_flat_kernels(
    tensors: Mapping[str, StoredTensor], config: VisionConfig
) -> dict[str, StoredTensor]:
    """Return tensors with kernels [C, I, S, S] that are products here as matrices [C, I * S * S].

    They are the kernel of patches in SigLIP, and those of one place in MobileNetV5. A kernel of
    another shape stays as it is, to be refused with its own shape.
    """
    rest = dict(tensors)
    for name, shape in _kernels(rest, config).items():
        kernel = rest.get(name)
        if kernel is not None and kernel.shape == shape:
            flat = shape[0], math.prod(shape[1:])
            rest[name] = replace(kernel, shape=flat, rows=partial(_flat_rows, kernel.rows))
    return rest


def _kernels(names: Iterable[str], config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Return the stored shape of each kernel that is a product."""
    if config.projector != "mobilenet":
        return {PATCHES: (config.hidden_size, 3, config.patch_size, config.patch_size)}
    # The width of the decoder is that of no kernel.
    matrices = {n: s for n, s in mobilenet_shapes(config, 1).items() if len(s) == 2}
    return {n: (*matrices[n], 1, 1) for n in names if n in matrices and n.startswith(TOWER)}


def _flat_rows(rows: Callable[[int, int], np.ndarray], start: int, end: int) -> np.ndarray:
    return rows(start, end).reshape(end - start, -1)
