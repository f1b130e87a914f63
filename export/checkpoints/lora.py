"""Merges a PEFT LoRA adapter into a checkpoint: W + B A * scaling, slice by slice.

An adapter may also hold whole weights, which take the place of the checkpoint's, and a chat
template. What PEFT's `merge_and_unload` returns for the same adapter has the same numbers.

Only the tensors that an adapter changes are computed and written; all others keep their bytes.
Source: `tuners/lora/layer.py` of PEFT 0.21, `merge` and `get_delta_weight` of its classes.

Dimensions: O rows of a weight, I its columns, E experts, r rank of the adapter.
"""

import logging
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from beam_gemma.errors import CheckpointError, nearest
from beam_gemma.model.config import NEWER, GemmaConfig
from beam_gemma.model.tokenizer import Tokenizer
from export.checkpoints.bounds import inside, is_file
from export.checkpoints.encoder_decoder_folder import stack_name
from export.checkpoints.hf_folder import layer_name, read_safetensors
from export.checkpoints.lora_sums import summed_embeddings, summed_experts, summed_rows
from export.checkpoints.newer_folder import newer_name
from export.checkpoints.sidecar_files import chat_template, read_json, with_names
from export.checkpoints.tensors import (
    EMBEDDING,
    ENCODER,
    HEAD,
    TABLE,
    Checkpoint,
    StoredTensor,
    is_norm,
    without_head,
)
from export.checkpoints.tokenizer_model import turn_ends
from export.checkpoints.vision_tensors import vision_name

LOGGER = logging.getLogger("export")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = r"base_model\.model\.(?P<module>(language_model\.)?(model\.)?(language_model\.)?"
TENSOR = re.compile(
    PREFIX + r"(?P<name>lm_head|embed_tokens(_per_layer)?|norm|per_layer_[a-z_]+|"
    r"altup_(unembed_)?projections\.\d+|layers\.\d+\.[a-z_]+(_\d)?(\.[a-z_]+)?))\."
    r"(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|(base_layer\.)?weight)"
)
"""Name of an adapter's tensor: of a factor, or of a whole weight."""
PARAMETER = re.compile(
    PREFIX + r"layers\.\d+\.(altup|experts|router))\."
    r"(?P<part>correct_output_scale|gate_up_proj|down_proj|scale|per_expert_scale)"
)
"""The same for a whole weight that is no module's."""
EXPERTS = re.compile(r"(?P<module>layers\.\d+\.experts)(\.base_layer)?\.weight")
"""Our name of what an adapter's factors of experts change, before it is known which weight it is.

PEFT puts the factors of a module's second parameter around those of its first."""
PATTERN = re.compile(r"([\w.^|]|\\[.d]\+?)+", re.ASCII)
"""Keys of `alpha_pattern` that are read: regular expressions that take no time to match."""
MAX_ALPHA = 1e6
OTHER_PARTS = re.compile(
    r"base_model\.model\.(model\.)*(encoder\.)?"
    r"(vision_tower|multi_modal_projector|vision_embedder|embed_vision|audio_tower|embed_audio)\."
)
"""Start of the name of a tensor of what a model has for pictures or sound."""
IMAGE_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>(model\.)*"
    r"(?P<name>(vision_tower|multi_modal_projector)(\.[a-z0-9_]+?)*?))"
    r"\.(?P<part>lora_[AB]\.weight|(base_layer\.)?(weight|bias)|mm_input_projection_weight)"
)
"""The same for a tower of pictures and its projector, one of whose weights is no module's."""
STACK_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>(?P<name>lm_head\.out_proj|"
    r"model\.(encoder|decoder)(\.[a-z0-9_]+?)*?))"
    r"\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|(base_layer\.)?(weight|bias|eoi_embedding)"
    r"|mm_input_projection_weight)"
)
"""The same for a model with an encoder, whose tower is a part of it."""
# Settings that do not change the sum or whose value follows from the tensors.
IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_rslora",
})  # fmt: skip
READ = ("alpha_pattern", "modules_to_save")
# Supported values; the first is the default. Other initializations also change the base weights.
ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True, kw_only=True)
class _Change:
    """An adapter's change of one weight: a whole weight, two factors, or both."""

    module: str
    """Name of the module in PEFT's model, with which the keys of `alpha_pattern` are compared."""
    parts: dict[str, StoredTensor]
    """`weight`, and the factors `A` [r, I] and `B` [O, r], by these names."""


