"""The types of a model's layers, and how `config.json` gives them."""

import reprlib
from collections.abc import Iterable
from typing import Any

from beam_gemma.errors import ConfigError
from beam_gemma.model.config_reader import Reader

FULL = "full_attention"
SLIDING = "sliding_attention"
RECURRENT = "linear_attention"
"""The layer type of a recurrent block, as transformers calls it."""
PATTERN_KEYS = ("sliding_window_pattern", "_sliding_window_pattern")
"""Keys of the pattern of layers: the one that Gemma 3 reads, and a copy beside `layer_types`."""


def read_layer_types(reader: Reader, model_type: str, num_layers: int) -> tuple[str, ...]:
    """Return the type of each layer, by the published pattern if config.json does not list them.

    Gemma 1 has no windows; Gemma 2 starts with a sliding layer and alternates; in Gemma 3, every
    sixth layer is full. Older Gemma 3 files set `sliding_window_pattern`. VaultGemma's file lists
    every layer; its class alternates.
    """
    patterns = [reader.take(key, None) for key in PATTERN_KEYS]
    given = reader.take("layer_types", None)
    if given is not None:
        if not isinstance(given, list | tuple) or not all(k in (FULL, SLIDING) for k in given):
            raise ConfigError(
                f"layer_types: expected a list of {FULL} and {SLIDING}, got {reprlib.repr(given)}"
            )
        if model_type == "gemma" and SLIDING in given:
            raise ConfigError(f"layer_types: expected {FULL} alone in a gemma model, got {SLIDING}")
        return tuple(given)
    if model_type == "gemma":
        return (FULL,) * num_layers
    period = _period(patterns, model_type)
    return tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers))


def _period(patterns: Iterable[Any], model_type: str) -> int:
    """Return after how many layers a full one comes, from the values of `PATTERN_KEYS`.

    Raises:
        ConfigError: one is no such number, or another than the class of the model goes by.
    """
    usual = 6 if model_type == "gemma3_text" else 2
    read, copied = (usual if value is None else value for value in patterns)
    for value in (read, copied):
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"sliding_window_pattern: expected a whole number above 0, got "
                f"{reprlib.repr(value)}"
            )
    if (read != usual and model_type != "gemma3_text") or copied not in (usual, read):
        raise ConfigError(
            f"sliding_window_pattern: expected {usual} in a {model_type} model without "
            f"layer_types, got {read} and {copied}; list the layers in layer_types"
        )
    return read
