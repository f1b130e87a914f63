"""The released sizes of the family, with the keys of Hugging Face's `config.json`.

Parameter counts are from the technical reports (Gemma 1 and 2, table 2 of each: non-embedding
parameters) and from KerasHub's presets (Gemma 3, PaliGemma and T5Gemma, whole
models).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beam_gemma.model.config import ENCODER_DECODERS, NEWER, GemmaConfig
from beam_gemma.model.encoder_decoder_config import encoder_decoder_configs, picture_settings
from beam_gemma.model.layer_types import FULL
from beam_gemma.model.newer_config import is_newer, newer_config
from beam_gemma.model.recurrent_config import RECURRENT_TYPE, recurrent_config
from beam_gemma.model.vision_config import VISION_MODEL_TYPES, VisionConfig
from export.checkpoints.newer_shapes import newer_shapes
from export.checkpoints.recurrent_shapes import recurrent_shapes
from export.checkpoints.tensors import EMBEDDING, ENCODER, EOI, HEAD
from export.checkpoints.vision_folder import text_config
from export.checkpoints.vision_tensors import vision_shapes


@dataclass(frozen=True, kw_only=True)
class Size:
    """The architecture of one released size."""

    name: str
    shared_by: tuple[str, ...] = ()
    """Other models with the same shapes."""
    raw: Mapping[str, Any]
    """Content of the `config.json`."""
    num_parameters: int | None = None
    """Published parameter count, without the embedding for Gemma 1 and 2; None if only a rounded
    number is published."""
    counts_embedding: bool = True

    @property
    def config(self) -> GemmaConfig:
        """The architecture of the decoder."""
        if self.raw["model_type"] in ENCODER_DECODERS:
            return encoder_decoder_configs(self.raw)[0]
        if self.raw["model_type"] == RECURRENT_TYPE:
            return recurrent_config(self.raw)
        if is_newer(self.raw):
            return newer_config(self.raw)
        takes_pictures = self.raw["model_type"] in VISION_MODEL_TYPES
        return GemmaConfig.from_hf(text_config(self.raw) if takes_pictures else self.raw)

    @property
    def encoder(self) -> GemmaConfig | None:
        """The architecture of the encoder, if there is one."""
        has_encoder = self.raw["model_type"] in ENCODER_DECODERS
        return encoder_decoder_configs(self.raw)[1] if has_encoder else None

    @property
    def vision(self) -> VisionConfig | None:
        """The tower of pictures, if there is one."""
        if self.raw["model_type"] == "t5gemma2":
            return VisionConfig.from_hf(picture_settings(self.raw))
        takes_pictures = self.raw["model_type"] in VISION_MODEL_TYPES
        return VisionConfig.from_hf(self.raw) if takes_pictures else None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, under the names of `export.modules`."""
        config, vision, encoder = self.config, self.vision, self.encoder
        pictures = {} if vision is None else vision_shapes(vision, config.hidden_size)
        sources = {} if encoder is None else encoder_shapes(encoder)
        return tensor_shapes(config) | sources | pictures


def tensor_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, under the names of `export.modules`."""
    if config.lru_width is not None:
        return recurrent_shapes(config)
    if config.model_type in NEWER:
        return newer_shapes(config)
    hidden, wide, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if config.has_post_norms:
        layer |= dict.fromkeys(
            ("pre_feedforward_layernorm", "post_feedforward_layernorm"), (hidden,)
        )
    if config.has_qk_norm:
        layer |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (dim,))
    if config.cross_attention_hidden_size is not None and not config.merges_attention:
        source = config.cross_attention_hidden_size
        layer |= {
            "cross_attn.q_proj": (queries, hidden),
            "cross_attn.k_proj": (keys, source),
            "cross_attn.v_proj": (keys, source),
            "cross_attn.o_proj": (hidden, queries),
            "pre_cross_attn_layernorm": (hidden,),
            "post_cross_attn_layernorm": (hidden,),
        }
    own_head = {} if config.tie_word_embeddings else {HEAD: (config.vocab_size, hidden)}
    own_eoi = {} if config.eoi_token_id is None else {EOI: (hidden,)}
    return {
        **own_head,
        **own_eoi,
        EMBEDDING: (config.vocab_size, hidden),
        **{
            f"layers.{i}.{name}.weight": shape
            for i in range(config.num_hidden_layers)
            for name, shape in layer.items()
        },
        "norm.weight": (hidden,),
    }


def encoder_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of an encoder that its decoder does not share.

    Their names are those of `export.modules.source_encoder`.
    """
    shared = (EMBEDDING, EOI) if config.model_type == "t5gemma2" else ()
    shapes = tensor_shapes(config)
    return {ENCODER + name: shape for name, shape in shapes.items() if name not in shared}


