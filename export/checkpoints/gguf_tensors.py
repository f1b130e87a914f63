"""Describes tensors of a GGUF file, whose block quantizations the `gguf` package decodes."""

from dataclasses import replace
from functools import partial

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from beam_gemma.errors import CheckpointError
from export.checkpoints.gguf_header import GgufTensor
from export.checkpoints.tensors import RawBytes, StoredTensor, raw_tensor, read_rows

RAW_TYPES = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}


def stored_tensor(tensor: GgufTensor) -> StoredTensor:
    """Describe a tensor.

    Raises:
        CheckpointError: its numbers are in a format that cannot be decoded.
    """
    raw = RawBytes(file=tensor.file, offset=tensor.offset, length=tensor.length)
    dtype = RAW_TYPES.get(tensor.kind)
    if dtype is not None:
        return raw_tensor(tensor.name, tensor.shape, dtype, raw)
    if len(tensor.shape) < 2:
        raise CheckpointError(
            f"{tensor.file}: expected {tensor.name} as a matrix, as it is packed as "
            f"{tensor.kind.name}, got the shape {list(tensor.shape)}"
        )
    _check_decoder(tensor)
    packed = partial(read_rows, raw, np.dtype(np.uint8), (tensor.length // tensor.shape[0],))

    def rows(start: int, stop: int) -> np.ndarray:
        # A damaged scale overflows or is NaN, which `chunks` finds.
        with np.errstate(all="ignore"):
            values = dequantize(packed(start, stop), tensor.kind)
        return values.reshape(stop - start, *tensor.shape[1:])

    return StoredTensor(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.kind.name,
        raw=None,
        rows=rows,
        coded_rows=packed,
    )


def rows_of(tensor: GgufTensor, start: int, stop: int) -> GgufTensor:
    """Return rows [start, stop) of a tensor's first dimension as a tensor of their own."""
    length = tensor.length // tensor.shape[0]
    return replace(
        tensor,
        shape=(stop - start, *tensor.shape[1:]),
        offset=tensor.offset + start * length,
        length=(stop - start) * length,
    )


def matrices_of(tensor: GgufTensor) -> list[GgufTensor]:
    """Return each matrix of a stack of matrices."""
    parts = (rows_of(tensor, i, i + 1) for i in range(tensor.shape[0]))
    return [replace(part, shape=part.shape[1:]) for part in parts]


def joined(one: GgufTensor, other: GgufTensor) -> StoredTensor:
    """Describe two stacks of matrices as one, with the rows of both in each matrix.

    Raises:
        CheckpointError: the two do not fit.
    """
    sizes = [(len(t.shape), t.shape[0], t.shape[-1]) for t in (one, other)]
    if sizes[0] != sizes[1] or len(one.shape) != 3:
        raise CheckpointError(
            f"{one.file}: expected {one.name} and {other.name} as stacks of as many matrices with "
            f"as many columns, got the shapes {list(one.shape)} and {list(other.shape)}"
        )
    first, second = stored_tensor(one), stored_tensor(other)
    is_alike = first.dtype == second.dtype

    def rows(start: int, stop: int) -> np.ndarray:
        return np.concatenate([first.rows(start, stop), second.rows(start, stop)], axis=1)

    def coded_rows(start: int, stop: int) -> np.ndarray:
        assert first.coded_rows is not None
        assert second.coded_rows is not None
        parts = [first.coded_rows(start, stop), second.coded_rows(start, stop)]
        return np.concatenate(parts, axis=1)

    return StoredTensor(
        name=one.name,
        shape=(one.shape[0], one.shape[1] + other.shape[1], one.shape[2]),
        dtype=first.dtype if is_alike else "float32",
        raw=None,
        rows=rows,
        coded_rows=coded_rows if is_alike and first.coded_rows is not None else None,
    )


def _check_decoder(tensor: GgufTensor) -> None:
    """Check on one block that the `gguf` package decodes this type."""
    _, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), tensor.kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{tensor.file}: expected {tensor.name} in a number format that the gguf package "
            f"decodes, got {tensor.kind.name}; convert the file to another format"
        ) from error
