"""Tiny models that hear: transformers' own classes with random weights.

Like Gemma 4 E2B, Gemma 4 12B, EmbeddingGemma 2 and Gemma 3n. Frames have 16 mel bins, or 64 samples
in the model without a tower; caps and clipping are so small that they change numbers, and bounds of
products are drawn so that they cut some of them.
"""

import contextlib
import functools
import json
import math
import shutil
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from transformers.models.gemma3n import modeling_gemma3n

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.signature import Signature
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.sound_settings import GEMMA3N_PIECES, GEMMA4_PIECES, read_sound_config
from export.__main__ import export
from export.checkpoints.sound_tensors import is_of_sound, sound_name
from export.graph.signatures import sound_signature
from tests.doubles import gemma3n_models
from tests.doubles.embedding_gemma2_models import TEXT as EMBEDDING_TEXT
from tests.doubles.gemma4_models import GEMMA4_MODELS, GEMMA4_SHAPE, draw_newer
from tests.doubles.gemma4_seeing import draw_towers
from tests.doubles.once import exporter_digest, kept
from tests.doubles.reference import float64_throughout
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

BINS, FRAME = 16, 64
"""Mel bins of a frame, and samples of one without a tower."""
BEGIN_ID, AUDIO_ID, END_ID = 300, 301, 302
VOCAB = 320
USM_VOCAB, USM_OFFSET = 8, VOCAB - 8
"""Ids of sound in the Gemma 3n; the first is `<end_of_audio>`, the next `<audio_soft_token>`."""
MARKER_IDS: dict[str, Any] = {
    "boi_token_id": 303,
    "eoi_token_id": 304,
    "image_token_id": 305,
    "video_token_id": 306,
    "boa_token_id": BEGIN_ID,
    "eoa_token_index": END_ID,
    "audio_token_id": AUDIO_ID,
}
CONFORMER: dict[str, Any] = {
    "model_type": "gemma4_audio",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "subsampling_conv_channels": [BINS, 6],
    "output_proj_dims": 20,
    "attention_logit_cap": 3.0,
    "residual_weight": 0.4,
    "gradient_clipping": 1.5,
    "rms_norm_eps": 1e-3,
}
WIDE_REACH: dict[str, Any] = {
    "attention_chunk_size": 5,
    "attention_context_left": 9,
    "attention_context_right": 3,
    "conv_kernel_size": 3,
    "use_clipped_linears": False,
}
"""Blocks and contexts of other widths than the released ones."""
USM: dict[str, Any] = {
    "model_type": "gemma3n_audio",
    "vocab_size": USM_VOCAB,
    "vocab_offset": USM_OFFSET,
    "input_feat_size": BINS,
    "hidden_size": 24,
    "rms_norm_eps": 1e-3,
    "gradient_clipping": 1.5,
    "conf_num_attention_heads": 3,
    "conf_num_hidden_layers": 2,
    "conf_attention_logit_cap": 3.0,
    "conf_residual_weight": 0.4,
    "sscp_conv_channel_size": [5, 6],
    "sscp_conv_group_norm_eps": 0.05,
}
HEARING = ("gemma4_e2b", "gemma4_wide_reach", "gemma4_unified", "embedding_gemma2", "gemma3n")

PUBLISHED = ("gemma4_e2b", "gemma4_unified", "gemma3n")
"""Those that generate from sound."""