def _raw(model_type: str, shape: tuple[int, ...], **other: Any) -> dict[str, Any]:
    """Return a config.json; shape is layers, hidden, query heads, key-value heads, head, wide."""
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
            "head_dim", "intermediate_size")  # fmt: skip
    defaults = {"vocab_size": 256000, "max_position_embeddings": 8192}
    return {
        "model_type": model_type,
        **defaults,
        **dict(zip(keys, shape, strict=True)),
        **other,
    }


def _gemma2(*shape: int, scalar: int = 256) -> dict[str, Any]:
    return _raw("gemma2", shape, sliding_window=4096, query_pre_attn_scalar=scalar)


def _gemma3(
    *shape: int, window: int, scalar: int = 256, positions: int = 131072, **other: Any
) -> dict[str, Any]:
    # Releases of 4B and larger extend the context by scaling positions in full layers.
    scaling = {"rope_type": "linear", "factor": 8.0} if positions == 131072 else None
    return _raw(
        "gemma3_text",
        shape,
        vocab_size=262144,
        max_position_embeddings=positions,
        sliding_window=window,
        query_pre_attn_scalar=scalar,
        rope_scaling=scaling,
        **other,
    )


SIZES = (
    Size(
        name="Gemma 1 2B",
        shared_by=("CodeGemma 2B",),
        raw=_raw("gemma", (18, 2048, 8, 1, 256, 16384)),
        num_parameters=1_981_884_416,
        counts_embedding=False,
    ),
    Size(
        name="Gemma 1 7B",
        shared_by=("CodeGemma 7B",),
        raw=_raw("gemma", (28, 3072, 16, 16, 256, 24576)),
        num_parameters=7_751_248_896,
        counts_embedding=False,
    ),
    Size(
        name="Gemma 2 2B",
        shared_by=("ShieldGemma 2B",),
        raw=_gemma2(26, 2304, 8, 4, 256, 9216),
        num_parameters=2_024_517_888,
        counts_embedding=False,
    ),
    Size(
        name="Gemma 2 9B",
        shared_by=("ShieldGemma 9B",),
        raw=_gemma2(42, 3584, 16, 8, 256, 14336),
        num_parameters=8_324_201_984,
        counts_embedding=False,
    ),
    Size(
        name="Gemma 2 27B",
        shared_by=("ShieldGemma 27B", "DataGemma RIG 27B", "DataGemma RAG 27B"),
        raw=_gemma2(46, 4608, 32, 16, 128, 36864, scalar=144),
        num_parameters=26_047_480_320,
        counts_embedding=False,
    ),
    Size(
        name="VaultGemma 1B",
        raw=_raw(
            "vaultgemma",
            (26, 1152, 4, 4, 256, 6912),
            max_position_embeddings=1024,
            layer_types=[FULL] * 26,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        ),
    ),
    Size(
        name="Gemma 3 270M",
        shared_by=("FunctionGemma 270M",),
        raw=_gemma3(18, 640, 4, 1, 256, 2048, window=512, positions=32768),
        num_parameters=268_098_176,
    ),
    Size(
        name="Gemma 3 1B",
        raw=_gemma3(26, 1152, 4, 1, 256, 6912, window=512, positions=32768),
        num_parameters=999_885_952,
    ),
    Size(
        name="Gemma 3 4B",
        shared_by=("MedGemma 4B", "TranslateGemma 4B"),
        raw=_gemma3(34, 2560, 8, 4, 256, 10240, window=1024),
        num_parameters=3_880_099_328,
    ),
    Size(
        name="Gemma 3 12B",
        shared_by=("TranslateGemma 12B",),
        raw=_gemma3(48, 3840, 16, 8, 256, 15360, window=1024),
        num_parameters=11_765_788_416,
    ),
    Size(
        name="Gemma 3 27B",
        shared_by=("MedGemma 27B", "TranslateGemma 27B"),
        raw=_gemma3(62, 5376, 32, 16, 128, 21504, window=1024, scalar=168),
        num_parameters=27_009_002_240,
    ),
    Size(
        name="EmbeddingGemma 300M",
        raw=_gemma3(
            24,
            768,
            3,
            1,
            256,
            1152,
            window=512,
            positions=2048,
            use_bidirectional_attention=True,
        ),
        num_parameters=302_863_104,
    ),
)
"""Every size of the text family; EmbeddingGemma without the dense layers of its head."""


