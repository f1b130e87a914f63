"""Compares seconds and memory of long prompts: Gemma 4 and Gemma 3n, ours and transformers'.

    python -m benchmarks.newer --folder /tmp/newer --output out/newer.json

The models have the widths of Gemma 4 E2B and Gemma 3n E2B, random weights and a small vocabulary,
cut to `NUM_LAYERS` layers, of which the last ones read the keys and values of earlier ones. One
prompt at a time is completed, each length and system in its own process, in float32. Layers without
keys and values are computed for the last token of a prompt alone, but for transformers' Gemma 3n,
which computes all tokens in all layers. A share of the machine's matrix rate counts what is
computed.
"""

import math
from typing import Any

from beam_gemma.model.newer_config import newer_config
from benchmarks.recurrent import VOCAB, Comparison, main
from export.checkpoints.newer_shapes import newer_shapes
from export.checkpoints.newer_sizes import NEWER_SIZES
from export.checkpoints.tensors import EMBEDDING, TABLE

NUM_LAYERS = 10
"""Two full layers and eight with a window."""


def _cut(name: str, shared: int, **other: Any) -> dict[str, Any]:
    """Return the config.json of a released size with fewer layers.

    Args:
        name: Name of the size.
        shared: How many of its layers read keys and values of others.
        other: Other settings than those of the size.
    """
    [raw] = [size.raw for size in NEWER_SIZES if size.name == name]
    return {
        **raw,
        "num_hidden_layers": NUM_LAYERS,
        "num_kv_shared_layers": shared,
        "layer_types": raw["layer_types"][:NUM_LAYERS],
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": VOCAB,
        **other,
    }


MODELS = {
    "gemma4": _cut("Gemma 4 E2B", 5),
    "gemma3n": _cut("Gemma 3n E2B", 3, activation_sparsity_pattern=[0.95] * 3 + [0.0] * 7),
}
"""As large a share of layers as in the releases reads keys and values of others, or cuts gates."""
SYSTEMS = {
    "ours, Gemma 4": "gemma4",
    "transformers, Gemma 4": "gemma4",
    "ours, Gemma 3n": "gemma3n",
    "transformers, Gemma 3n": "gemma3n",
}
"""Model of each system."""
COMPUTES_ALL = "transformers, Gemma 3n"
"""The system that computes all layers for all tokens of a prompt."""
NOT_COUNTED = (EMBEDDING, TABLE)
"""Tables, of which a token takes a row."""


def operations(system: str) -> int:
    """Return the floating-point operations of a system's matrices per prompt token.

    What a system computes for the last token of a prompt alone is not counted.
    """
    config = newer_config(MODELS[SYSTEMS[system]])
    computes_all = system == COMPUTES_ALL
    last = config.num_hidden_layers if computes_all else config.first_shared_layer
    counted = 0
    for name, shape in newer_shapes(config).items():
        place = name.split(".")
        is_last = not computes_all and place[0] == "altup_unembed_projections"
        is_later = place[0] == "layers" and int(place[1]) >= last
        if len(shape) == 2 and name not in NOT_COUNTED and not is_last and not is_later:
            counted += 2 * math.prod(shape)
    return counted


COMPARISON = Comparison(
    module="benchmarks.newer",
    models=MODELS,
    systems=SYSTEMS,
    operations=operations,
    lengths=(512, 2048, 8192),
)


if __name__ == "__main__":
    main(COMPARISON, __doc__)
