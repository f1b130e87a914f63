"""Input and output tensors of a graph, and the kinds of state it keeps."""

import math
from dataclasses import dataclass
from typing import Literal

Device = Literal["cpu", "cuda"]
Head = Literal["generate", "score", "embed", "vision", "sound", "encode"]
Holds = Literal["target", "source", "both"]
"""Whose keys and values a cache holds; see `PagedState.holds`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One input or output of a graph."""

    name: str
    dtype: str
    """Data type under NumPy's name, or `bfloat16`."""
    shape: tuple[int | str, ...]
    """Fixed sizes, or dimension letters from the legend in `signature`."""


MOST_TABLE_SHARE = 1 / 8
"""Largest share of a GPU's memory that tables take; larger ones lie in host memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Weights that a graph takes as an input, of which a step reads few rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    """Path of the file that holds the numbers, relative to the graph's folder."""
    offset: int
    """Offset of the numbers in the file, in bytes."""

    @property
    def num_bytes(self) -> int:
        """Size of the numbers in bytes."""
        return math.prod(self.shape) * {"uint8": 1, "float32": 4}.get(self.dtype, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedState:
    """Keys and values of all tokens for one group of layers, in blocks listed by a table."""

    group: str
    layers: tuple[int, ...]
    num_key_value_heads: int
    head_dim: int
    sliding_window: int | None = None
    """Tokens visible to a query, itself included; None for all."""
    holds: Holds = "target"
    """Whose keys and values the blocks of a sequence hold: those of its own tokens; those of its
    source, which an encoder has read; or first the source's, then those of its own tokens. With a
    window, the latter go round: a token at position p lies `p % sliding_window` cells behind the
    source."""

    def names(self, layer: int) -> tuple[str, str]:
        """Return the names of a layer's key cache and value cache."""
        keys, values = cache_names(layer)
        return (f"cross_{keys}", f"cross_{values}") if self.holds == "source" else (keys, values)

    def num_cells(self, num_source_tokens: int, num_tokens: int) -> int:
        """Return the number of cache cells of a sequence, without those that a window passes."""
        if self.holds == "target":
            return num_tokens
        if self.holds == "source":
            return num_source_tokens
        return num_source_tokens + min(num_tokens, self.sliding_window or num_tokens)

    def shape(self, device: Device, block_size: int) -> tuple[int | str, ...]:
        """Return the shape of a layer's key cache; its value cache has the same shape.

        On CUDA: [P, block, K, H]; on the CPU, heads come first: [K, P, block, H].
        """
        heads, blocks = self.num_key_value_heads, "P_" + self.group
        if device == "cuda":
            return blocks, block_size, heads, self.head_dim
        return heads, blocks, block_size, self.head_dim


def cache_names(layer: int) -> tuple[str, str]:
    """Return the names of a layer's key cache and value cache."""
    return f"key_cache.{layer}", f"value_cache.{layer}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecurrentState:
    """A tensor of fixed size for each sequence, such as an RG-LRU state or a convolution's tail."""

    name: str
    layers: tuple[int, ...]
    shape: tuple[int, ...]
    """Shape for one sequence."""
    dtype: str = "float32"

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in the order of the layers."""
        return [f"{self.name}.{layer}" for layer in self.layers]


State = PagedState | RecurrentState
STATE_KINDS = {"paged": PagedState, "recurrent": RecurrentState}
"""The class of each kind of state, by its name in a manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateTensor:
    """A buffer that a step reads and updates in place: bound as input and as output."""

    input_name: str
    output_name: str
    dtype: str
    shape: tuple[int | str, ...]


def tensors_of(shape: tuple[str, ...], **dtypes: str) -> tuple[Tensor, ...]:
    """Return tensors of one shape, given the type of each by its name."""
    return tuple(Tensor(name=name, dtype=dtype, shape=shape) for name, dtype in dtypes.items())


def state_tensor(name: str, dtype: str, shape: tuple[int | str, ...]) -> StateTensor:
    """Return the buffer of a layer's state, such as `key_cache.3`; its output has `_out` in it."""
    stem, _, layer = name.rpartition(".")
    return StateTensor(input_name=name, output_name=f"{stem}_out.{layer}", dtype=dtype, shape=shape)