def _recurrent(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    """Return the config.json of a RecurrentGemma, whose recurrent blocks are as wide as it is."""
    return {
        "model_type": RECURRENT_TYPE,
        "vocab_size": 256000,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 6 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "lru_width": hidden,
        "attention_window_size": 2048,
    }


RECURRENT_SIZES = (
    Size(name="RecurrentGemma 2B", raw=_recurrent(26, 2560, 10)),
    Size(name="RecurrentGemma 9B", raw=_recurrent(38, 4096, 16)),
)
"""Both sizes of RecurrentGemma, the presets of the original."""


TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
"""The tower of every release, SigLIP So400m."""


def _gemma3_with_pictures(
    of: str, *, vocab_size: int = 262144, model_type: str = "gemma3"
) -> dict[str, Any]:
    """Return the config.json of a Gemma 3 whose text model has the shapes of one of `SIZES`."""
    [text] = [size.raw for size in SIZES if size.name == of]
    return {
        "model_type": model_type,
        "mm_tokens_per_image": 256,
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "text_config": {**text, "vocab_size": vocab_size},
        "vision_config": {**TOWER, "image_size": 896},
    }


def _paligemma(of: str, image_size: int) -> dict[str, Any]:
    """Return the config.json of a PaliGemma whose text model has the shapes of one of `SIZES`."""
    [text] = [size.raw for size in SIZES if size.name == of]
    return {
        "model_type": "paligemma",
        "image_token_index": 257152,
        "projection_dim": text["hidden_size"],
        "text_config": {**text, "vocab_size": 257152},
        "vision_config": {**TOWER, "image_size": image_size},
    }


def _paligemmas() -> tuple[Size, ...]:
    """Return PaliGemma 1 and 2 in all resolutions.

    KerasHub has one count for the 28B in all resolutions, that of 224 pixels.
    """
    counts = {
        ("PaliGemma 3B", "Gemma 1 2B"): (2_923_335_408, 2_924_220_144, 2_927_759_088),
        ("PaliGemma 2 3B", "Gemma 2 2B"): (3_032_094_960, 3_032_979_696, 3_036_518_640),
        ("PaliGemma 2 10B", "Gemma 2 9B"): (9_662_409_456, 9_663_294_192, 9_666_833_136),
        ("PaliGemma 2 28B", "Gemma 2 27B"): (27_650_192_112, None, None),
    }
    return tuple(
        Size(name=f"{name} {side}", raw=_paligemma(text, side), num_parameters=count)
        for (name, text), of_sides in counts.items()
        for side, count in zip((224, 448, 896), of_sides, strict=True)
    )


VISION_SIZES = (
    Size(
        name="Gemma 3 4B with pictures",
        shared_by=("TranslateGemma 4B",),
        raw=_gemma3_with_pictures("Gemma 3 4B"),
        num_parameters=4_299_915_632,
    ),
    Size(
        name="Gemma 3 12B with pictures",
        shared_by=("TranslateGemma 12B",),
        raw=_gemma3_with_pictures("Gemma 3 12B"),
        num_parameters=12_187_079_280,
    ),
    Size(
        name="Gemma 3 27B with pictures",
        shared_by=("TranslateGemma 27B",),
        raw=_gemma3_with_pictures("Gemma 3 27B"),
        num_parameters=27_432_062_576,
    ),
    Size(
        name="MedGemma 4B with pictures",
        raw=_gemma3_with_pictures("Gemma 3 4B", vocab_size=262208),
        num_parameters=4_300_079_472,
    ),
    Size(
        name="MedGemma 27B with pictures",
        raw=_gemma3_with_pictures("Gemma 3 27B", vocab_size=262208),
        num_parameters=27_432_406_640,
    ),
    Size(
        name="ShieldGemma 2 4B",
        raw=_gemma3_with_pictures("Gemma 3 4B", vocab_size=262208, model_type="shieldgemma2"),
        num_parameters=4_300_079_472,
    ),
    *_paligemmas(),
)
"""Every released size that takes pictures. Hugging Face's files have 64 rows more in the embedding
where KerasHub's counts have 262,144 or 257,152."""


def _t5gemma(encoder: tuple[int, ...], decoder: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Return the config.json of a T5Gemma; shapes are those of `_raw`."""
    sections = {"encoder": encoder, "decoder": decoder or encoder}
    return {
        "model_type": "t5gemma",
        **{name: _raw("t5_gemma_module", shape) for name, shape in sections.items()},
    }


def _t5gemma2(of: str) -> dict[str, Any]:
    """Return the config.json of a T5Gemma 2 whose stacks have the shapes of one of `SIZES`."""
    [text] = [size.raw for size in SIZES if size.name == of]
    return {
        "model_type": "t5gemma2",
        "image_token_index": 262144,
        "encoder": {
            "text_config": {**text, "model_type": "t5gemma2_text"},
            "vision_config": {**TOWER, "image_size": 896},
            "mm_tokens_per_image": 256,
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "image_token_index": 262144,
        },
        "decoder": {**text, "model_type": "t5gemma2_decoder"},
    }


_2B, _9B = (26, 2304, 8, 4, 256, 9216), (42, 3584, 16, 8, 256, 14336)
ENCODER_DECODER_SIZES = (
    Size(
        name="T5Gemma S",
        raw=_t5gemma((8, 512, 8, 8, 64, 1024)),
        num_parameters=312_517_632,
    ),
    Size(
        name="T5Gemma B",
        raw=_t5gemma((12, 768, 12, 12, 64, 2048)),
        num_parameters=591_490_560,
    ),
    Size(
        name="T5Gemma L",
        raw=_t5gemma((24, 1024, 16, 16, 64, 2816)),
        num_parameters=1_241_761_792,
    ),
    Size(
        name="T5Gemma ML",
        raw=_t5gemma((26, 1152, 4, 4, 256, 6912)),
        num_parameters=2_200_345_344,
    ),
    Size(
        name="T5Gemma XL",
        raw=_t5gemma((24, 2048, 32, 32, 64, 5120)),
        num_parameters=3_766_980_608,
    ),
    Size(
        name="T5Gemma 2B-2B",
        raw=_t5gemma(_2B),
        num_parameters=5_596_853_760,
    ),
    Size(
        name="T5Gemma 9B-2B",
        raw=_t5gemma(_9B, _2B),
        num_parameters=12_292_375_296,
    ),
    Size(
        name="T5Gemma 9B-9B",
        raw=_t5gemma(_9B),
        num_parameters=20_333_401_088,
    ),
    Size(name="T5Gemma 2 270M-270M", raw=_t5gemma2("Gemma 3 270M")),
    Size(name="T5Gemma 2 1B-1B", raw=_t5gemma2("Gemma 3 1B")),
    Size(name="T5Gemma 2 4B-4B", raw=_t5gemma2("Gemma 3 4B")),
)
"""Every released size with an encoder; those of T5Gemma 2 have the tower of a Gemma 3."""
