"""Embeddings of pictures: a model's tower, which runs apart from its decoder.

On the CPU each picture is computed by itself, so its bits do not depend on the others. On a GPU
pictures are computed a few at a time, always the same number: a batch that is not full is filled up
with black pictures, so each picture is computed by the same kernels in any company. Pictures that
vary in size are computed one by one there too.

Dimensions: N pictures of a batch, I height and J width in pixels, L tokens of a picture, D hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Shaped, UInt8

from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device, Tensor
from beam_gemma.model.signature import Signature
from beam_gemma.monitoring.startup_log import logged
from beam_gemma.runtime.bound_graph import BoundGraph, Place
from beam_gemma.runtime.capacity import num_bytes
from beam_gemma.runtime.cpu_session import check_names, load_graph
from beam_gemma.runtime.device_memory import (
    CudaMemory,
    DeviceMemory,
    compute_capability,
    require_bfloat16,
)
from beam_gemma.runtime.step_shapes import host_dtype

PATCHES_PER_BATCH = 8192
"""CUDA: most patches of a batch; bounds the memory of a run."""
MAX_BATCH = 8
"""CUDA: most pictures of a batch, about as many as a prefill step has tokens for."""
Pixels: TypeAlias = Sequence[UInt8[np.ndarray, "3 _ _"]]
Embeddings: TypeAlias = list[Shaped[np.ndarray, "_ D"]]


@runtime_checkable
class Tower(Protocol):
    """Interface of a loaded graph of pictures."""

    def encode(self, pixels: Pixels) -> Embeddings:
        """Return the embeddings of each picture; bfloat16, which numpy lacks, as uint16."""


class VisionSession:
    """Makes embeddings of pictures; loads the graph with the first picture.

    Example:
        >>> from beam_gemma.model.artifact import Artifact
        >>> artifact = Artifact.open(MODEL)
        >>> VisionSession.of(artifact, "cpu")
        Traceback (most recent call last):
        beam_gemma.errors.ArtifactError: ...expected a model that takes pictures, got one...
    """

    def __init__(self, signature: Signature, load: Callable[[], Tower]) -> None:
        """Create a session that has not loaded its graph yet.

        Args:
            signature: The graph's contract.
            load: Loads the graph; called once, by the first `load` or `encode`.
        """
        self.signature = signature
        self._load = load
        self._tower: Tower | None = None

    @classmethod
    def of(cls, artifact: Artifact, device: Device, *, num_threads: int = 0) -> "VisionSession":
        """Return the session of a model folder's graph of pictures.

        Args:
            artifact: The model folder.
            device: Device that runs the graph.
            num_threads: CPU: threads per operator; 0 means one per core.

        Raises:
            ArtifactError: the model takes no pictures, or was exported without that graph.
            OptionsError: the GPU does not compute in the graph's bfloat16.
        """
        if artifact.vision is None:
            raise ArtifactError(
                f"{artifact.path}: expected a model that takes pictures, got one that takes text "
                "alone; take an export of a checkpoint with a vision tower"
            )
        signature = artifact.signature("vision", device)
        path = str(artifact.graph_path("vision", device))
        if device == "cpu":
            return cls(signature, lambda: CpuTower(path, signature, num_threads=num_threads))
        require_bfloat16(signature.dtype, compute_capability)
        batch = max(1, min(MAX_BATCH, PATCHES_PER_BATCH // artifact.vision.num_patches))
        return cls(signature, lambda: CudaTower(path, signature, CudaMemory(), batch=batch))

    def encode(self, pixels: Pixels) -> Embeddings:
        """Return the embeddings of each picture; bfloat16, which numpy lacks, as uint16.

        Raises:
            ArtifactError: the graph cannot be loaded or differs from its signature.
            OptionsError: the device has too little memory.
        """
        return self.load().encode(pixels)

    def load(self) -> Tower:
        """Load the graph unless it is loaded already, and return it.

        On a GPU, call this before a decoder takes the memory that is left for its caches.

        Raises:
            ArtifactError: the graph cannot be loaded or differs from its signature.
            OptionsError: the device has too little memory.
        """
        if self._tower is None:
            with logged("loaded the graph of pictures"):
                self._tower = self._load()
        return self._tower


class CpuTower:
    """A graph of pictures on the CPU, which computes one picture at a time."""

    def __init__(self, graph_path: str, signature: Signature, *, num_threads: int = 0) -> None:
        """Load a graph.

        Raises:
            ArtifactError: the graph cannot be loaded or differs from its signature.
        """
        self._session = load_graph(graph_path, num_threads)
        check_names(self._session, signature)
        self._signature = signature

    def encode(self, pixels: Pixels) -> Embeddings:
        """Return the embeddings of each picture."""
        return [self._encode(one) for one in pixels]

    def _encode(self, pixels: UInt8[np.ndarray, "3 I J"]) -> Shaped[np.ndarray, "L D"]:
        if self._signature.image_step:
            return self._session.run(None, patches_of(pixels, self._signature))[0]
        return self._session.run(None, {"pixels": pixels[None]})[0][0]


class CudaTower:
    """A graph of pictures on a GPU, which computes batches of one size, or pictures one by one."""

    def __init__(
        self, graph_path: str, signature: Signature, memory: DeviceMemory, *, batch: int
    ) -> None:
        """Load a graph, allocate its input and its output, and run it once.

        After that it has all the memory that it will ever need.

        Args:
            graph_path: The ONNX file.
            signature: The graph's contract.
            memory: The device's memory.
            batch: Number of pictures in each run, if all pictures have one size.

        Raises:
            OptionsError: ONNX Runtime lacks the device, or the device has too little memory.
            ArtifactError: the graph differs from its signature, or part of it cannot run there.
        """
        self._memory, self._signature = memory, signature
        self._graph = BoundGraph(graph_path, signature, memory)
        most = {"N": batch, "L": signature.num_image_tokens}
        self._addresses, self._held = {}, {}
        for tensor in (*signature.step_inputs(), *signature.outputs()):
            size = num_bytes(tensor.dtype, _sized(tensor.shape, most))
            self._addresses[tensor.name] = memory.allocate(size)
            self._held[tensor.name] = memory.allocate_host(size)
        self._batch = 1 if signature.image_step else batch
        self._run([], most)

    def encode(self, pixels: Pixels) -> Embeddings:
        """Return the embeddings of each picture."""
        embeddings: Embeddings = []
        for begin in range(0, len(pixels), self._batch):
            few = pixels[begin : begin + self._batch]
            if self._signature.image_step:
                patches = patches_of(few[0], self._signature)
                embeddings.append(self._run([patches], {"L": len(patches["patches"])}))
            else:
                feeds = [{"pixels": one} for one in few]
                embeddings += list(self._run(feeds, {"N": self._batch})[: len(few)])
        return embeddings

    def _run(
        self, feeds: Sequence[Mapping[str, np.ndarray]], sizes: Mapping[str, int]
    ) -> Shaped[np.ndarray, "..."]:
        """Run the graph and return its output.

        Args:
            feeds: The inputs of each picture of a batch; a batch that is not full ends with black
                ones.
            sizes: The sizes of the inputs and of the output, by their letters.
        """
        inputs = [self._place(tensor, sizes) for tensor in self._signature.step_inputs()]
        [output] = [self._place(tensor, sizes) for tensor in self._signature.outputs()]
        for place in inputs:
            values = self._on_host(place)
            values[...] = 0
            for i, feed in enumerate(feeds):
                values[slice(None) if self._signature.image_step else i] = feed[place.name]
            self._memory.copy_in(place.address, values)
        self._graph.run(self._graph.bind(inputs, [output]))
        embeddings = self._on_host(output)
        self._memory.copy_out(embeddings, output.address)
        self._memory.mark().wait()
        return embeddings.copy()

    def _place(self, tensor: Tensor, sizes: Mapping[str, int]) -> Place:
        shape = _sized(tensor.shape, sizes)
        return Place(tensor.name, tensor.dtype, shape, self._addresses[tensor.name])

    def _on_host(self, place: Place) -> np.ndarray:
        """Return the part of the host memory for what is copied to or from a place."""
        held = self._held[place.name][: num_bytes(place.dtype, place.shape)]
        return held.view(host_dtype(place.dtype)).reshape(place.shape)


def patches_of(
    pixels: UInt8[np.ndarray, "3 I J"], signature: Signature
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Return the inputs of a graph whose pictures vary in size, by name."""
    size, step = signature.patch_size, signature.image_step
    rows, columns = (side // step for side in pixels.shape[1:])
    k = step // size
    cut = pixels.reshape(3, rows, k, size, columns, k, size).transpose(1, 4, 2, 5, 3, 6, 0)
    places = np.indices((rows * k, columns * k)).reshape(2, rows, k, columns, k)
    places = places[::-1].transpose(1, 3, 2, 4, 0)
    return {
        "patches": np.ascontiguousarray(cut.reshape(-1, k**2, 3 * size**2)),
        "patch_places": np.ascontiguousarray(places.reshape(-1, k**2, 2)),
    }


def _sized(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a shape with the sizes of its letters."""
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)
