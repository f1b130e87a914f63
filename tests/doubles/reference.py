"""Reference models: transformers' own classes with random weights under which every switch matters.

Freshly initialized models hide mistakes: norm weights are neutral, and scores so small that
softcaps, windows and scales leave no trace. So all weights are drawn anew, by parameter name, and
windows are smaller than the sequences.
"""

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.tensors import Checkpoint
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

VOCAB = 300
MAX_LENGTH = 512
WINDOW = 24
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SLIDING, FULL = "sliding_attention", "full_attention"
ROPE = {
    FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
MODELS: dict[str, dict[str, Any]] = {
    "gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 16},
    "gemma_mha": {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16},
    "gemma2": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    "vaultgemma": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_types": [FULL] * 2,
        "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma3_text": {
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 168,
        "layer_types": [SLIDING] * 5 + [FULL, SLIDING],
        "rope_parameters": ROPE,
    },
}
"""One of each architecture: MQA, MHA and GQA; both softcaps; heads of several widths."""
CLASSES = {
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "vaultgemma": (transformers.VaultGemmaConfig, transformers.VaultGemmaForCausalLM),
}


def tiny_model(name: str) -> torch.nn.Module:
    """Return one of `MODELS` in float32, weights drawn by parameter name."""
    config_class, model_class = CLASSES[name.removesuffix("_mha")]
    config = config_class(**SHAPE, **MODELS[name])
    return draw_weights(model_class._from_config(config, attn_implementation="eager"))


def draw_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model in float32 whose every weight makes a difference."""
    model = model.float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(parameter_name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif "embed" in parameter_name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model


def save_checkpoint(model: torch.nn.Module, folder: Path) -> Path:
    """Write a model as a Hugging Face folder with the tiny tokenizer."""
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    return folder


def real_model(path: Path) -> torch.nn.Module:
    """Return the Gemma 3 of a GGUF file in transformers, decoded to float32."""
    checkpoint = read_checkpoint(path)
    config = _hf_config(checkpoint)
    model = transformers.Gemma3ForCausalLM._from_config(config, attn_implementation="eager")
    state = {}
    for name, stored in checkpoint.tensors.items():
        tensor = torch.from_numpy(np.concatenate([c.astype(np.float32) for c in stored.chunks()]))
        # transformers adds 1 to norm weights, which GGUF has added already.
        state[f"model.{name}"] = tensor - 1 if name.endswith("norm.weight") else tensor
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def _hf_config(checkpoint: Checkpoint) -> transformers.Gemma3TextConfig:
    config = checkpoint.config
    return transformers.Gemma3TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        layer_types=list(config.layer_types),
        sliding_window=config.sliding_window,
        query_pre_attn_scalar=int(config.query_pre_attn_scalar),
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": rope.rope_theta}
            for kind, rope in config.rope_parameters
        },
    )


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Let a model in float64 stay there: the reference widens to float32 in norms and softmax."""
    to_float, softmax = torch.Tensor.float, torch.nn.functional.softmax

    def softmax_as_is(x: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
        del dtype
        return softmax(x, dim=dim)

    torch.Tensor.float = torch.Tensor.double  # type: ignore[assignment]
    torch.nn.functional.softmax = softmax_as_is
    try:
        yield
    finally:
        torch.Tensor.float, torch.nn.functional.softmax = to_float, softmax  # type: ignore[assignment]


@torch.no_grad()
def logits_of(model: torch.nn.Module, token_ids: list[int]) -> np.ndarray:
    """Return the logits [T, V] of one sequence, computed alone and in one pass."""
    is_double = next(model.parameters()).dtype == torch.float64
    with float64_throughout() if is_double else contextlib.nullcontext():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].numpy()
