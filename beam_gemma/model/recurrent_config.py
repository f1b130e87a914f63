"""Reads the `config.json` of a RecurrentGemma, whose layers are recurrent blocks and windows.

Facts and defaults follow `models/recurrent_gemma/configuration_recurrent_gemma.py` of transformers
5.23 and, for the window, `recurrentgemma` 1.0.1, the original.
"""

import itertools
import reprlib
from collections.abc import Mapping
from typing import Any

from beam_gemma.errors import ConfigError, nearest
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.config_reader import MAX_SIZES, Reader, check_factor
from beam_gemma.model.layer_types import RECURRENT, SLIDING
from beam_gemma.model.rope import RopeParameters

RECURRENT_TYPE = "recurrent_gemma"
LONGEST = 131_072
"""Longest sequence in tokens. The model has no limit of its own: its memory does not grow with the
sequence. This one bounds the tables of blocks."""
BLOCKS = {"recurrent": RECURRENT, "attention": SLIDING, RECURRENT: RECURRENT, SLIDING: SLIDING}
"""Our layer type for each name of a block."""
PATTERN_KEYS = ("block_types", "_block_types")
"""Keys of the pattern of blocks, which repeats: that of the class, and that of its first files."""
LAYER_KEYS = ("layers_block_type", "layer_types")
"""Keys under which a file may list every layer."""
WINDOW_KEYS = ("attention_window_size", "sliding_window")
"""Keys of the window: that of files, and another that the class takes for it."""
ROPE_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor")


def recurrent_config(raw: Mapping[str, Any]) -> GemmaConfig:
    """Read the `config.json` of a RecurrentGemma.

    Its `attention_window_size` W is a distance: in the original, a token attends to the W tokens
    before it and to itself. In transformers it attends to W in all; where they differ, this project
    equals the original.

    Raises:
        ConfigError: a key is missing, unknown, or requests an unsupported feature.
    """
    reader = Reader(raw)
    reader.require("model_type", (RECURRENT_TYPE,))
    reader.require("hidden_activation", ("gelu_pytorch_tanh",))
    reader.require("attention_bias", (False, None))
    reader.require("embeddings_scale_by_sqrt_dim", (True,))
    for key in ("w_init_variance_scale", "final_w_init_variance_scale"):
        reader.take(key, None)
    num_layers = reader.size("num_hidden_layers")
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    head_dim = reader.size("head_dim", max(1, hidden // heads))
    theta, factor = _rope(reader)
    layer_types = _layer_types(reader, num_layers)
    config = GemmaConfig(
        model_type=RECURRENT_TYPE,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=_expanded_width(reader),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=reader.size("num_key_value_heads", None) or heads,
        head_dim=head_dim,
        max_position_embeddings=LONGEST,
        layer_types=layer_types,
        sliding_window=_window(reader) + 1,
        rope_parameters=tuple(
            (kind, RopeParameters(rope_theta=theta)) for kind in {*layer_types} - {RECURRENT}
        ),
        query_pre_attn_scalar=float(head_dim),
        final_logit_softcapping=check_factor(
            "logits_soft_cap", reader.take("logits_soft_cap", 30.0)
        ),
        rms_norm_eps=check_factor("rms_norm_eps", reader.take("rms_norm_eps", 1e-6)),
        tie_word_embeddings=reader.switch("tie_word_embeddings", default=True),
        lru_width=reader.size("lru_width", None) or hidden,
        conv1d_width=reader.size("conv1d_width", 4),
        partial_rotary_factor=factor,
    )
    reader.finish()
    return config


def _expanded_width(reader: Reader) -> int:
    """Return the width of the feed-forward; the file has that of both its branches together."""
    both = reader.size("intermediate_size")
    if both % 2:
        raise ConfigError(f"intermediate_size: expected an even number, got {both}")
    return int(both) // 2


def _window(reader: Reader) -> int:
    """Return the distance that a token attends to, under either of the two names for it."""
    given = {key: reader.take(key, None) for key in WINDOW_KEYS}
    found = {_checked_window(key, value) for key, value in given.items() if value is not None}
    if len(found) > 1:
        raise ConfigError(
            f"{' and '.join(given)}: expected one number, got {' and '.join(map(str, found))}"
        )
    return found.pop() if found else 2048


def _checked_window(key: str, value: Any) -> int:
    # One less than the largest window, which counts the token itself.
    largest = MAX_SIZES["sliding_window"] - 1
    if type(value) is not int or not 1 <= value <= largest:
        raise ConfigError(
            f"{key}: expected a whole number from 1 to {largest:,}, got {reprlib.repr(value)}"
        )
    return value


def _layer_types(reader: Reader, num_layers: int) -> tuple[str, ...]:
    """Return the type of each layer: two recurrent blocks and one of attention, unless it is given.

    Raises:
        ConfigError: a list holds something else than blocks, or two of them differ.
    """
    found: dict[str, tuple[str, ...]] = {}
    for key in (*PATTERN_KEYS, *LAYER_KEYS):
        blocks = reader.take(key, None)
        if blocks is None:
            continue
        if not isinstance(blocks, list | tuple) or not blocks or not _are_blocks(blocks):
            raise ConfigError(
                f"{key}: expected a list of recurrent and attention, got {reprlib.repr(blocks)}"
            )
        types = [BLOCKS[block] for block in blocks]
        if key in LAYER_KEYS and len(types) != num_layers:
            raise ConfigError(
                f"{key}: expected {num_layers} entries (num_hidden_layers), got {len(types)}"
            )
        found[key] = tuple(itertools.islice(itertools.cycle(types), num_layers))
    if len({*found.values()}) > 1:
        raise ConfigError(f"{' and '.join(found)}: expected the same layers, got different ones")
    usual = itertools.cycle((RECURRENT, RECURRENT, SLIDING))
    return next(iter(found.values()), tuple(itertools.islice(usual, num_layers)))


def _are_blocks(values: list[Any] | tuple[Any, ...]) -> bool:
    return all(isinstance(value, str) and value in BLOCKS for value in values)


def _rope(reader: Reader) -> tuple[float, float]:
    """Return the base of the rotary embedding and the share of a head that it turns.

    Both may lie in `rope_parameters` or, as in the first files, beside it.
    """
    reader.require("rope_scaling", (None,))
    given = reader.section("rope_parameters") or {}
    for key in sorted(map(str, set(given) - set(ROPE_KEYS))):
        raise ConfigError(
            f"rope_parameters: the key {reprlib.repr(key)} is not known{nearest(key, ROPE_KEYS)}"
        )
    if given.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_type: expected default, got {reprlib.repr(given['rope_type'])}")
    values = []
    for key, usual in (("rope_theta", 1e4), ("partial_rotary_factor", 0.5)):
        beside = reader.take(key, None)
        value = given.get(key, usual if beside is None else beside)
        if beside is not None and beside != value:
            raise ConfigError(
                f"{key}: expected the same number in rope_parameters, got "
                f"{reprlib.repr(beside)} and {reprlib.repr(value)}"
            )
        values.append(check_factor(key, value))
    return values[0], values[1]
