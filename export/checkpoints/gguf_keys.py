"""The metadata of an architecture in a GGUF file: which keys it may have, and checked access.

Keys and defaults: llama.cpp's `gguf-py/gguf/constants.py`, `conversion/base.py` and `src/models`.
"""

import reprlib
from typing import Any

import numpy as np

from beam_gemma.errors import CheckpointError, nearest
from beam_gemma.model.config_reader import check_factor, check_size
from beam_gemma.model.layer_types import FULL, SLIDING
from export.checkpoints.gguf_header import GgufFile, GgufTensor

EMBEDDER = "gemma-embedding"
"""The architecture of an EmbeddingGemma, which is a two-sided Gemma 3 with a head."""
ALL_KEYS = frozenset({
    "attention.causal", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_rms_epsilon", "attention.value_length", "block_count", "context_length",
    "embedding_length", "feed_forward_length", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.factor",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.type",
    "vocab_size",
})  # fmt: skip
"""Keys of every architecture, without its name. Linear scaling leaves two of them unused."""
WINDOW_KEYS = ALL_KEYS | {
    "attention.key_length_swa", "attention.sliding_window", "attention.sliding_window_pattern",
    "attention.value_length_swa", "final_logit_softcapping", "rope.dimension_count_swa",
}  # fmt: skip
GEMMA3_KEYS = WINDOW_KEYS | {"rope.freq_base_swa"}
PER_LAYER_KEYS = GEMMA3_KEYS | {"attention.shared_kv_layers", "embedding_length_per_layer_input"}
DENSE_KEYS = frozenset(f"dense_{i}_feat_{end}" for i in (2, 3) for end in ("in", "out"))
KEYS = {
    "gemma": ALL_KEYS,
    "gemma2": WINDOW_KEYS | {"attn_logit_softcapping"},
    "gemma3": GEMMA3_KEYS,
    EMBEDDER: GEMMA3_KEYS | DENSE_KEYS | {"pooling_type"},
    "gemma3n": PER_LAYER_KEYS | {
        "activation_sparsity_scale", "altup.active_idx", "altup.num_inputs",
    },
    "gemma4": PER_LAYER_KEYS | {
        "expert_count", "expert_feed_forward_length", "expert_used_count",
    },
}  # fmt: skip
"""Keys of each architecture that is read."""
IMAGE_KEYS = ("vision.", "mm.")
"""Starts of the keys of a model's part for images, which is in another file."""
PATTERN = "attention.sliding_window_pattern"


class Keys:
    """The metadata of one architecture, without its name before each key."""

    def __init__(self, file: GgufFile, arch: str) -> None:
        self.file, self.arch = file, arch

    def check_known(self) -> None:
        """Check that no key says anything that is not read.

        Raises:
            CheckpointError: one does.
        """
        prefix, known = f"{self.arch}.", KEYS[self.arch]
        for full in self.file.values:
            key = full.removeprefix(prefix)
            if full.startswith(prefix) and key not in known and not key.startswith(IMAGE_KEYS):
                raise CheckpointError(
                    f"{self.file.path}: the key {full!r:.80} is not known in a "
                    f"{self.arch} model{nearest(key, known)}"
                )

    def get(self, key: str, *default: Any) -> Any:
        """Return a value, or the default where the key is missing; without one, that is an error.

        Raises:
            CheckpointError: there is no such key, and no default.
        """
        return self.file.value(f"{self.arch}.{key}", *default)

    def size(self, key: str, name: str, *default: int) -> int:
        """Return a size of `beam_gemma.model.config_reader.MAX_SIZES`."""
        return check_size(name, self.get(key, *default))

    def factor(self, key: str, default: float) -> float:
        """Return a number above 0; the file's float32 is read as the decimal it stands for."""
        value = check_factor(f"{self.arch}.{key}", self.get(key, default))
        return float(str(np.float32(value)))

    def require(self, key: str, expected: Any) -> None:
        """Check that a key has the value that is expected, or is missing.

        Raises:
            CheckpointError: it has another value.
        """
        value = self.get(key, expected)
        if value != expected:
            raise self.fault(key, str(expected), value)

    def fault(self, key: str, expected: str, value: Any) -> CheckpointError:
        """Return the error of a key that is not as expected."""
        return CheckpointError(
            f"{self.file.path}: expected {self.arch}.{key} as {expected}, got {reprlib.repr(value)}"
        )

    def layer_types(self, layers: int) -> list[str] | None:
        """Return the type of each layer, or None for those that the architecture has.

        Raises:
            CheckpointError: the file says it of another number of layers.
        """
        pattern = self.get(PATTERN, None)
        if pattern is None:
            return None
        if type(pattern) is int and pattern > 0:
            pattern = [(i + 1) % pattern != 0 for i in range(layers)]
        if not isinstance(pattern, list) or [type(is_sliding) for is_sliding in pattern] != (
            [bool] * layers
        ):
            expected = f"a number above 0, or true or false for {layers} layers"
            raise self.fault(PATTERN, expected, pattern)
        return [SLIDING if is_sliding else FULL for is_sliding in pattern]

    def tensor(self, name: str) -> GgufTensor:
        """Return what the header says of a tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        for tensor in self.file.tensors:
            if tensor.name == name:
                return tensor
        raise CheckpointError(f"{self.file.path}: expected the tensor {name}, got none")
