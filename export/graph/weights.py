"""Attaches weights to a graph, linking a checkpoint's bytes if they can be used unchanged.

ONNX external data is (file, offset, length) of raw little-endian numbers, the same numbers that a
safetensors file holds. A tensor that already has the graph's dtype is neither read nor copied: its
file is hard-linked into the artifact (ONNX Runtime refuses paths and symbolic links that leave a
model's folder). Only changed tensors are written: effective norm weights, rotary frequencies,
decoded blocks.
"""

import errno
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from beam_gemma.model.config import GemmaConfig
from export.checkpoints.hf_folder import check_names
from export.checkpoints.tensors import ENCODER, NUMPY_DTYPES, Checkpoint, StoredTensor, is_norm
from export.graph.quantize import Blocks, CodedMatrix, coded_matrices, is_part

LOGGER = logging.getLogger("export")
WEIGHTS = "weights"
WRITTEN = f"{WEIGHTS}/written.safetensors"
IR_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "uint8": ir.DataType.UINT8,
}
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}


@dataclass(frozen=True, kw_only=True)
class Written:
    """A tensor to be written to the artifact's own weights file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: Callable[[], Iterator[np.ndarray]]
    """Function that yields the tensor's slices."""
    offset: float = 0.0
    """Added to every element."""
    aliases: tuple[str, ...] = ()
    """Names of initializers that use the same bytes in another shape."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all initializers that use these bytes."""
        return self.name, *self.aliases

    @property
    def num_bytes(self) -> int:
        """Size in the file, in bytes."""
        return int(np.prod(self.shape)) * NUMPY_DTYPES[self.dtype].itemsize

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the values, converted, slice by slice."""
        for chunk in self.source():
            shifted = chunk.astype(np.float32) + np.float32(self.offset) if self.offset else chunk
            yield shifted.astype(NUMPY_DTYPES[self.dtype], copy=False)


def attach(models: Sequence[ir.Model], checkpoint: Checkpoint, folder: Path) -> None:
    """Point the graphs' initializers at bytes below `folder`; write those that cannot be linked.

    Args:
        models: Graphs of one checkpoint; shared tensors are written once.
        checkpoint: The checkpoint that holds the weights.
        folder: The artifact folder.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    initializers = _without_bytes(models)
    shapes = {name: _shape(values[0]) for name, values in initializers.items()}

    def place(name: str, kind: str, where: tuple[str, int, int]) -> None:
        for value in initializers.get(name, ()):
            value.const_value = _external(name, kind, shapes[name], where, folder)

    derived = _derived(checkpoint, initializers)
    coded = coded_matrices(shapes)
    plain = {n: shape for n, shape in shapes.items() if n not in derived and not is_part(n)}
    check_names(checkpoint.tensors, plain | {n: m.stored_shape for n, m in coded.items()})
    links = _Links(folder)
    writes = list(derived.values())
    for name, matrix in coded.items():
        writes += _coded(matrix, checkpoint.tensors[name])
    for name, shape in plain.items():
        stored, kind = checkpoint.tensors[name], _dtype(initializers[name][0])
        offset = checkpoint.norm_offset if is_norm(name) else 0.0
        if stored.raw is not None and stored.dtype == kind and not is_norm(name):
            location = links.location(stored.raw.file)
            place(name, kind, (location, stored.raw.offset, stored.raw.length))
        else:
            source = stored.chunks
            writes.append(Written(name=name, shape=shape, dtype=kind, source=source, offset=offset))
    for item, position in _write(writes, folder / WRITTEN):
        for name in item.names:
            place(name, item.dtype, (WRITTEN, position, item.num_bytes))


def _without_bytes(models: Iterable[ir.Model]) -> dict[str, list[ir.Value]]:
    """Return the initializers of all graphs that have no value yet, grouped by name."""
    found: dict[str, list[ir.Value]] = {}
    for model in models:
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                found.setdefault(name, []).append(value)
    return found


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return value.shape.numpy()


