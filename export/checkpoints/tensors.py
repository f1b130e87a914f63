"""What a checkpoint is to the exporter: an architecture, and tensors that are described, not read.

Where raw bytes already are what a graph needs, the graph will point at them where they lie.
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
    """Where a tensor lies as plain little-endian numbers."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint, not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """`float32`, `bfloat16`, `float16`, or a quantization."""
    raw: RawBytes | None
    """None where the bytes need decoding."""
    rows: Callable[[int, int], np.ndarray]
    """Decodes rows [start, stop) of the first dimension."""
    coded_rows: Callable[[int, int], np.ndarray] | None = None
    """Returns these rows as ggml packs them, as bytes; None where the tensor is no such one."""

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the tensor in slices of its first dimension."""
        return self.slices(self.rows)

    def slices(self, rows: Callable[[int, int], np.ndarray]) -> Iterator[np.ndarray]:
        """Yield what `rows` makes of one slice after the other."""
        row_bytes = 4 * max(1, int(np.prod(self.shape[1:])))
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            yield rows(start, min(start + step, self.shape[0]))


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An architecture, its tensors and what else travels with a model."""

    name: str
    path: Path
    format: str
    """`safetensors`, `gguf` or `ckpt`."""
    config: GemmaConfig
    tensors: Mapping[str, StoredTensor]
    norm_offset: float
    """Added to stored norm weights to get the effective ones: 1 where a file stores w of 1 + w."""
    tokenizer_model: Callable[[], bytes]
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    legal_files: tuple[Path, ...] = field(default=())
    """Licence, terms and notices found beside the weights."""
    embedding: EmbeddingConfig | None = None
    """How it makes embeddings, where it says so."""


def raw_tensor(name: str, shape: tuple[int, ...], dtype: str, raw: RawBytes) -> StoredTensor:
    """Describe a tensor that lies in a file as plain numbers."""
    row = int(np.prod(shape[1:]))

    def rows(start: int, stop: int) -> np.ndarray:
        kind = NUMPY_DTYPES[dtype]
        offset = raw.offset + start * row * kind.itemsize
        values = np.fromfile(raw.file, kind, count=(stop - start) * row, offset=offset)
        return values.reshape(stop - start, *shape[1:])

    return StoredTensor(name=name, shape=shape, dtype=dtype, raw=raw, rows=rows)
