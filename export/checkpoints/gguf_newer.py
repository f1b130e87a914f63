"""Reads the architecture of a GGUF file of Gemma 3n or Gemma 4 from its metadata.

What the metadata do not say follows from the tensors. Keys: `conversion/gemma.py` in llama.cpp, and
`load_arch_hparams` of `src/models/gemma3n.cpp` and `gemma4.cpp`.
"""

from statistics import NormalDist
from typing import Any

import numpy as np

from beam_gemma.errors import CheckpointError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.layer_types import FULL, SLIDING
from beam_gemma.model.newer_config import newer_config
from export.checkpoints.gguf_keys import PATTERN, Keys
from export.checkpoints.gguf_names import PER_LAYER_TABLE, ROPE_FREQS
from export.checkpoints.gguf_tensors import rows_of, stored_tensor

FULL_PERIOD = 5
"""After how many layers of a Gemma 3n a full one comes, if the file does not say it."""
PER_LAYER_ROWS = 262_144
"""Rows of every Gemma 3n's table of per-layer embeddings; newer converters add rows of zeros for
the rest of the vocabulary."""
NOT_TURNED = 1e29
"""Least divisor of a rotary frequency that stands for none; converters write 1e30."""


def newer_gguf_config(keys: Keys, raw: dict[str, Any]) -> GemmaConfig:
    """Return the architecture of a Gemma 3n or a Gemma 4.

    Args:
        keys: The metadata.
        raw: The keys of a `config.json` that all architectures have.

    Raises:
        CheckpointError: a key says what cannot be computed.
        ConfigError: a number is missing or out of bounds.
    """
    for key, value in (("rope.scaling.type", "none"), ("rope.scaling.factor", 1.0),
                       ("rope.scaling.attn_factor", 1.0), ("rope.scale_linear", 1.0)):  # fmt: skip
        keys.require(key, value)
    types = _layer_types(keys, raw["num_hidden_layers"])
    raw = raw | {
        "layer_types": types,
        "sliding_window": keys.get("attention.sliding_window"),
        "intermediate_size": keys.get("feed_forward_length"),
        "hidden_size_per_layer_input": keys.get("embedding_length_per_layer_input", 0),
        **(_gemma3n(keys) if keys.arch == "gemma3n" else _gemma4(keys, types)),
    }
    if raw["hidden_size_per_layer_input"]:
        raw["vocab_size_per_layer_input"] = _per_layer_rows(keys)
    return newer_config(raw)


def _layer_types(keys: Keys, layers: int) -> list[str]:
    types = keys.layer_types(layers)
    if types is None and keys.arch == "gemma4":
        raise keys.fault(PATTERN, f"true or false for {layers} layers", None)
    return types or [FULL if (i + 1) % FULL_PERIOD == 0 else SLIDING for i in range(layers)]


def _gemma3n(keys: Keys) -> dict[str, Any]:
    head_dim = keys.size("attention.key_length", "head_dim")
    for key in ("attention.value_length", "rope.dimension_count", "attention.key_length_swa",
                "attention.value_length_swa", "rope.dimension_count_swa"):  # fmt: skip
        keys.require(key, head_dim)
    return {
        "num_key_value_heads": keys.get("attention.head_count_kv"),
        "head_dim": head_dim,
        "rope_parameters": {
            SLIDING: {"rope_theta": keys.factor("rope.freq_base_swa", 1e4)},
            FULL: {"rope_theta": keys.factor("rope.freq_base", 1e6)},
        },
        "num_kv_shared_layers": keys.get("attention.shared_kv_layers"),
        "final_logit_softcapping": keys.factor("final_logit_softcapping", 30.0),
        "altup_num_inputs": keys.get("altup.num_inputs"),
        "altup_active_idx": keys.get("altup.active_idx"),
        "laurel_rank": keys.tensor("blk.0.laurel_l.weight").shape[0],
        "activation_sparsity_pattern": _sparsity(keys),
    }


def _sparsity(keys: Keys) -> list[float]:
    """Return the share of gates that each layer cuts.

    The file has the number of standard deviations above which a gate is kept, in float32, which
    stands for a share of few decimals.
    """
    normal, shares = NormalDist(), []
    for scale in _list(keys, "activation_sparsity_scale"):
        share = normal.cdf(scale)
        short = round(share, 4)
        is_near = 0 < short < 1 and abs(normal.inv_cdf(short) - scale) < 1e-5
        shares.append(short if is_near else share)
    return shares


