"""Tiny models that see: transformers' own classes with random weights and two-sided attention.

Windows are smaller than a picture with its text, pictures take 16 tokens, heads of the tower are 18
wide, and the norm's epsilon is large enough to matter.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file

from tests.doubles.reference import FULL, ROPE, SLIDING, draw_weights
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

Layout = Literal["hub", "new", "saved"]
"""Names of tensors: those of published files, those of models in memory today, or those that
`save_pretrained` writes."""

HIDDEN = 48
MAX_LENGTH = 256
WINDOW = 10
"""Smaller than the tokens of a picture."""
NUM_IMAGE_TOKENS = 16
PIECES = 300
"""Pieces of the tiny tokenizer before those of pictures."""
GEMMA3_MARKERS = ("<end_of_image>",)
SOFT_TOKEN = "<image_soft_token>"
"""Piece that only the settings of Gemma 3's tokenizer name; `tokenizer.model` ends before it."""
PALIGEMMA_MARKERS = (
    *(f"<loc{i:04}>" for i in range(1024)),
    *(f"<seg{i:03}>" for i in range(128)),
)
IMAGE = "<image>"
"""PaliGemma's piece of a picture, which its tokenizer's settings name."""
BEGIN_ID, END_ID, SOFT_ID = 6, PIECES, PIECES + 1
YES_ID, NO_ID = 40, 41
IMAGE_ID = PIECES + len(PALIGEMMA_MARKERS)
VOCAB = {"gemma3": 320, "shieldgemma2": 320, "paligemma": 1472, "paligemma2": 1472}
"""Rows of the embedding: like those of published models, a few more than pieces."""
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": MAX_LENGTH,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 7,
    "layer_norm_eps": 1e-3,
    "vision_use_head": False,
}
IMAGE_SIZE = {"gemma3": 56, "shieldgemma2": 56, "paligemma": 28, "paligemma2": 28}
GEMMA3_TEXT = {
    **TEXT,
    "model_type": "gemma3_text",
    "vocab_size": VOCAB["gemma3"],
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 9,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
    "rope_parameters": ROPE,
}
GEMMA_TEXT = {
    **TEXT,
    "model_type": "gemma",
    "vocab_size": VOCAB["paligemma"],
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
}
GEMMA2_TEXT = {
    **TEXT,
    "model_type": "gemma2",
    "vocab_size": VOCAB["paligemma2"],
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 9,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 2.0,
}
MODELS = ("gemma3", "shieldgemma2", "paligemma", "paligemma2")


def tiny_vision_model(name: str) -> torch.nn.Module:
    """Return one of `MODELS` in float32, weights drawn by parameter name."""
    return drawn(MODEL_CLASSES[name](vision_model_config(name)))


def vision_model_config(name: str) -> Any:
    """Return transformers' configuration of one of `MODELS`, with eager attention throughout."""
    tower = {**TOWER, "image_size": IMAGE_SIZE[name]}
    if name in ("paligemma", "paligemma2"):
        config = transformers.PaliGemmaConfig(
            text_config=GEMMA_TEXT if name == "paligemma" else GEMMA2_TEXT,
            vision_config=tower,
            projection_dim=HIDDEN,
            hidden_size=HIDDEN,
            image_token_index=IMAGE_ID,
            vocab_size=IMAGE_ID,
        )
    else:
        config_class = {
            "gemma3": transformers.Gemma3Config,
            "shieldgemma2": transformers.ShieldGemma2Config,
        }[name]
        other = {} if name == "gemma3" else {"yes_token_index": YES_ID, "no_token_index": NO_ID}
        config = config_class(
            text_config=GEMMA3_TEXT,
            vision_config=tower,
            mm_tokens_per_image=NUM_IMAGE_TOKENS,
            boi_token_index=BEGIN_ID,
            eoi_token_index=END_ID,
            image_token_index=SOFT_ID,
            **other,
        )
    config._attn_implementation = "eager"
    return config