def merge_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return the checkpoint with the adapter in `folder` merged into its weights.

    A chat template and names of pieces beside the adapter take the place of the checkpoint's.

    Raises:
        CheckpointError: the adapter is incomplete, needs more than a sum, or fits another model.
    """
    config = read_json(folder, CONFIG)
    _check(config)
    tensors = dict(checkpoint.tensors)
    changes = _changes(folder, checkpoint)
    _check_saved(config, changes, folder)
    for name, change in changes.items():
        if name == HEAD and checkpoint.config.tie_word_embeddings:
            continue
        weight = tensors.get(name)
        if weight is None:
            [first, *_] = change.parts.values()
            raise CheckpointError(
                f"adapter: {first.name} changes {name}, which the checkpoint has not"
                f"{nearest(name, tensors)}"
            )
        shift = checkpoint.config.norm_offset - checkpoint.norm_offset
        tensors[name] = _merged(name, weight, change, config, shift)
    if checkpoint.config.tie_word_embeddings:
        _check_head(config, changes, checkpoint, tensors)
    merged = replace(checkpoint, name=f"{checkpoint.name} + {folder.name}", tensors=tensors)
    return _with_texts(merged, folder)


def _with_texts(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return the checkpoint with the chat template and the names of pieces beside an adapter."""
    base = checkpoint.tokenizer_model
    checkpoint = replace(
        checkpoint,
        tokenizer_model=lambda: with_names(base(), folder, checkpoint.config.vocab_size),
    )
    template = chat_template(folder)
    if template is None:
        return checkpoint
    ends = turn_ends(Tokenizer(checkpoint.tokenizer_model()))
    eos = tuple(dict.fromkeys((*checkpoint.eos_token_ids, *ends)))
    return replace(checkpoint, chat_template=template, eos_token_ids=eos)


def _merged(
    name: str, weight: StoredTensor, change: _Change, config: Mapping[str, Any], norm_shift: float
) -> StoredTensor:
    """Return one weight as the adapter changes it; a whole norm has `norm_shift` added."""
    parts = change.parts
    whole = parts.get("weight")
    if whole is not None:
        if whole.shape != weight.shape:
            raise CheckpointError(
                f"adapter: expected {whole.name} of shape {list(weight.shape)}, got "
                f"{list(whole.shape)}; it was trained on another model"
            )
        weight = _shifted(whole, norm_shift) if is_norm(name) else whole
    if "A" not in parts:
        return weight
    a, b = parts["A"], parts["B"]
    is_embedding = name in (EMBEDDING, ENCODER + EMBEDDING, TABLE)
    rank = _rank(weight.shape[::-1] if is_embedding else weight.shape, a, b)
    if rank is None:
        raise CheckpointError(
            f"adapter: expected factors of {name} {list(weight.shape)}, got "
            f"{list(b.shape)} and {list(a.shape)}; it was trained on another model"
        )
    scaling = _alpha(config, change.module) / (
        math.sqrt(rank) if config.get("use_rslora") else rank
    )
    make = summed_experts if len(weight.shape) == 3 else summed_rows
    make = summed_embeddings if is_embedding else make
    return replace(weight, raw=None, coded_rows=None, rows=make(weight, a, b, scaling))


def _rank(shape: tuple[int, ...], a: StoredTensor, b: StoredTensor) -> int | None:
    """Return the rank of two factors of a weight, or None if they are none of this shape."""
    experts = shape[0] if len(shape) == 3 else 1
    rank, rest = divmod(a.shape[0], experts)
    expected = (*shape[-2:-1], a.shape[0], a.shape[0], *shape[-1:])
    return rank if rank and not rest and (*b.shape, *a.shape) == expected else None


