"""State that a device keeps between steps, each tensor at a fixed address."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from beam_gemma.model.graph_tensors import StateTensor
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.capacity import Capacity, num_bytes
from beam_gemma.runtime.device_memory import DeviceMemory


@dataclass(frozen=True, slots=True)
class Placed:
    """A state tensor with its shape and address in memory."""

    tensor: StateTensor
    shape: tuple[int, ...]
    address: int


class DeviceState:
    """Caches and other state of a session, initially zero.

    The caches of all layers of a group lie in one allocation, one after another, so that one call
    can zero a block in all of them; so do the tensors of a recurrent state.
    """

    def __init__(self, signature: Signature, capacity: Capacity, memory: DeviceMemory) -> None:
        """Allocate the state.

        Raises:
            DeviceError: the memory does not suffice.
        """
        self._memory = memory
        self._capacity = capacity
        self._pieces: list[int] = []
        tensors = {tensor.input_name: tensor for tensor in signature.state_tensors()}
        self._placed: list[Placed] = []
        self._groups: dict[str, list[Placed]] = {}
        for state in signature.paged_states:
            names = [name for layer in state.layers for name in state.names(layer)]
            self._groups[state.group] = self._place([tensors.pop(name) for name in names])
        self._recurrent = [
            self._place([tensors.pop(name) for name in state.names])
            for state in signature.recurrent_states
        ]
        for tensor in tensors.values():
            self._place([tensor])

    def __iter__(self) -> Iterator[Placed]:
        """Iterate over all state tensors."""
        return iter(self._placed)

    def zero_blocks(self, group: str, blocks: Sequence[int]) -> None:
        """Overwrite cache blocks with zeros in all layers of a group."""
        caches = self._groups[group]
        pitch = num_bytes(caches[0].tensor.dtype, caches[0].shape)
        size = pitch // self._capacity.num_blocks[group]
        # Within a run of consecutive blocks, the block number minus the list index is constant.
        for _, run in groupby(enumerate(sorted(set(blocks))), key=lambda item: item[1] - item[0]):
            places = [block for _, block in run]
            begin = caches[0].address + places[0] * size
            self._memory.zero(begin, width=len(places) * size, pitch=pitch, height=len(caches))

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the recurrent state of a slot to another one, in all layers."""
        for placed in self._recurrent:
            first = placed[0]
            pitch = num_bytes(first.tensor.dtype, first.shape)
            size = pitch // first.shape[0]
            self._memory.copy(
                first.address + target * size,
                first.address + source * size,
                width=size,
                pitch=pitch,
                height=len(placed),
            )

    def free(self) -> None:
        """Free the memory; no step may read it afterwards."""
        for address in self._pieces:
            self._memory.free(address)
        self._pieces, self._placed, self._groups, self._recurrent = [], [], {}, []

    def _place(self, tensors: Sequence[StateTensor]) -> list[Placed]:
        """Allocate tensors of one shape in one piece, one after another."""
        shape = self._capacity.shape_of(tensors[0])
        pitch = num_bytes(tensors[0].dtype, shape)
        address = self._memory.allocate(len(tensors) * pitch)
        self._pieces.append(address)
        placed = [Placed(tensor, shape, address + i * pitch) for i, tensor in enumerate(tensors)]
        self._placed += placed
        return placed
