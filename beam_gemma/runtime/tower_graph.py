"""What sessions of pictures and of sound have in common: a graph without state, loaded when needed.

Such a graph computes an item by itself, or items of one size in batches, and has one output. On a
GPU it has memory for its largest inputs from the start.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from beam_gemma.model.graph_tensors import Tensor
from beam_gemma.model.signature import Signature
from beam_gemma.monitoring.startup_log import logged
from beam_gemma.runtime.bound_graph import BoundGraph, Place
from beam_gemma.runtime.capacity import num_bytes
from beam_gemma.runtime.cpu_session import check_names, load_graph
from beam_gemma.runtime.device_memory import DeviceMemory
from beam_gemma.runtime.step_shapes import host_dtype

Feeds = Mapping[str, np.ndarray]
"""The inputs of a graph by name."""


@runtime_checkable
class Tower(Protocol):
    """Interface of a loaded graph of pictures or of sound."""

    def encode(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the embeddings of each item; bfloat16, which numpy lacks, as uint16."""


class TowerSession:
    """Makes embeddings of pictures or clips; loads the graph with the first one."""

    what: ClassVar[str]
    """What the graph takes, for the log."""

    def __init__(self, signature: Signature, load: Callable[[], Tower]) -> None:
        """Create a session that has not loaded its graph yet.

        Args:
            signature: The graph's contract.
            load: Loads the graph; called once, by the first `load` or `encode`.
        """
        self.signature = signature
        self._load = load
        self._tower: Tower | None = None

    def encode(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the embeddings of each item; bfloat16, which numpy lacks, as uint16.

        Raises:
            ArtifactError: the graph cannot be loaded or differs from its signature.
            OptionsError: the device has too little memory.
        """
        return self.load().encode(items)

    def load(self) -> Tower:
        """Load the graph unless it is loaded already, and return it.

        On a GPU, call this before a decoder takes the memory that is left for its caches.

        Raises:
            ArtifactError: the graph cannot be loaded or differs from its signature.
            OptionsError: the device has too little memory.
        """
        if self._tower is None:
            with logged(f"loaded the graph of {self.what}"):
                self._tower = self._load()
        return self._tower


class CpuGraph:
    """A graph on the CPU."""

    def __init__(self, graph_path: str, signature: Signature, *, num_threads: int = 0) -> None:
        """Load a graph.

        Raises:
            ArtifactError: the graph cannot be loaded or differs from its signature.
        """
        self._session = load_graph(graph_path, num_threads)
        check_names(self._session, signature)

    def run(self, feeds: Feeds) -> Shaped[np.ndarray, "..."]:
        """Run the graph and return its output."""
        return self._session.run(None, dict(feeds))[0]


class CudaGraph:
    """A graph on a GPU."""

    def __init__(
        self, graph_path: str, signature: Signature, memory: DeviceMemory, most: Mapping[str, int]
    ) -> None:
        """Load a graph, allocate its inputs and its output, and run it once on zeros.

        After that it has all the memory that it will ever need.

        Args:
            graph_path: The ONNX file.
            signature: The graph's contract.
            memory: The device's memory.
            most: Largest sizes of the inputs and of the output, by their letters.

        Raises:
            OptionsError: ONNX Runtime lacks the device, or the device has too little memory.
            ArtifactError: the graph differs from its signature, or part of it cannot run there.
        """
        self._memory, self._signature = memory, signature
        self._graph = BoundGraph(graph_path, signature, memory)
        self._addresses, self._held = {}, {}
        for tensor in (*signature.step_inputs(), *signature.outputs()):
            size = num_bytes(tensor.dtype, _sized(tensor.shape, most))
            self._addresses[tensor.name] = memory.allocate(size)
            self._held[tensor.name] = memory.allocate_host(size)
        self.run({}, most)

    def run(self, feeds: Feeds, sizes: Mapping[str, int]) -> Shaped[np.ndarray, "..."]:
        """Run the graph and return its output.

        Args:
            feeds: The inputs; zeros fill what an input has too few rows for, or what is missing.
            sizes: The sizes of the inputs and of the output, by their letters.
        """
        inputs = [self._place(tensor, sizes) for tensor in self._signature.step_inputs()]
        [output] = [self._place(tensor, sizes) for tensor in self._signature.outputs()]
        for place in inputs:
            values = self._on_host(place)
            values[...] = 0
            if (given := feeds.get(place.name)) is not None:
                values[: len(given)] = given
            self._memory.copy_in(place.address, values)
        self._graph.run(self._graph.bind(inputs, [output]))
        made = self._on_host(output)
        self._memory.copy_out(made, output.address)
        self._memory.mark().wait()
        return made.copy()

    def _place(self, tensor: Tensor, sizes: Mapping[str, int]) -> Place:
        shape = _sized(tensor.shape, sizes)
        return Place(tensor.name, tensor.dtype, shape, self._addresses[tensor.name])

    def _on_host(self, place: Place) -> np.ndarray:
        """Return the part of the host memory for what is copied to or from a place."""
        held = self._held[place.name][: num_bytes(place.dtype, place.shape)]
        return held.view(host_dtype(place.dtype)).reshape(place.shape)


def _sized(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a shape with the sizes of its letters."""
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)