def _alpha(config: Mapping[str, Any], module: str) -> float:
    """Return the alpha of a module: that of the first pattern that it ends with, or the usual."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return alpha
    return config["lora_alpha"]


def _check_saved(config: Mapping[str, Any], changes: Mapping[str, _Change], folder: Path) -> None:
    """Check that the adapter holds the modules that it says are saved as a whole.

    Raises:
        CheckpointError: one has no weights.
    """
    whole = [change.module for change in changes.values() if "weight" in change.parts]
    for saved in config.get("modules_to_save") or ():
        if not any(f".{saved}." in f".{module}." for module in whole):
            raise CheckpointError(
                f"{folder / WEIGHTS}: expected the weights of {reprlib.repr(saved)}, which "
                "modules_to_save names, got none"
            )


def _check_head(
    config: Mapping[str, Any],
    changes: Mapping[str, _Change],
    base: Checkpoint,
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Check that the head still is the embedding.

    A whole embedding of `modules_to_save` is a copy, to which the head is not tied.

    Raises:
        CheckpointError: the adapter changes one of the two alone.
    """
    parts = changes[HEAD].parts if HEAD in changes else {}
    embedding = changes[EMBEDDING].parts if EMBEDDING in changes else {}
    if "A" in parts:
        raise CheckpointError(
            f"adapter: {parts['A'].name} changes the head alone, which in a Gemma is the "
            "embedding; train without lm_head among the target modules"
        )
    is_copy = any(
        str(saved).rpartition(".")[2] == "embed_tokens"
        for saved in config.get("modules_to_save") or ()
    )
    head = parts.get("weight") or (base.tensors[EMBEDDING] if is_copy and embedding else None)
    if head is not None:
        without_head({**tensors, HEAD: head})


def _check(config: Mapping[str, Any]) -> None:
    """Check that merging needs no more than adding B A * scaling to a weight.

    Raises:
        CheckpointError: a key is missing or a setting is not supported.
    """
    for key in ("peft_type", "lora_alpha"):
        if key not in config:
            raise CheckpointError(f"{CONFIG}: expected the key {key!r}, got none")
    _check_kinds(config)
    for key, allowed in ALLOWED.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise CheckpointError(
                f"{CONFIG}: expected {key} as one of {', '.join(map(str, allowed))}, "
                f"got {reprlib.repr(value)}"
            )
    for key, value in config.items():
        if value and key not in {*IGNORED, *READ, *ALLOWED}:
            raise CheckpointError(
                f"{CONFIG}: {key[:80]} is {reprlib.repr(value)}, which cannot be merged here; "
                "merge it with PEFT's merge_and_unload and export what that saves"
            )


def _check_kinds(config: Mapping[str, Any]) -> None:
    """Check the kinds of the settings that are read.

    Raises:
        CheckpointError: a setting is of another kind.
    """
    use_rslora, patterns = config.get("use_rslora"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(PATTERN.fullmatch, patterns)):
        raise CheckpointError(
            f"{CONFIG}: expected alpha_pattern as numbers by names of modules, got "
            f"{reprlib.repr(patterns)}"
        )
    for alpha in (config["lora_alpha"], *patterns.values()):
        if type(alpha) not in (int, float) or not abs(alpha) < MAX_ALPHA:
            raise CheckpointError(
                f"{CONFIG}: expected lora_alpha as a number below {MAX_ALPHA:g}, got "
                f"{reprlib.repr(alpha)}"
            )
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        raise CheckpointError(
            f"{CONFIG}: expected modules_to_save as names of modules, got {reprlib.repr(saved)}"
        )
    if not isinstance(use_rslora, bool | None):
        raise CheckpointError(
            f"{CONFIG}: expected use_rslora as true or false, got {reprlib.repr(use_rslora)}"
        )


