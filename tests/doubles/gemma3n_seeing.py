"""A tiny Gemma 3n that sees: transformers' own class around `tests.doubles.mobilenet`.

Its tower takes pictures of 96 pixels and makes 4 features of each. As in released models, the ids
of pictures and of sound come behind those of the tokenizer.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3n import modeling_gemma3n
from transformers.models.gemma3n.feature_extraction_gemma3n import Gemma3nAudioFeatureExtractor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.doubles.gemma3n_models import GEMMA3N_SHAPE, MODELS, draw_gemma3n
from tests.doubles.mobilenet import TINY, TINY_NAME, MobileNet
from tests.doubles.published_processors import published_tokenizer
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

BEGIN_ID, END_ID, IMAGE_ID = 6, 300, 301
NUM_FEATURES = TINY.output_side**2
VISION: dict[str, Any] = {
    "architecture": TINY_NAME,
    "hidden_size": TINY.hidden_size,
    "vocab_size": 8,
    "vocab_offset": 300,
}
SOUND: dict[str, Any] = {
    "vocab_size": 8,
    "vocab_offset": 308,
    "input_feat_size": 32,
    "hidden_size": 32,
    "conf_attention_chunk_size": 4,
    "conf_attention_context_left": 5,
    "conf_num_attention_heads": 4,
    "conf_num_hidden_layers": 1,
    "conf_reduction_factor": 2,
    "sscp_conv_channel_size": (8, 4),
}
VOCAB = SOUND["vocab_offset"] + SOUND["vocab_size"]
PROCESSOR: dict[str, Any] = {
    "dither": 0.0,
    "do_convert_rgb": None,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "Gemma3nAudioFeatureExtractor",
    "fft_length": 1024,
    "image_mean": [0.5] * 3,
    "image_processor_type": "SiglipImageProcessorFast",
    "image_seq_length": NUM_FEATURES,
    "image_std": [0.5] * 3,
    "processor_class": "Gemma3nProcessor",
    "resample": 2,
    "rescale_factor": 1 / 255,
    "sampling_rate": 16000,
    "size": {"height": TINY.image_size, "width": TINY.image_size},
}
"""Settings as they are published, of pictures and of sound in one file."""


class TimmWrapper(nn.Module):
    """What transformers makes of a tower of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.timm_model = MobileNet(TINY)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        dtype = self.timm_model.msfa.norm.weight.dtype
        return BaseModelOutputWithPooling(last_hidden_state=self.timm_model(pixel_values.to(dtype)))


def seeing_gemma3n() -> torch.nn.Module:
    """Return the model in float32, weights drawn by parameter name."""
    text = {**GEMMA3N_SHAPE, **MODELS["gemma3n"], "vocab_size": VOCAB}
    text["vocab_size_per_layer_input"] = VISION["vocab_offset"]
    config = transformers.Gemma3nConfig(
        text_config=text,
        vision_config=VISION,
        audio_config=SOUND,
        boi_token_id=BEGIN_ID,
        eoi_token_id=END_ID,
        image_token_id=IMAGE_ID,
        boa_token_id=7,
        eoa_token_id=308,
        audio_token_id=309,
        vision_soft_tokens_per_image=NUM_FEATURES,
    )
    with _our_tower():
        model = transformers.Gemma3nForConditionalGeneration._from_config(
            config, attn_implementation="eager"
        )
    draw_gemma3n(model)
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            if parameter.ndim > 1:  # drawn for as many inputs as the last side of a kernel has
                parameter.mul_((parameter.shape[-1] / parameter[0].numel()) ** 0.5 / 1.5)
        # As in published files, where ids of pictures and sound have copies of the row of <pad>, so
        # that none is ever the likeliest token.
        table = model.get_input_embeddings().weight
        table[VISION["vocab_offset"] :] = table[0]
    return model


@contextmanager
def _our_tower() -> Iterator[None]:
    """Context manager in which transformers builds our double in place of a tower of timm."""
    build = modeling_gemma3n.AutoModel.from_config

    def from_config(config: Any, **other: Any) -> nn.Module:
        return TimmWrapper() if config.model_type == "gemma3n_vision" else build(config, **other)

    with mock.patch.object(modeling_gemma3n.AutoModel, "from_config", from_config):
        yield


@torch.no_grad()
def picture_rows(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return transformers' embeddings [N, 5, D] of pictures [N, 3, S, S] in uint8.

    The last one of each is that of the token behind it.
    """
    inner: Any = model.model
    dtype = inner.embed_vision.embedding.weight.dtype
    soft = inner.get_image_features(pixels.to(dtype) / 255).pooler_output
    hard = inner.embed_vision(input_ids=torch.tensor([[END_ID]]))
    return torch.cat((soft, hard.expand(len(soft), -1, -1)), dim=1)


def published_processor() -> transformers.Gemma3nProcessor:
    """Return transformers' processor of prompts, in its form for Pillow.

    Its tokenizer has pieces of pictures and sound beside those of the folder's.
    """
    images = SiglipImageProcessorPil(
        size=PROCESSOR["size"], resample=PROCESSOR["resample"], do_normalize=False
    )
    return transformers.Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(),
        images,
        published_tokenizer("gemma3n"),
        image_seq_length=NUM_FEATURES,
    )


def save_seeing_gemma3n(model: torch.nn.Module, folder: Path) -> Path:
    """Write the model as a Hugging Face folder, as it is published, but without what it hears with.

    Tensors for sound, which transformers' class always has, are of no use then.
    """
    model.save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "audio_config": None}))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    return folder
