"""GGUF files of newer Gemmas, written from transformers' models as llama.cpp's converter does.

Names of tensors and keys are those of the `gguf` package, not of the reader under test.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from tests.doubles.checkpoint_files import finish
from tests.doubles.gemma4_models import draw_newer
from tests.doubles.reference import FULL, SLIDING

ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "default", "rope_theta": 1e6},
}
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 24,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 3.0,
}
"""Sizes are multiples of 32, as blocks of quantized numbers are."""
GEMMA4 = SHAPE | {
    "model_type": "gemma4_text",
    "intermediate_size": 96,
    "layer_types": [SLIDING] * 2 + [FULL] + [SLIDING] * 2 + [FULL],
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "rope_parameters": ROPE
    | {FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
}
MODELS: dict[str, dict[str, Any]] = {
    "E2B": GEMMA4
    | {
        "num_key_value_heads": 1,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 300,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
    },
    "31B": GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "26B-A4B": GEMMA4
    | {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "3n": SHAPE
    | {
        "model_type": "gemma3n_text",
        "intermediate_size": [96] * 6,
        "layer_types": [SLIDING] * 2 + [FULL] + [SLIDING] * 2 + [FULL],
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 280,
        "num_kv_shared_layers": 3,
        "rope_parameters": ROPE,
        "altup_num_inputs": 4,
        "altup_active_idx": 1,
        "laurel_rank": 32,
        "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
    },
}
"""The `config.json` of a model of each architecture, in the form of the releases."""
CLASSES = {
    "gemma3n_text": (transformers.Gemma3nTextConfig, transformers.Gemma3nForCausalLM),
    "gemma4_text": (transformers.Gemma4TextConfig, transformers.Gemma4ForCausalLM),
}
ARCHITECTURES = {
    "gemma3n_text": gguf.MODEL_ARCH.GEMMA3N,
    "gemma4_text": gguf.MODEL_ARCH.GEMMA4,
}
STACKED = ("altup_projections", "altup_unembed_projections")
BLOCK = 32
FREQUENCY_OFF = 1e30
"""Divisor that a rotary frequency of zero has in a file."""


def newer_model(name: str, **changes: Any) -> torch.nn.Module:
    """Return one of `MODELS` with some settings changed, weights drawn by parameter name."""
    raw = copy.deepcopy(MODELS[name] | changes)
    config_class, model_class = CLASSES[raw.pop("model_type")]
    return draw_newer(model_class._from_config(config_class(**raw), attn_implementation="eager"))


def write_model(
    path: Path,
    model: torch.nn.Module,
    raw: Mapping[str, Any],
    *,
    kind: gguf.GGMLQuantizationType | None = None,
    vocabulary: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write a text model of Gemma 3n or 4.

    Args:
        path: To write.
        model: The model in float32.
        raw: Its `config.json` in the form of the releases.
        kind: Block quantization of all matrices with whole blocks in a row; None for F32.
        vocabulary: Folder with `tokenizer.json` and `tokenizer_config.json`; None for none.
        settings: Metadata without the architecture's name, in place of what the model has; None as
            a value leaves a key out.
        tensors: Tensors by their names in GGUF, in place of the model's; None leaves one out.
    """
    arch = ARCHITECTURES[raw["model_type"]]
    name = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, name)
    if vocabulary is not None:
        _add_vocabulary(writer, vocabulary)
    for key, value in (_settings(raw) | dict(settings or {})).items():
        full = key if key.startswith("tokenizer.") else f"{name}.{key}"
        if value is not None:
            writer.add_key_value(full, value, gguf.GGUFValueType.get_type(value))
    theirs = _tensors(arch, model, raw) | dict(tensors or {})
    for tensor_name, array in theirs.items():
        if array is not None:
            packed = kind if array.ndim > 1 and array.shape[-1] % BLOCK == 0 else None
            data = array if packed is None else gguf.quants.quantize(array, packed)
            writer.add_tensor(tensor_name, data, raw_dtype=packed)
    finish(writer)
    return path