def _changes(folder: Path, checkpoint: Checkpoint) -> dict[str, _Change]:
    """Return what the adapter says of each weight, under our names."""
    file = inside(folder, WEIGHTS)
    if not is_file(file):
        raise CheckpointError(f"{file}: expected an adapter's weights, got nothing")
    changes: dict[str, _Change] = {}
    patterns = (TENSOR, PARAMETER, IMAGE_TENSOR) if checkpoint.encoder is None else (STACK_TENSOR,)
    tensors = read_safetensors(file)
    if checkpoint.vision is None:
        tensors = _of_text(tensors, folder)
    unused = []
    for stored in tensors:
        match = next(filter(None, (pattern.fullmatch(stored.name) for pattern in patterns)), None)
        if match is None:
            raise CheckpointError(
                f"{file}: the tensor {stored.name} is no factor of a layer's projection or of the "
                "embedding, and no whole weight; only those can be merged here"
            )
        name, part = _changed(match, checkpoint.config)
        if name is None:
            unused.append(stored.name)
            continue
        change = changes.setdefault(name, _Change(module=match["module"], parts={}))
        if part in change.parts:
            raise CheckpointError(
                f"{file}: expected one tensor for each factor, got {change.parts[part].name} and "
                f"{stored.name}"
            )
        change.parts[part] = stored
    if unused:
        LOGGER.warning(
            "%s: leaving out %d tensors such as %s, as layers that read the keys and values of "
            "others have none",
            folder,
            len(unused),
            unused[0],
        )
    for name, change in changes.items():
        if len({"A", "B"} & change.parts.keys()) == 1:
            raise CheckpointError(f"{file}: expected lora_A and lora_B of {name}, got one of them")
    return dict(_of_experts(name, change, checkpoint) for name, change in changes.items())


def _of_experts(name: str, change: _Change, checkpoint: Checkpoint) -> tuple[str, _Change]:
    """Return the weight of experts that two factors change, as their shapes say, and the change.

    Any other change is returned as it is.

    Raises:
        CheckpointError: the factors fit none of a layer's two weights.
    """
    experts = EXPERTS.fullmatch(name)
    if experts is None:
        return name, change
    a, b = change.parts["A"], change.parts["B"]
    for part in ("gate_up_proj", "down_proj"):
        weight = checkpoint.tensors.get(f"{experts['module']}.{part}")
        if weight is not None and _rank(weight.shape, a, b) is not None:
            module = f"{change.module.removesuffix('.base_layer')}.{part}"
            return f"{experts['module']}.{part}", replace(change, module=module)
    raise CheckpointError(
        f"adapter: expected {a.name} and {b.name} as factors of the experts' weights, got "
        f"{list(b.shape)} and {list(a.shape)}; it was trained on another model"
    )


def _changed(match: re.Match[str], model: GemmaConfig) -> tuple[str | None, str]:
    """Return our name of the weight that an adapter's tensor changes, and its part of `_Change`.

    The name is None for what no layer reads.
    """
    part = match["part"]
    if match.re is PARAMETER:
        return newer_name(f"{match['module']}.{part}", model), "weight"
    is_factor = part.startswith("lora_")
    kind = part.removeprefix("lora_").removeprefix("embedding_")[0] if is_factor else "weight"
    if match.re is TENSOR:
        find = newer_name if model.model_type in NEWER else layer_name
        return find(f"{match['name']}.weight", model), kind
    leaf = "weight" if is_factor else part.removeprefix("base_layer.")
    name = f"{match['name']}.{leaf}"
    if match.re is STACK_TENSOR:
        return stack_name(name, model.model_type) or name, kind
    return vision_name(name) or name, kind


def _of_text(tensors: Iterable[StoredTensor], folder: Path) -> list[StoredTensor]:
    found = list(tensors)
    text = [stored for stored in found if not OTHER_PARTS.match(stored.name)]
    if len(text) < len(found):
        LOGGER.warning(
            "%s: merging the text model's part; those for images and sound are left out", folder
        )
    return text


def _shifted(stored: StoredTensor, offset: float) -> StoredTensor:
    """Return a norm's weight plus `offset`: 1 where the checkpoint stores 1 + w."""
    if not offset:
        return stored
    return replace(
        stored,
        dtype="float32",
        raw=None,
        rows=lambda start, stop: stored.rows(start, stop).astype(np.float32) + np.float32(offset),
    )
