"""The released sizes of the text family, with the keys of Hugging Face's `config.json`.

Parameter counts are from the technical reports (Gemma 1 and 2, table 2 of each: non-embedding
parameters) and from KerasHub's presets (Gemma 3, whole text models).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beam_gemma.model.config import FULL, GemmaConfig


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
        """The architecture."""
        return GemmaConfig.from_hf(self.raw)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, under the names of `export.modules.decoder`."""
        return tensor_shapes(self.config)


def tensor_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, under the names of `export.modules.decoder`."""
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
    return {
        "embed_tokens.weight": (config.vocab_size, hidden),
        **{
            f"layers.{i}.{name}.weight": shape
            for i in range(config.num_hidden_layers)
            for name, shape in layer.items()
        },
        "norm.weight": (hidden,),
    }


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