def hearing_model(name: str) -> torch.nn.Module:
    """Return one of `HEARING` in float32, weights drawn by parameter name."""
    if name == "gemma3n":
        return _gemma3n()
    if name == "embedding_gemma2":
        config: Any = transformers.EmbeddingGemma2Config(
            text_config={**EMBEDDING_TEXT, "vocab_size": VOCAB},
            vision_config=None,
            audio_config=CONFORMER,
            **MARKER_IDS,
        )
        model: Any = transformers.EmbeddingGemma2Model(config)
    else:
        is_unified = name == "gemma4_unified"
        text_name = "gemma4_dense" if is_unified else "gemma4_e2b"
        shape = {**GEMMA4_SHAPE, **GEMMA4_MODELS[text_name], "vocab_size": VOCAB}
        if "vocab_size_per_layer_input" in shape:
            shape["vocab_size_per_layer_input"] = VOCAB
        text = {**shape, "num_hidden_layers": len(shape["layer_types"])}
        if is_unified:
            text.pop("hidden_size_per_layer_input")
        kind = "Gemma4Unified" if is_unified else "Gemma4"
        tower = {**CONFORMER, **(WIDE_REACH if name == "gemma4_wide_reach" else {})}
        config = getattr(transformers, f"{kind}Config")(
            text_config=text,
            vision_config=None,
            audio_config={"audio_embed_dim": FRAME} if is_unified else tower,
            **MARKER_IDS,
        )
        model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
        towers = {"": "eager", "text_config": "eager", "audio_config": "eager"}
        model = model_class._from_config(config, attn_implementation=towers)
    return draw_towers(draw_newer(model))


def _gemma3n() -> torch.nn.Module:
    """Return a Gemma 3n without a tower of pictures, which would need timm."""
    text = gemma3n_models.gemma3n_model("gemma3n", vocab_size=VOCAB)
    config = transformers.Gemma3nConfig(
        text_config=text.config.to_dict(),
        audio_config=USM,
        boa_token_id=BEGIN_ID,
        eoa_token_id=USM_OFFSET,
        audio_token_id=USM_OFFSET + 1,
        vision_config={"vocab_size": 4, "vocab_offset": USM_OFFSET - 4, "hidden_size": 24},
    )
    with _without_pictures():
        model = transformers.Gemma3nForConditionalGeneration._from_config(
            config, attn_implementation="eager"
        )
    model = draw_towers(draw_newer(model))
    inner: Any = model.model
    inner.language_model.load_state_dict(text.model.state_dict())
    return model


@contextlib.contextmanager
def _without_pictures() -> Iterator[None]:
    made = transformers.AutoModel.from_config

    def from_config(config: Any, *args: Any, **kwargs: Any) -> Any:
        is_vision = config.model_type == "gemma3n_vision"
        return torch.nn.Module() if is_vision else made(config, *args, **kwargs)

    with mock.patch.object(modeling_gemma3n.AutoModel, "from_config", from_config):
        yield


def sound_config(model: torch.nn.Module) -> tuple[SoundConfig, Signature]:
    """Return what a model has for sound, and the signature of its graph for the CPU."""
    config: Any = model.config
    raw = config.to_dict()
    is_unified = config.model_type == "gemma4_unified"
    settings = {"feature_size": FRAME if is_unified else BINS}
    if is_unified:
        settings["audio_samples_per_token"] = FRAME
    sound = read_sound_config(raw, settings)
    assert sound is not None
    text: Any = types.SimpleNamespace(
        vocab_size=VOCAB,
        hidden_size=config.text_config.hidden_size,
        max_position_embeddings=config.text_config.max_position_embeddings,
    )
    return sound, sound_signature(text, sound, device="cpu", dtype="float32")