def _settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a `config.json`, by keys without the architecture's name."""
    rope = raw["rope_parameters"]
    settings = {
        "block_count": raw["num_hidden_layers"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": np.float32(raw["rms_norm_eps"]).item(),
        "attention.key_length": raw["head_dim"],
        "attention.value_length": raw["head_dim"],
        "attention.sliding_window": raw["sliding_window"],
        "attention.sliding_window_pattern": [kind == SLIDING for kind in raw["layer_types"]],
        "rope.freq_base": float(rope[FULL]["rope_theta"]),
        "rope.freq_base_swa": float(rope[SLIDING]["rope_theta"]),
    }
    if "final_logit_softcapping" in raw:
        settings["final_logit_softcapping"] = float(raw["final_logit_softcapping"])
    own = {"gemma3n_text": _gemma3n, "gemma4_text": _gemma4}
    return settings | (own[raw["model_type"]](raw) if raw["model_type"] in own else {})


def _gemma3n(raw: Mapping[str, Any]) -> dict[str, Any]:
    shares = torch.tensor(raw["activation_sparsity_pattern"], dtype=torch.float32)
    return {
        "altup.active_idx": raw["altup_active_idx"],
        "altup.num_inputs": raw["altup_num_inputs"],
        "embedding_length_per_layer_input": raw["hidden_size_per_layer_input"],
        "attention.shared_kv_layers": raw["num_kv_shared_layers"],
        "activation_sparsity_scale": torch.distributions.Normal(0, 1).icdf(shares).tolist(),
    }


def _gemma4(raw: Mapping[str, Any]) -> dict[str, Any]:
    sliding = [kind == SLIDING for kind in raw["layer_types"]]
    settings: dict[str, Any] = {
        "attention.shared_kv_layers": raw["num_kv_shared_layers"],
        "embedding_length_per_layer_input": raw["hidden_size_per_layer_input"],
        "rope.dimension_count": raw["global_head_dim"],
        "rope.dimension_count_swa": raw["head_dim"],
    }
    for end, size in (("", raw["global_head_dim"]), ("_swa", raw["head_dim"])):
        settings |= {f"attention.{part}_length{end}": size for part in ("key", "value")}
    if raw.get("use_double_wide_mlp"):
        own = raw["num_hidden_layers"] - raw["num_kv_shared_layers"]
        wide = raw["intermediate_size"]
        settings["feed_forward_length"] = [
            wide * (2 if i >= own else 1) for i in range(len(sliding))
        ]
    if (in_full := raw.get("num_global_key_value_heads")) is not None:
        own_heads = raw["num_key_value_heads"]
        settings["attention.head_count_kv"] = [own_heads if s else in_full for s in sliding]
    if raw.get("enable_moe_block"):
        settings |= {
            "expert_count": raw["num_experts"],
            "expert_used_count": raw["top_k_experts"],
            "expert_feed_forward_length": raw["moe_intermediate_size"],
        }
    return settings


def _tensors(
    arch: gguf.MODEL_ARCH, model: torch.nn.Module, raw: Mapping[str, Any]
) -> dict[str, np.ndarray | None]:
    """Return the tensors of a model, by their names in GGUF."""
    table = gguf.get_tensor_name_map(arch, raw["num_hidden_layers"])
    found: dict[str, np.ndarray | None] = {}
    stacks: dict[str, list[np.ndarray]] = {name: [] for name in STACKED}
    for name, parameter in model.state_dict().items():
        array = parameter.numpy()
        stack = next((s for s in STACKED if s in name), None)
        if name == "lm_head.weight":
            continue
        if stack is not None:
            stacks[stack].append(array)
        elif name.endswith(("router.scale", "per_expert_scale")):
            part = "ffn_gate_inp" if name.endswith("router.scale") else "ffn_down_exps"
            found[f"blk.{name.split('.')[2]}.{part}.scale"] = array
        else:
            weight = name if name.endswith(".weight") else f"{name}.weight"
            theirs = table.get_name(weight, try_suffixes=(".weight",))
            assert theirs is not None, name
            found[theirs] = array
    for name, parts in stacks.items():
        if parts:
            theirs = table.get_name(f"model.{name}.weight", try_suffixes=(".weight",))
            assert theirs is not None
            found[theirs] = np.stack(parts)
    if arch is gguf.MODEL_ARCH.GEMMA4:
        half = raw["global_head_dim"] // 2
        share = raw["rope_parameters"][FULL]["partial_rotary_factor"]
        turned = int(raw["global_head_dim"] * share / 2)
        freqs = np.full(half, FREQUENCY_OFF, np.float32)
        freqs[:turned] = 1
        found["rope_freqs.weight"] = freqs
    return found


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path) -> None:
    """Add the vocabulary of a Gemma 4: pieces, their types and the pairs of pieces."""
    shown = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
             "<tool_response|>", '<|"|>'}  # fmt: skip
    tokens, scores, types = [], [], []
    for text, score, kind in gguf.LlamaHfVocab(folder).all_tokens():
        tokens.append(text)
        scores.append(score)
        types.append(gguf.TokenType.USER_DEFINED if text.decode() in shown else kind)
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
