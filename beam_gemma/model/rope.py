"""Rotary embeddings: their parameters, and how `config.json` gives them."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beam_gemma.errors import ConfigError, nearest
from beam_gemma.model.config_reader import Reader, check_factor, section_of
from beam_gemma.model.layer_types import FULL, SLIDING

ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "factor",
                       "original_max_position_embeddings"})  # fmt: skip
"""Keys of rotary parameters that are read, or that linear scaling does not use."""
NEEDED_KEYS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "proportional": ("rope_theta",),
}
"""Keys that each kind of rotary embedding must have."""
USED_KEYS = NEEDED_KEYS | {"proportional": ("rope_theta", "factor", "partial_rotary_factor")}
"""Keys that each kind reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeParameters:
    """Rotary embedding of one kind of layer."""

    rope_theta: float
    """Base of the geometric series of wavelengths."""
    factor: float = 1.0
    """Linear scaling: positions are divided by this factor."""
    partial_rotary_factor: float = 1.0
    """Share of the frequencies, the first ones, that are not zero. Unlike
    `GemmaConfig.partial_rotary_factor`, it does not change the wavelength of any frequency."""

    def __post_init__(self) -> None:
        check_factor("rope_theta", self.rope_theta)
        check_factor("rope factor", self.factor)
        if not 0 < self.partial_rotary_factor <= 1:
            raise ConfigError(
                f"partial_rotary_factor: expected a share above 0 and at most 1, got "
                f"{self.partial_rotary_factor}"
            )


def read_rope_parameters(
    reader: Reader, model_type: str, layer_types: tuple[str, ...]
) -> tuple[tuple[str, RopeParameters], ...]:
    """Read rotary parameters in either form: `rope_parameters`, or theta with `rope_scaling`.

    In Gemma 3, sliding layers have parameters of their own, and `rope_scaling` is for full layers.
    In the other models all layers share theirs.
    """
    is_gemma3 = model_type == "gemma3_text"
    theta = reader.take("rope_theta", 1e6 if is_gemma3 else 1e4)
    local_theta = reader.take("rope_local_base_freq", 1e4) if is_gemma3 else theta
    scaling = reader.section("rope_scaling")
    given = reader.section("rope_parameters")
    kinds = tuple(dict.fromkeys(layer_types))
    if given is not None and scaling:
        raise ConfigError("rope_scaling: expected none beside rope_parameters, got both")
    if given is not None and is_gemma3 != bool(set(given) & {FULL, SLIDING}):
        expected = f"{FULL} and {SLIDING}" if is_gemma3 else "one set for all layers"
        raise ConfigError(
            f"rope_parameters: expected {expected} in a {model_type} model, got the keys "
            f"{reprlib.repr(sorted(given))}"
        )
    shared = {"rope_theta": theta, **(scaling or {})}
    if not is_gemma3:
        given = dict.fromkeys(kinds, given or shared)
    elif given is None:
        if "type" in shared and "rope_type" not in shared:
            raise ConfigError(
                "rope_scaling: expected the key rope_type, got type, which transformers no longer "
                "reads in Gemma 3; rename it"
            )
        given = {FULL: shared, SLIDING: {"rope_theta": local_theta}}
    for key in sorted(set(given) - {FULL, SLIDING}):
        raise ConfigError(
            f"rope_parameters: the key {reprlib.repr(key)} has no place beside {FULL}"
        )
    return tuple((kind, read_rope(kind, section_of(kind, given.get(kind) or {}))) for kind in kinds)


def read_rope(
    kind: str, raw: Mapping[str, Any], rope_types: tuple[str, ...] = ("default", "linear")
) -> RopeParameters:
    """Read the rotary parameters of one layer type, whose `rope_type` must be one of those given.

    Raises:
        ConfigError: a key is missing, unknown, or says what is not computed.
    """
    known = {*ROPE_KEYS, *(["partial_rotary_factor"] if "proportional" in rope_types else [])}
    for key in sorted(set(raw) - known):
        raise ConfigError(
            f"rope_parameters of {kind}: the key {reprlib.repr(key)} is not known"
            f"{nearest(key, known)}"
        )
    rope_type = raw.get("rope_type", raw.get("type", "default"))
    if rope_type not in rope_types:
        raise ConfigError(
            f"rope_type of {kind}: expected {' or '.join(rope_types)}, got "
            f"{reprlib.repr(rope_type)}"
        )
    if rope_type != "proportional" and raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"partial_rotary_factor of {kind}: expected none beside the rope_type {rope_type}, "
            f"got {reprlib.repr(raw['partial_rotary_factor'])}"
        )
    for key in NEEDED_KEYS[rope_type]:
        if key not in raw:
            raise ConfigError(
                f"rope_parameters of {kind}: expected {key}, got {reprlib.repr(sorted(raw))}"
            )
    values = {
        key: check_factor(f"{key} of {kind}", raw.get(key, 1.0)) for key in USED_KEYS[rope_type]
    }
    return RopeParameters(**values)
