"""Buffers of step inputs and outputs, at fixed addresses on the device and in pinned memory.

Dimensions: V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from beam_gemma.model.graph_tensors import Tensor
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.bound_graph import Place
from beam_gemma.runtime.capacity import num_bytes
from beam_gemma.runtime.device_memory import ALIGNMENT, DeviceMemory
from beam_gemma.runtime.step_shapes import METADATA, StepShape, host_dtype

CANDIDATES = ("topk_logits", "topk_ids")
"""Outputs that are fetched only if the host chooses tokens itself."""
LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class Slot:
    """Position of an array in a buffer."""

    tensor: Tensor
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        """Offset of the first byte after the array."""
        return self.offset + num_bytes(self.tensor.dtype, self.shape)

    def at(self, address: int) -> Place:
        """Return the array's place in a buffer that starts at an address."""
        return Place(self.tensor.name, self.tensor.dtype, self.shape, address + self.offset)

    def of(self, buffer: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Return a view of the array in a host buffer."""
        part = buffer[self.offset : self.end]
        return part.view(host_dtype(self.tensor.dtype)).reshape(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Buffer layout of steps of one shape."""

    shape: StepShape
    inputs: Mapping[str, Slot]
    outputs: Mapping[str, Slot]
    """Outputs fetched in every step first, then the candidates."""
    logits_shape: tuple[int, ...]
    metadata: Shaped[np.ndarray, "..."]
    """Values of `attention_metadata`, read in place, so the array must outlive the steps."""

    @property
    def num_input_bytes(self) -> int:
        """Size of all inputs in bytes."""
        return _end(self.inputs)

    def num_output_bytes(self, *, with_candidates: bool) -> int:
        """Return the size of the outputs in bytes, with or without the candidates."""
        return _end(self.fetched(with_candidates=with_candidates))

    def fetched(self, *, with_candidates: bool) -> dict[str, Slot]:
        """Return the outputs that are copied to the host after a step."""
        return {
            name: slot
            for name, slot in self.outputs.items()
            if with_candidates or name not in CANDIDATES
        }


class StepBuffers:
    """Device memory for the largest step, and pinned host memory for each step in flight."""

    def __init__(
        self,
        signature: Signature,
        memory: DeviceMemory,
        *,
        largest: Sequence[StepShape],
        num_frames: int,
    ) -> None:
        """Allocate the buffers.

        Args:
            signature: The graph's inputs and outputs.
            memory: The device's memory.
            largest: Shapes that include the maximum of each size.
            num_frames: Maximum number of steps in flight.

        Raises:
            DeviceError: the memory does not suffice.
        """
        self._signature = signature
        self._memory = memory
        layouts = [self.layout(shape) for shape in largest]
        num_in = max(layout.num_input_bytes for layout in layouts)
        num_out = max(layout.num_output_bytes(with_candidates=True) for layout in layouts)
        self.input_address = memory.allocate(num_in)
        self.output_address = memory.allocate(num_out)
        self.inputs = [memory.allocate_host(num_in) for _ in range(num_frames)]
        self.outputs = [memory.allocate_host(num_out) for _ in range(num_frames)]
        self._has_logits = any(tensor.name == LOGITS for tensor in signature.outputs())
        if self._has_logits:
            row = signature.vocab_size * 4
            self._row = memory.allocate_host(row)
            self._logits_address = memory.allocate(row * max(s.num_full for s in largest))

    def layout(self, shape: StepShape) -> Layout:
        """Return the buffer layout of steps of a shape."""
        outputs = [t for t in self._signature.outputs() if t.name != LOGITS]
        return Layout(
            shape=shape,
            inputs=_lay_out(
                [t for t in self._signature.step_inputs() if t.name != METADATA], shape
            ),
            outputs=_lay_out(sorted(outputs, key=lambda t: t.name in CANDIDATES), shape),
            logits_shape=(shape.num_full, self._signature.vocab_size),
            metadata=shape.metadata(self._signature.block_size),
        )

    def places(self, layout: Layout) -> tuple[list[Place], list[Place]]:
        """Return the places of all inputs and of all outputs for steps of a layout."""
        inputs = [slot.at(self.input_address) for slot in layout.inputs.values()]
        outputs = [slot.at(self.output_address) for slot in layout.outputs.values()]
        if any(tensor.name == METADATA for tensor in self._signature.step_inputs()):
            address = layout.metadata.ctypes.data
            inputs.append(Place(METADATA, "int32", (3,), address, is_on_host=True))
        if self._has_logits:
            outputs.append(Place(LOGITS, "float32", layout.logits_shape, self._logits_address))
        return inputs, outputs

    def logits(self, row: int) -> Float32[np.ndarray, " V"]:
        """Return the logits of one of the `full_rows` of the latest step."""
        self._memory.copy_out(self._row, self._logits_address + row * self._row.nbytes)
        self._memory.mark().wait()
        return self._row.view(np.float32).copy()


def num_real(tensor: Tensor, feeds: Mapping[str, Any]) -> int:
    """Return the number of rows of an output that are not padding."""
    letter = str(tensor.shape[0])
    if letter == "B":
        return len(feeds["cu_seqlens"]) - 1
    names = {"R": "logit_rows", "Q": "probability_rows", "Y": "target_ids", "T": "input_ids"}
    return len(feeds[names[letter]])


def _lay_out(tensors: Sequence[Tensor], shape: StepShape) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    for tensor in tensors:
        offset = -(-_end(slots) // ALIGNMENT) * ALIGNMENT
        slots[tensor.name] = Slot(tensor, shape.of(tensor), offset)
    return slots


def _end(slots: Mapping[str, Slot]) -> int:
    return max((slot.end for slot in slots.values()), default=0)
