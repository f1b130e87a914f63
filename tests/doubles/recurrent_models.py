"""A tiny RecurrentGemma: transformers' own class with random weights, and what we make of it.

Its recurrent blocks are wider than the model, its windows smaller than the sequences, and its
decays spread as widely as those of published models.
"""

import zlib
from pathlib import Path

import torch
import transformers

from export.__main__ import export
from tests.doubles.once import exporter_digest, kept
from tests.doubles.reference import VOCAB, draw_weights, save_checkpoint

WINDOW = 23
"""The file's `attention_window_size`: tokens before its own that a token attends to."""
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "lru_width": 128,
    "logits_soft_cap": 2.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tiny_recurrent() -> Path:
    """Return a folder with `checkpoint`, as Hugging Face has it, and `artifact`, for the CPU."""

    def make(folder: Path) -> None:
        export(save_checkpoint(recurrent_model(), folder / "checkpoint"), folder / "artifact")

    return kept(f"tiny-recurrent-{exporter_digest()}", make)


def recurrent_model(window: int = WINDOW, num_layers: int = 6, **other: int) -> torch.nn.Module:
    """Return the model in float32, weights drawn by parameter name.

    Args:
        window: Its `attention_window_size`. Transformers counts a token itself among them; so
            `WINDOW + 1` computes there what `WINDOW` does in the original.
        num_layers: Layers; every third one attends.
        other: Other sizes than those of `SHAPE`.
    """
    shape = {**SHAPE, "attention_window_size": window, "num_hidden_layers": num_layers, **other}
    config = transformers.RecurrentGemmaConfig(**shape)
    model = transformers.RecurrentGemmaForCausalLM._from_config(config, attn_implementation="eager")
    model = draw_weights(model)
    for name, parameter in model.named_parameters():
        if name.endswith("recurrent_param"):
            with torch.no_grad():
                parameter.copy_(decay_parameters(name, len(parameter)))
    return model


def decay_parameters(name: str, width: int) -> torch.Tensor:
    """Return numbers whose softplus is -log r, with r between 0.9 and 0.999, drawn by name.

    Source: `rnn_param_init` in `torch/layers.py` of recurrentgemma 1.0.1.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    squares = torch.rand(width, generator=generator) * (0.999**2 - 0.9**2) + 0.9**2
    return torch.log(torch.expm1(-0.5 * torch.log(squares)))