def sound_weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return what a model has for sound, by our names."""
    named = {name.removeprefix("model."): x for name, x in model.state_dict().items()}
    return {sound_name(n): x.numpy().copy() for n, x in named.items() if is_of_sound(n)}


def clip(num_frames: int, width: int, *, seed: int = 5) -> np.ndarray:
    """Return the frames of a clip, float32."""
    draw = np.random.default_rng((seed, num_frames))
    return (2 * draw.standard_normal((num_frames, width))).astype(np.float32)


def clip_features(model: torch.nn.Module, frames: np.ndarray) -> np.ndarray:
    """Return what transformers puts in the places of a clip's tokens, [L, D].

    Behind the frames comes one that is padding, as there may be behind a clip alone. The rows of a
    Gemma 3n end with that of `<end_of_audio>`.
    """
    config: Any = model.config
    values = torch.from_numpy(frames).to(next(model.parameters()).dtype)[None]
    if config.model_type == "gemma3n":
        number = config.audio_soft_tokens_per_image
        ids = [BEGIN_ID, *[config.audio_token_id] * number, config.eoa_token_id]
        mask = torch.ones(values.shape[:2], dtype=torch.bool)
        return _given_embeddings(model, ids, values, mask)[1:]
    values = torch.nn.functional.pad(values, (0, 0, 0, 1))
    mask = torch.arange(values.shape[1])[None] < len(frames)
    inner: Any = getattr(model, "model", model)
    with torch.no_grad():
        found = inner.get_audio_features(values, mask)
    return found.pooler_output[found.attention_mask].numpy()


@torch.no_grad()
def exact_features(model: torch.nn.Module, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return `clip_features` in float64, with constants in float64 too; the model stays there."""
    model = model.double()
    for module in model.modules():
        if hasattr(module, "inv_timescales"):
            number = module.inv_timescales.shape[-1]
            step = math.log(1e4) / max(number - 1, 1)
            module.inv_timescales.copy_((torch.arange(number).double() * -step).exp())
        if isinstance(module, modeling_gemma3n.Gemma3nAudioAttention):
            module.q_scale.fill_(module.head_dim**-0.5 / math.log(2))
    # The norms of Gemma 3n's convolutions name float32 as the dtype that they compute in.
    with float64_throughout(), mock.patch.object(torch, "float32", torch.float64):
        return [clip_features(model, frames) for frames in clips]


def _given_embeddings(
    model: torch.nn.Module, ids: list[int], values: torch.Tensor, mask: torch.Tensor
) -> np.ndarray:
    """Return the embeddings [T, D] that the decoder of a model takes for ids."""
    taken: list[torch.Tensor] = []

    def take(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        taken.append(kwargs["inputs_embeds"][0])

    inner: Any = model.model
    hook = inner.language_model.register_forward_pre_hook(take, with_kwargs=True)
    try:
        with torch.no_grad():
            inner(
                input_ids=torch.tensor([ids]), input_features=values, input_features_mask=mask,
                use_cache=False,
            )  # fmt: skip
    finally:
        hook.remove()
    return taken[0].numpy()


@functools.cache
def hearing_artifact(name: str) -> Artifact:
    """Return the export for the CPU of one of `PUBLISHED`, made once for an exporter."""

    def make(folder: Path) -> None:
        checkpoint = folder.with_name(f"{folder.name}-checkpoint")
        save_hearing(hearing_model(name), checkpoint)
        export(checkpoint, folder, tasks=("generate",))
        shutil.rmtree(checkpoint)

    return Artifact.open(kept(f"hearing-{name}-{exporter_digest()}", make))


def save_hearing(model: torch.nn.Module, folder: Path) -> Path:
    """Write a model as a Hugging Face folder, as it is published."""
    model.save_pretrained(folder)
    config: Any = model.config
    raw = json.loads((folder / "config.json").read_text())
    pieces: list[str]
    if config.model_type == "gemma3n":
        del raw["vision_config"]
        (folder / "config.json").write_text(json.dumps(raw))
        pieces = [f"<unused{i}>" for i in range(USM_OFFSET + 2 - BEGIN_ID)]
        pieces[0] = GEMMA3N_PIECES["begin_token"]
        pieces[-2:] = "<end_of_audio>", GEMMA3N_PIECES["audio_token"]
        extractor = {"feature_extractor_type": "Gemma3nAudioFeatureExtractor", "feature_size": BINS}
        number = config.audio_soft_tokens_per_image
    else:
        pieces = [GEMMA4_PIECES[key] for key in ("begin_token", "audio_token", "end_token")]
        extractor = {"feature_extractor_type": "Gemma4AudioFeatureExtractor", "feature_size": BINS}
        if config.model_type == "gemma4_unified":
            extractor = {
                "feature_extractor_type": "Gemma4UnifiedAudioFeatureExtractor",
                "feature_size": FRAME,
                "audio_samples_per_token": FRAME,
            }
        number = math.ceil(480_000 / FRAME) if config.model_type == "gemma4_unified" else 750
    settings = {"feature_extractor": extractor, "audio_seq_length": number}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model(pieces))
    return folder
