"""A checkpoint as the exporter sees it: an architecture, and tensors described but not yet read.

If a tensor's raw bytes are already in the form that a graph needs, the graph refers to them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig

CHUNK_BYTES = 64 << 20
"""Tensors are converted in slices of about this size, so memory stays small."""
NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
}


@dataclass(frozen=True, kw_only=True)
class RawBytes:
    """Location of a tensor stored as plain little-endian numbers; offset and length in bytes."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint, not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """`float32`, `bfloat16`, `float16`, `int8`, or the name of a ggml quantization."""
    raw: RawBytes | None
    """Location of the raw numbers; None if the bytes need decoding."""
    rows: Callable[[int, int], np.ndarray]
    """Function that decodes rows [start, stop) of the first dimension."""
    coded_rows: Callable[[int, int], np.ndarray] | None = None
    """Function that returns the same rows as ggml's packed bytes; None for other formats."""

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the tensor in slices of its first dimension."""
        return self.slices(self.rows)

    def slices(self, rows: Callable[[int, int], np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the result of `rows` for each slice in turn."""
        row_bytes = 4 * max(1, int(np.prod(self.shape[1:])))
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            yield rows(start, min(start + step, self.shape[0]))


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An architecture, its tensors, and the other files and settings of a model."""

    name: str
    path: Path
    format: str
    """`safetensors`, `gguf` or `ckpt`."""
    config: GemmaConfig
    tensors: Mapping[str, StoredTensor]
    norm_offset: float
    """Value added to stored norm weights: 1 if the file stores w of the effective 1 + w."""
    tokenizer_model: Callable[[], bytes]
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    legal_files: tuple[Path, ...] = field(default=())
    """License, terms and notices found beside the weights."""
    embedding: EmbeddingConfig | None = None
    """Embedding settings, if the checkpoint has any."""


def raw_tensor(name: str, shape: tuple[int, ...], dtype: str, raw: RawBytes) -> StoredTensor:
    """Describe a tensor that is stored in a file as plain numbers."""
    row = int(np.prod(shape[1:]))

    def rows(start: int, stop: int) -> np.ndarray:
        kind = NUMPY_DTYPES[dtype]
        offset = raw.offset + start * row * kind.itemsize
        values = np.fromfile(raw.file, kind, count=(stop - start) * row, offset=offset)
        return values.reshape(stop - start, *shape[1:])

    return StoredTensor(name=name, shape=shape, dtype=dtype, raw=raw, rows=rows)