def _list(keys: Keys, key: str) -> list[float]:
    """Return a list of numbers."""
    values = keys.get(key)
    if not isinstance(values, list) or not all(isinstance(v, float) and v == v for v in values):
        raise keys.fault(key, "a list of numbers", values)
    return values


def _per_layer_rows(keys: Keys) -> int:
    """Return the rows of the table of per-layer embeddings, without those that were added."""
    table = keys.tensor(PER_LAYER_TABLE)
    rows = table.shape[0]
    if keys.arch == "gemma3n" and rows > PER_LAYER_ROWS:
        added = stored_tensor(rows_of(table, PER_LAYER_ROWS, rows)).chunks()
        rows = rows if any(chunk.any() for chunk in added) else PER_LAYER_ROWS
    return rows


def _gemma4(keys: Keys, types: list[str]) -> dict[str, Any]:
    in_full = keys.size("attention.key_length", "global_head_dim")
    head_dim = keys.size("attention.key_length_swa", "head_dim")
    for end, size in (("", in_full), ("_swa", head_dim)):
        keys.require(f"attention.value_length{end}", size)
        keys.require(f"rope.dimension_count{end}", size)
    softcap = keys.get("final_logit_softcapping", None)
    shared = keys.get("attention.shared_kv_layers", 0)
    return {
        "head_dim": head_dim,
        "global_head_dim": in_full,
        **_kv_heads(keys, types),
        "attention_k_eq_v": _shares_projection(keys, types, shared),
        "rope_parameters": {
            SLIDING: {"rope_theta": keys.factor("rope.freq_base_swa", 1e4)},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": keys.factor("rope.freq_base", 1e6),
                "partial_rotary_factor": _turned_share(keys, in_full),
            },
        },
        "num_kv_shared_layers": shared,
        "final_logit_softcapping": softcap and keys.factor("final_logit_softcapping", softcap),
        **_experts(keys),
    }


def _kv_heads(keys: Keys, types: list[str]) -> dict[str, Any]:
    """Return the numbers of key-value heads, which a file may list for each layer."""
    key = "attention.head_count_kv"
    given = keys.get(key)
    if not isinstance(given, list):
        return {"num_key_value_heads": given}
    by_type = {kind: {n for n, k in zip(given, types, strict=False) if k == kind} for kind in types}
    if len(given) != len(types) or any(len(numbers) > 1 for numbers in by_type.values()):
        raise keys.fault(key, f"one number for each type of the {len(types)} layers", given)
    full = [*by_type.get(FULL, ())]
    sliding = [*by_type.get(SLIDING, full)]
    return {"num_key_value_heads": sliding[0], "num_global_key_value_heads": (full or [None])[0]}


def _shares_projection(keys: Keys, types: list[str], shared: Any) -> bool:
    """Return whether no full layer with keys of its own has a matrix for values."""
    names = {tensor.name for tensor in keys.file.tensors}
    own = len(types) - (shared if type(shared) is int else 0)
    full = [i for i, kind in enumerate(types[: max(own, 0)]) if kind == FULL]
    return bool(full) and not any(f"blk.{i}.attn_v.weight" in names for i in full)


def _turned_share(keys: Keys, head_dim: int) -> float:
    """Return the share of a full layer's frequencies that turn, from their divisors.

    Raises:
        CheckpointError: the divisors are not 1 for the first and 1e30 for the others.
    """
    tensor = keys.tensor(ROPE_FREQS)
    if tensor.shape == (head_dim // 2,):
        divisors = stored_tensor(tensor).rows(0, head_dim // 2)
        turned = int(np.count_nonzero(divisors == 1))
        if turned and (divisors[:turned] == 1).all() and (divisors[turned:] >= NOT_TURNED).all():
            return turned / len(divisors)
    raise CheckpointError(
        f"{keys.file.path}: expected {ROPE_FREQS} as {head_dim // 2} numbers, 1 for the first and "
        f"1e30 for the others, got another rotary embedding of the shape {list(tensor.shape)}"
    )


def _experts(keys: Keys) -> dict[str, Any]:
    if not keys.get("expert_count", 0):
        return {}
    return {
        "enable_moe_block": True,
        "num_experts": keys.get("expert_count"),
        "top_k_experts": keys.get("expert_used_count"),
        "moe_intermediate_size": keys.get("expert_feed_forward_length"),
    }
