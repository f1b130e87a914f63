"""The two architectures in the `config.json` of a T5Gemma or a T5Gemma 2: encoder and decoder.

Both stacks are blocks of another model: Gemma 2's in T5Gemma, Gemma 3's in T5Gemma 2. So each is
read as a `GemmaConfig` of that model, after the keys around it. Facts and defaults follow
`models/t5gemma*/configuration_*.py` of transformers 5.23.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from beam_gemma.errors import ConfigError
from beam_gemma.model.config import ENCODER_DECODERS, GemmaConfig
from beam_gemma.model.config_reader import MAX_SIZES, Reader, check_keys, section_of

BOS_TOKEN_ID = 2
"""Token id that decoders start with if config.json does not give one."""
IMAGE_TOKEN_ID, EOI_TOKEN_ID = 256_001, 256_000
"""The same for the tokens of a picture in T5Gemma 2, and for its end."""
_SIZES: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "t5gemma": {**_SIZES, "vocab_size": 256_000, "max_position_embeddings": 8192},
    "t5gemma2": {**_SIZES, "vocab_size": 262_208, "max_position_embeddings": 131_072},
}
"""Values that a file may omit, since transformers does not write what its classes say."""
BLOCKS = {"t5gemma": "gemma2", "t5gemma2": "gemma3_text"}
"""The model whose blocks each stack has."""
STACK_TYPES = {
    "t5gemma": ("t5_gemma_module", "t5_gemma_module"),
    "t5gemma2": ("t5gemma2_decoder", "t5gemma2_text"),
}
"""The `model_type` of the decoder's and of the encoder's section."""
DROPOUT_KEYS = ("dropout_rate", "classifier_dropout_rate")
"""Keys that matter in training alone, beside those that no model reads."""
OUTER_KEYS = ("encoder", "decoder", "is_encoder_decoder", "tie_word_embeddings", "vocab_size",
              *DROPOUT_KEYS)  # fmt: skip
COPIED_KEYS = (*_SIZES, "attention_bias", "attn_logit_softcapping", "final_logit_softcapping",
               "hidden_activation", "layer_types", "max_position_embeddings",
               "query_pre_attn_scalar", "rms_norm_eps", "rope_parameters", "rope_scaling",
               "rope_theta")  # fmt: skip
"""Keys of a section that files of T5Gemma repeat at the top, where nothing reads them."""
UNSAID: dict[str, Any] = {
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
"""What a section of T5Gemma without a key says of it, for a copy to be compared with."""
PICTURE_KEYS = ("eoi_token_id", "eoi_token_index", "image_token_id", "image_token_index")
"""Keys at the top of T5Gemma 2."""
ENCODER_KEYS = (*PICTURE_KEYS, "boi_token_id", "boi_token_index", "mm_tokens_per_image",
                "text_config", "tie_word_embeddings", "vision_config", "vocab_size",
                *DROPOUT_KEYS)  # fmt: skip
"""Keys of the encoder's section in T5Gemma 2."""


def encoder_decoder_configs(raw: Mapping[str, Any]) -> tuple[GemmaConfig, GemmaConfig]:
    """Read the decoder and the encoder in a `config.json`, in this order.

    Raises:
        ConfigError: a key is missing, unknown, or requests an unsupported feature.
    """
    model_type = raw["model_type"]
    assert model_type in ENCODER_DECODERS
    sections = _sections(raw)
    _check_outer(raw, sections)
    start_token_id(raw)
    encoder = _stack(model_type, sections["encoder"], tie=True)
    encoder = replace(encoder, use_bidirectional_attention=True, final_logit_softcapping=None)
    decoder = _stack(model_type, sections["decoder"], tie=_is_tied(raw), source=encoder.hidden_size)
    shared = ("vocab_size", "hidden_size") if model_type == "t5gemma2" else ("vocab_size",)
    for name in shared:
        ours, theirs = getattr(decoder, name), getattr(encoder, name)
        if ours != theirs:
            raise ConfigError(
                f"{name}: expected the same in the encoder and the decoder of a {model_type} "
                f"model, got {theirs} and {ours}"
            )
    _check_copies(raw, [(sections["decoder"], decoder), (sections["encoder"], encoder)])
    if model_type == "t5gemma2":
        eoi = _eoi_token_id(raw, decoder.vocab_size)
        return replace(decoder, eoi_token_id=eoi), replace(encoder, eoi_token_id=eoi)
    return decoder, encoder


def start_token_id(raw: Mapping[str, Any]) -> int:
    """Return the token id that a decoder starts with, which must be that of `<bos>`.

    Raises:
        ConfigError: the file names another.
    """
    decoder = section_of("decoder", raw.get("decoder") or {})
    found = [
        section[key]
        for key in ("bos_token_id", "decoder_start_token_id")
        for section in (decoder, raw)
        if section.get(key) is not None
    ]
    bos = found[0] if found else BOS_TOKEN_ID
    if type(bos) is not int or not all(value == bos for value in found):
        raise ConfigError(
            "decoder_start_token_id: expected the bos_token_id of the decoder, got "
            f"{reprlib.repr(found)}"
        )
    return bos