def _dtype(value: ir.Value) -> str:
    assert value.dtype is not None
    return next(name for name, dtype in IR_DTYPES.items() if dtype == value.dtype)


def _coded(matrix: CodedMatrix, stored: StoredTensor) -> tuple[Written, Written]:
    """Return the codes and the scales of a matrix, to be written in this order."""
    blocks = Blocks(stored, matrix)
    codes = Written(
        name=matrix.codes, shape=matrix.shape_of(matrix.codes), dtype="uint8", source=blocks.codes
    )
    scales = Written(
        name=matrix.scales,
        shape=matrix.shape_of(matrix.scales),
        dtype="float16",
        source=blocks.scales,
        aliases=(matrix.lookup_scales,),
    )
    return codes, scales


def inverse_frequencies(config: GemmaConfig, layer_type: str) -> np.ndarray:
    """Return theta^(-2i / H) / factor for i < H / 2, computed in float32 like the reference.

    H are the channels of a head that turn. Of a proportional embedding, the last frequencies are 0.

    Source: `ROPE_INIT_FUNCTIONS` in transformers 5.23, kinds `default`, `linear`, `proportional`.
    """
    rope, width = config.rope(layer_type), config.rotary_dim_of(layer_type)
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    frequencies = 1.0 / (rope.rope_theta**exponents) / rope.factor
    frequencies[int(rope.partial_rotary_factor * width // 2) :] = 0.0
    return frequencies.numpy()


def _derived(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, Written]:
    """Return the tensors that no checkpoint holds: each layer type's rotary frequencies."""
    stacks = {"": checkpoint.config}
    if checkpoint.encoder is not None:
        stacks[ENCODER] = checkpoint.encoder
    values = {
        f"{prefix}rotary.{group}.inv_freq": inverse_frequencies(config, group)
        for prefix, config in stacks.items()
        for group in config.groups
    }
    return {
        name: Written(name=name, shape=array.shape, dtype="float32", source=partial(iter, [array]))
        for name, array in values.items()
        if name in names
    }


def _external(
    name: str, dtype: str, shape: tuple[int, ...], place: tuple[str, int, int], folder: Path
) -> ir.ExternalTensor:
    location, offset, length = place
    return ir.ExternalTensor(
        location,
        offset,
        length,
        IR_DTYPES[dtype],
        shape=ir.Shape(shape),
        name=name,
        base_dir=str(folder),
    )


class _Links:
    """Hard links to checkpoint files in the artifact, or copies if linking is impossible."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Path, str] = {}

    def location(self, file: Path) -> str:
        """Return the path of the linked file, relative to the artifact."""
        if file not in self._known:
            relative = f"{WEIGHTS}/{file.name}"
            if relative in self._known.values():  # each dense layer has its own folder
                relative = f"{WEIGHTS}/{file.parent.name}.{file.name}"
            target = self._folder / relative
            target.unlink(missing_ok=True)
            try:
                # Checkpoint files in a local hub cache are symbolic links.
                os.link(file.resolve(), target)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                    raise
                LOGGER.warning("%s: cannot be linked into %s, so it is copied", file, target.parent)
                shutil.copyfile(file, target)
            self._known[file] = relative
        return self._known[file]


def _write(items: list[Written], file: Path) -> Iterator[tuple[Written, int]]:
    """Write tensors to one safetensors file, slice by slice; yield each with its file offset."""
    rows = [(i.name, SAFETENSORS_NAMES[i.dtype], i.shape, i.num_bytes) for i in items]
    with file.open("wb") as stream:
        stream.write(safetensors_header(rows))
        for item in items:
            yield item, stream.tell()
            for chunk in item.chunks():
                chunk.tofile(stream)


def safetensors_header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Return what a safetensors file begins with; its data starts at a multiple of 64 bytes.

    Args:
        tensors: Name, type as safetensors calls it, shape and size in bytes of each tensor.
    """
    header, position = {}, 0
    for name, dtype, shape, num_bytes in tensors:
        offsets = [position, position + num_bytes]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return struct.pack("<Q", len(text)) + text