MODEL_CLASSES = {
    "gemma3": transformers.Gemma3ForConditionalGeneration,
    "shieldgemma2": transformers.ShieldGemma2ForImageClassification,
    "paligemma": transformers.PaliGemmaForConditionalGeneration,
    "paligemma2": transformers.PaliGemmaForConditionalGeneration,
}


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model in float32 whose every weight makes a difference, those for pictures too."""
    model = draw_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # `draw_weights` takes patches for embeddings of ids, and adds to biases, which
            # transformers initializes at random.
            is_kernel = name.endswith("patch_embedding.weight")
            if is_kernel or name.endswith(".bias"):
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = torch.randn(parameter.shape, generator=generator)
                fan_in = math.prod(parameter.shape[1:])
                parameter.copy_(noise * (1.5 / fan_in**0.5 if is_kernel else 0.2))
    return model


def seeing_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the part with `get_image_features`; that of ShieldGemma 2 lies one level deeper."""
    return model if hasattr(model, "get_image_features") else model.model


def image_features(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return transformers' features [N, L, D] of uint8 pixels [N, 3, I, I], mean and std 0.5."""
    dtype = next(model.parameters()).dtype
    values = (pixels.to(dtype) / 255 - 0.5) / 0.5
    with torch.no_grad():
        return seeing_model(model).get_image_features(values).pooler_output


def vision_tokenizer_model(name: str) -> bytes:
    """Return the SentencePiece model of one of `MODELS`."""
    return tiny_tokenizer_model(
        PALIGEMMA_MARKERS if name.startswith("paligemma") else GEMMA3_MARKERS
    )


def tokenizer_settings(name: str) -> dict[str, Any]:
    """Return a `tokenizer_config.json`, which names the piece that stands for a picture."""
    token_id, piece = (IMAGE_ID, IMAGE) if name.startswith("paligemma") else (SOFT_ID, SOFT_TOKEN)
    return {"added_tokens_decoder": {str(token_id): {"content": piece, "special": True}}}


def preprocessor_settings(name: str) -> dict[str, Any]:
    """Return a `preprocessor_config.json` with the keys of published ones."""
    settings: dict[str, Any] = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_seq_length": NUM_IMAGE_TOKENS,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE[name], "width": IMAGE_SIZE[name]},
    }
    if name.startswith("paligemma"):
        return settings | {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "PaliGemmaProcessor",
            "resample": 3,
        }
    return settings | {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "do_pan_and_scan": None,
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
    }


def name_of(model: torch.nn.Module) -> str:
    """Return which of `MODELS` a model is."""
    config: Any = model.config
    is_second = config.model_type == "paligemma" and config.text_config.model_type == "gemma2"
    return "paligemma2" if is_second else str(config.model_type)


def save_vision_checkpoint(
    model: torch.nn.Module,
    folder: Path,
    *,
    layout: Layout = "hub",
    chat_template: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a model as a Hugging Face folder, as it is published.

    Args:
        model: One of `tiny_vision_model`.
        folder: Folder to write.
        layout: Names of the tensors.
        chat_template: Content of `chat_template.jinja`; None for none.
        dtype: Type of the numbers; `saved` writes those of the model.
    """
    name = name_of(model)
    model.save_pretrained(folder)
    if layout != "saved":
        tensors = {
            published_name(parameter, layout): value.detach().to(dtype).contiguous()
            for parameter, value in model.named_parameters()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files: Mapping[str, Any] = {
        "preprocessor_config.json": preprocessor_settings(name),
        "tokenizer_config.json": tokenizer_settings(name),
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    (folder / "tokenizer.model").write_bytes(vision_tokenizer_model(name))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def published_name(parameter: str, layout: Layout) -> str:
    """Return the name on disk of a parameter in memory."""
    outer = "model." if parameter.startswith("model.model.") else ""
    name = parameter.removeprefix(outer)
    tower = "model.vision_tower."
    if name.startswith(tower):
        name = f"{tower}vision_model.{name.removeprefix(tower)}"
    if layout == "hub":
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
    return outer + name