def picture_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a T5Gemma 2 says of pictures, in the form of a Gemma 3's `config.json`.

    Raises:
        ConfigError: the two places where a token id may stand say different things.
    """
    encoder = section_of("encoder", raw["encoder"])
    return {
        **{key: value for key, value in encoder.items() if key not in DROPOUT_KEYS},
        "model_type": "gemma3",
        "image_token_id": None,
        "image_token_index": _image_token_id(raw),
    }


def _sections(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sections of the two stacks, with the values that a file may omit."""
    model_type = raw["model_type"]
    found = {}
    for name, kind in zip(("decoder", "encoder"), STACK_TYPES[model_type], strict=True):
        section = section_of(name, raw.get(name))
        if (model_type, name) == ("t5gemma2", "encoder"):
            check_keys(section, ENCODER_KEYS)
            section = section_of("text_config", section.get("text_config"))
        if section.get("model_type", kind) != kind:
            raise ConfigError(
                f"{name}: expected a model_type of {kind} in a {model_type} model, got "
                f"{reprlib.repr(section['model_type'])}"
            )
        found[name] = {**DEFAULTS[model_type], **section}
    return found


def _check_outer(raw: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the keys beside the sections, and the width that the decoder has for the encoder."""
    is_second = raw["model_type"] == "t5gemma2"
    check_keys(raw, (*OUTER_KEYS, *(PICTURE_KEYS if is_second else COPIED_KEYS)))
    if raw.get("is_encoder_decoder", True) is not True:
        raise ConfigError(
            f"is_encoder_decoder: expected true in a {raw['model_type']} model, got "
            f"{reprlib.repr(raw['is_encoder_decoder'])}"
        )
    states = sections["decoder"].get("cross_attention_hidden_size")
    if states not in (None, sections["encoder"]["hidden_size"]):
        raise ConfigError(
            "cross_attention_hidden_size: expected the hidden_size of the encoder, "
            f"{reprlib.repr(sections['encoder']['hidden_size'])}, got {reprlib.repr(states)}"
        )


def _check_copies(
    raw: Mapping[str, Any], stacks: Sequence[tuple[Mapping[str, Any], GemmaConfig]]
) -> None:
    """Check that a copy of a section's key at the top says what one of the sections says."""
    for key in (*COPIED_KEYS, "vocab_size"):
        value = raw.get(key)
        given = [_given(section, config, key) for section, config in stacks]
        if value is not None and value not in given:
            raise ConfigError(
                f"{key}: expected at the top what the decoder or the encoder says, "
                f"{reprlib.repr(given)}, got {reprlib.repr(value)}"
            )


def _given(section: Mapping[str, Any], config: GemmaConfig, key: str) -> Any:
    """Return what a section says of a key, where rotary parameters may have either form."""
    if key == "layer_types":
        return list(config.layer_types)
    rope = section.get("rope_parameters")
    nested = rope.get(key) if key == "rope_theta" and isinstance(rope, Mapping) else None
    return section.get(key, UNSAID.get(key) if nested is None else nested)


def _stack(
    model_type: str, section: Mapping[str, Any], *, tie: bool, source: int | None = None
) -> GemmaConfig:
    """Read one stack; `source` is the width of the states that a decoder attends to."""
    # transformers ties weights by the key at the top alone.
    unread = (*DROPOUT_KEYS, "tie_word_embeddings", "model_type")
    rest = {key: value for key, value in section.items() if key not in unread}
    config = GemmaConfig.from_hf({**rest, "model_type": BLOCKS[model_type]})
    return replace(
        config,
        model_type=model_type,
        tie_word_embeddings=tie,
        cross_attention_hidden_size=source,
    )


def _is_tied(raw: Mapping[str, Any]) -> bool:
    return Reader(raw).switch("tie_word_embeddings", default=True)


def _eoi_token_id(raw: Mapping[str, Any], vocab_size: int) -> int:
    """Return the id of the end of a picture, which the encoder's section gives."""
    encoder = section_of("encoder", raw["encoder"])
    names = ("eoi_token_index", "eoi_token_id")
    token_id = _token_id("eoi_token_index", (encoder, raw), names, EOI_TOKEN_ID)
    if token_id >= vocab_size:
        raise ConfigError(
            f"eoi_token_index: expected a token id below vocab_size ({vocab_size}), got {token_id}"
        )
    return token_id


def _image_token_id(raw: Mapping[str, Any]) -> int:
    """Return the id of a picture's tokens, which the key at the top gives."""
    encoder = section_of("encoder", raw["encoder"])
    names = ("image_token_index", "image_token_id")
    return _token_id("image_token_index", (raw, encoder), names, IMAGE_TOKEN_ID)


def _token_id(
    key: str, sections: tuple[Mapping[str, Any], ...], names: tuple[str, ...], default: int
) -> int:
    """Return the token id that the first section gives; the others must not give another."""
    given = [[s[name] for name in names if s.get(name) is not None] for s in sections]
    found = [*given[0], default][0]
    others = [value for values in given for value in values]
    is_id = type(found) is int and 0 <= found < MAX_SIZES["vocab_size"]
    if not is_id or not all(value == found for value in others):
        raise ConfigError(
            f"{key}: expected one token id at the top and in the encoder ({default} if the one "
            f"that counts is missing), got {reprlib.repr(others)}"
        )
    return found
