"""Tiny Gemma 4 models that see and hear: transformers' own classes with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from beam_gemma.model.sound_settings import GEMMA4_PIECES
from tests.doubles.gemma4_hearing import BINS, CONFORMER, FRAME
from tests.doubles.gemma4_models import GEMMA4_MODELS, GEMMA4_SHAPE, draw_newer
from tests.doubles.gemma4_seeing import IMAGE_PROCESSOR, MARKERS, SQUARES, TOWER, draw_towers
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

VOCAB = 320
IMAGE, AUDIO = (300, 301, 302), (303, 304, 305)
"""Ids before a picture or a clip, for each of its tokens, and behind it."""
IDS: dict[str, Any] = {
    "boi_token_id": IMAGE[0],
    "image_token_id": IMAGE[1],
    "eoi_token_id": IMAGE[2],
    "boa_token_id": AUDIO[0],
    "audio_token_id": AUDIO[1],
    "eoa_token_index": AUDIO[2],
    "video_token_id": 306,
}
OMNI = ("gemma4_e2b", "gemma4_unified")
"""Like E2B and E4B, and like 12B, which has no towers and whose pictures attend both ways."""


def omni_model(name: str) -> torch.nn.Module:
    """Return one of `OMNI` in float32, weights drawn by parameter name."""
    is_unified = name == "gemma4_unified"
    shape = {**GEMMA4_SHAPE, **GEMMA4_MODELS["gemma4_dense" if is_unified else name]}
    text = {**shape, "vocab_size": VOCAB, "num_hidden_layers": len(shape["layer_types"])}
    if is_unified:
        text.pop("hidden_size_per_layer_input")
        text["use_bidirectional_attention"] = "vision"
    else:
        text["vocab_size_per_layer_input"] = VOCAB
    kind = "Gemma4Unified" if is_unified else "Gemma4"
    config = getattr(transformers, f"{kind}Config")(
        text_config=text,
        vision_config=SQUARES if is_unified else {**TOWER, "use_clipped_linears": True},
        audio_config={"audio_embed_dim": FRAME} if is_unified else CONFORMER,
        **IDS,
    )
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    return draw_towers(draw_newer(model_class._from_config(config, attn_implementation="eager")))


def save_omni(model: torch.nn.Module, folder: Path) -> Path:
    """Write a model as a Hugging Face folder, as it is published."""
    model.save_pretrained(folder)
    config: Any = model.config
    is_unified = config.model_type == "gemma4_unified"
    extractor: dict[str, Any] = {"feature_size": FRAME if is_unified else BINS}
    if is_unified:
        extractor["audio_samples_per_token"] = FRAME
    settings = {
        "image_processor": IMAGE_PROCESSOR,
        "feature_extractor": extractor,
        "audio_seq_length": 7_500 if is_unified else 750,
        "image_seq_length": 70,
        "processor_class": "Gemma4Processor",
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
    pieces = (*MARKERS, *(GEMMA4_PIECES[k] for k in ("begin_token", "audio_token", "end_token")))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model(pieces))
    return folder
