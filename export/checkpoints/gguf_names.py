"""Gives the tensors of a GGUF file our names: `gguf-py/gguf/tensor_mapping.py` in llama.cpp.

Some of ours are parts of a stack in the file, and some of the file's have no place here: those that
repeat the configuration, and keys and values that no layer reads.
"""

from collections.abc import Iterable, Iterator

from beam_gemma.model.config import NEWER, GemmaConfig
from export.checkpoints.gguf_header import GgufTensor
from export.checkpoints.gguf_tensors import joined, matrices_of, rows_of, stored_tensor
from export.checkpoints.tensors import StoredTensor

ROPE_FREQS = "rope_freqs.weight"
"""Divisors of the rotary frequencies of full layers, which follow from the configuration."""
PER_LAYER_TABLE = "per_layer_token_embd.weight"
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
}
# In Gemma 1, `post_attention_layernorm` is the norm before the feed-forward.
NORM_NAMES = {
    "gemma": {"ffn_norm": "post_attention_layernorm"},
    "gemma2": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
NORM_NAMES["gemma3_text"] = NORM_NAMES["gemma2"]
NEWER_LAYER_NAMES = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "altup_correct_coef": "altup.correction_coefs",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
    "ffn_gate_inp": "router.proj",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
PARAMETER_NAMES = {
    "altup_correct_scale.weight": "altup.correct_output_scale",
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
}
"""Names of what is no module's weight in Hugging Face's files."""
GATES, UPS = "ffn_gate_exps.weight", "ffn_up_exps.weight"
"""Halves of the experts' first matrices, which some files have apart."""
SHARED_NAMES = ("attn_k", "attn_v", "attn_k_norm")
TOP_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "per_layer_token_embd": "embed_tokens_per_layer",
    "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm",
    "dense_2": "dense.0",
    "dense_3": "dense.1",
}
STACKS = {
    "altup_proj.weight": "altup_projections",
    "altup_unembd_proj.weight": "altup_unembed_projections",
}


def named(config: GemmaConfig, tensors: Iterable[GgufTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield our name of each tensor and what it is, or its own name if it has no place.

    Raises:
        CheckpointError: numbers are in a format that cannot be decoded.
    """
    table, unused = _table(config), _unused(config)
    height = (config.altup_num_inputs or 1) - 1
    rest = {tensor.name: tensor for tensor in tensors}
    for name, tensor in rest.items():
        prefix, _, part = name.rpartition("blk.")[2].partition(".")
        if name in unused:
            continue
        if name in STACKS and len(tensor.shape) == 3 and tensor.shape[0] == height:
            for i, matrix in enumerate(matrices_of(tensor)):
                yield f"{STACKS[name]}.{i}.weight", stored_tensor(matrix)
        elif part == GATES and (ups := rest.get(f"blk.{prefix}.{UPS}")) is not None:
            yield f"layers.{prefix}.experts.gate_up_proj", joined(tensor, ups)
        elif part != UPS or f"blk.{prefix}.{GATES}" not in rest:
            yield table.get(name, name), stored_tensor(_as_long(tensor, config))


def _table(config: GemmaConfig) -> dict[str, str]:
    """Return our name by GGUF's for each tensor of an architecture."""
    is_newer = config.model_type in NEWER
    modules = LAYER_NAMES | NORM_NAMES["gemma2" if is_newer else config.model_type]
    modules |= NEWER_LAYER_NAMES if is_newer else {}
    layer = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in modules.items()}
    layer |= PARAMETER_NAMES if is_newer else {}
    table = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in TOP_NAMES.items()}
    for i in range(config.num_hidden_layers):
        table |= {f"blk.{i}.{theirs}": f"layers.{i}.{ours}" for theirs, ours in layer.items()}
    return table


def _unused(config: GemmaConfig) -> set[str]:
    """Return the GGUF names of what no layer reads."""
    shared = range(config.first_shared_layer, config.num_hidden_layers)
    freqs = {ROPE_FREQS} if config.model_type == "gemma4_text" else set()
    return freqs | {f"blk.{i}.{name}.weight" for i in shared for name in SHARED_NAMES}


def _as_long(tensor: GgufTensor, config: GemmaConfig) -> GgufTensor:
    """Return a table of per-layer embeddings without the rows that a converter has added."""
    rows = config.vocab_size_per_layer_input
    if tensor.name == PER_LAYER_TABLE and rows is not None and rows < tensor.shape[0]:
        return rows_of(tensor, 0, rows)
    return tensor
