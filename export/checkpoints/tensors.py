"""A checkpoint as the exporter sees it: an architecture, and tensors described but not yet read.

If a tensor's raw bytes are already in the form that a graph needs, the graph refers to them.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from beam_gemma.errors import CheckpointError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.vision_config import VisionConfig

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
"""Names of the embedding, which is also the head, and of a copy of it that files may have."""
TABLE = "embed_tokens_per_layer.weight"
"""Name of the table of per-layer embeddings."""
ENCODER = "encoder."
"""Start of the names of an encoder's tensors, beside those of its decoder."""
EOI = "eoi_embedding"
"""Name of the embedding of a picture's end, where it is a tensor of its own."""
NORM = re.compile(r"norm(_\d)?\.weight$")
"""Ends of the names of a norm's weight."""
LAYER_NORM = re.compile(r"\.(layer_norm[12]|post_layernorm|patch_ln[12]|pos_norm)\.(weight|bias)$")
"""Ends of the names of the weights of a tower's norms, which have no offset."""
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
        """Yield the tensor in slices of its first dimension.

        Raises:
            CheckpointError: a number is infinite or none, or the file has become shorter.
        """
        for rows in self.slices(self.rows):
            if not np.isfinite(rows).all():
                raise CheckpointError(
                    f"checkpoint: expected finite numbers in {self.name}, got infinite ones or "
                    "NaN; the file is damaged, copy it again"
                )
            yield rows

    def slices(self, rows: Callable[[int, int], np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the result of `rows` for each slice in turn."""
        row_bytes = 4 * math.prod(self.shape[1:])
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
    license: str | None = None
    """Names of licenses that the checkpoint states, in one line; None if it states none."""
    embedding: EmbeddingConfig | None = None
    """Embedding settings, if the checkpoint has any."""
    vision: VisionConfig | None = None
    """The tower of pictures, whose tensors are among `tensors`; None for a text model."""
    sound: SoundConfig | None = None
    """The tower of sound, whose tensors are among `tensors`; None if the model takes no sound."""
    encoder: GemmaConfig | None = None
    """Encoder of an encoder-decoder, whose decoder is `config`; its tensors are those of `tensors`
    whose names begin with `encoder.`."""


def is_norm(name: str) -> bool:
    """Return whether a tensor, by our name of it, is the weight of a norm with an offset."""
    return NORM.search(name) is not None and LAYER_NORM.search(name) is None


def raw_tensor(name: str, shape: tuple[int, ...], dtype: str, raw: RawBytes) -> StoredTensor:
    """Describe a tensor that is stored in a file as plain numbers."""
    rows = partial(read_rows, raw, NUMPY_DTYPES[dtype], shape[1:])
    return StoredTensor(name=name, shape=shape, dtype=dtype, raw=raw, rows=rows)


def read_rows(
    raw: RawBytes, kind: np.dtype, row: tuple[int, ...], start: int, stop: int
) -> np.ndarray:
    """Read rows [start, stop) of a tensor whose rows have the shape `row`.

    Raises:
        CheckpointError: the file has become shorter since it was opened.
    """
    size = math.prod(row)
    offset, count = raw.offset + start * size * kind.itemsize, (stop - start) * size
    values = np.fromfile(raw.file, kind, count=count, offset=offset)
    if len(values) < count:
        raise CheckpointError(
            f"{raw.file}: expected {count * kind.itemsize:,} bytes at {offset:,}, got the end of "
            "the file, which has become shorter"
        )
    return values.reshape(stop - start, *row)


def by_name(file: Path, tensors: Iterable[tuple[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Return tensors by our names for them.

    Raises:
        CheckpointError: two tensors have one name.
    """
    found: dict[str, StoredTensor] = {}
    for name, stored in tensors:
        if name in found:
            raise CheckpointError(
                f"{file}: expected one tensor for {name}, got {found[name].name} and {stored.name}"
            )
        found[name] = stored
    return found


def without_head(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of a model without its head, which must equal the embedding.

    Raises:
        CheckpointError: the head is another matrix than the embedding.
    """
    reason = "as the head of a Gemma is its embedding"
    return without_copy(tensors, HEAD, EMBEDDING, reason)


def without_copy(
    tensors: Mapping[str, StoredTensor], name: str, original: str, reason: str
) -> dict[str, StoredTensor]:
    """Return the tensors of a model without one, if there, that must equal another.

    Raises:
        CheckpointError: the two are not equal.
    """
    rest = dict(tensors)
    copy, kept = rest.pop(name, None), rest.get(original)
    if copy is not None and kept is not None and not are_equal(copy, kept):
        raise CheckpointError(
            f"checkpoint: expected {copy.name} equal to {kept.name}, {reason}, got other numbers; "
            "export a model whose embeddings are tied"
        )
    return rest


def are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors have the same shape and numbers, read slice by slice."""
    if one.shape != other.shape:
        return False
    slices = (tensor.slices(tensor.rows) for tensor in (one, other))
    return all(np.array_equal(a, b) for a, b in zip(*slices, strict=True))
