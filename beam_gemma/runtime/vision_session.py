"""Embeddings of pictures: a model's tower, which runs apart from its decoder.

On the CPU each picture is computed by itself, so its bits do not depend on the others. On a GPU
pictures are computed a few at a time, always the same number: a batch that is not full is filled up
with black pictures, so each picture is computed by the same kernels in any company.

Dimensions: N pictures of a batch, I pixels of a side, L tokens of a picture, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Shaped, UInt8

from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device
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
Pixels: TypeAlias = Sequence[UInt8[np.ndarray, "3 I I"]]
Embeddings: TypeAlias = list[Shaped[np.ndarray, "L D"]]


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
        self._input = signature.step_inputs()[0].name

    def encode(self, pixels: Pixels) -> Embeddings:
        """Return the embeddings of each picture."""
        return [self._session.run(None, {self._input: one[None]})[0][0] for one in pixels]


class CudaTower:
    """A graph of pictures on a GPU, which computes batches of one size."""

    def __init__(
        self, graph_path: str, signature: Signature, memory: DeviceMemory, *, batch: int
    ) -> None:
        """Load a graph, allocate its input and its output, and run it once.

        After that it has all the memory that it will ever need.

        Args:
            graph_path: The ONNX file.
            signature: The graph's contract.
            memory: The device's memory.
            batch: Number of pictures in each run.

        Raises:
            OptionsError: ONNX Runtime lacks the device, or the device has too little memory.
            ArtifactError: the graph differs from its signature, or part of it cannot run there.
        """
        self._memory = memory
        self._graph = BoundGraph(graph_path, signature, memory)
        places = [
            Place(tensor.name, tensor.dtype, shape, memory.allocate(num_bytes(tensor.dtype, shape)))
            for tensor in (*signature.step_inputs(), *signature.outputs())
            for shape in [tuple(batch if dim == "N" else int(dim) for dim in tensor.shape)]
        ]
        self._input, self._output = places
        self._pixels = self._on_host(self._input)
        self._embeddings = self._on_host(self._output)
        self._binding = self._graph.bind([self._input], [self._output])
        self._run([])

    def encode(self, pixels: Pixels) -> Embeddings:
        """Return the embeddings of each picture."""
        embeddings: Embeddings = []
        batch = len(self._pixels)
        for begin in range(0, len(pixels), batch):
            embeddings += self._run(pixels[begin : begin + batch])
        return embeddings

    def _run(self, pixels: Pixels) -> Embeddings:
        """Return the embeddings of at most one batch."""
        for place, picture in zip(self._pixels, pixels, strict=False):
            place[...] = picture
        self._pixels[len(pixels) :] = 0
        self._memory.copy_in(self._input.address, self._pixels)
        self._graph.run(self._binding)
        self._memory.copy_out(self._embeddings, self._output.address)
        self._memory.mark().wait()
        return [one.copy() for one in self._embeddings[: len(pixels)]]

    def _on_host(self, place: Place) -> np.ndarray:
        """Return host memory for what is copied to or from a place."""
        held = self._memory.allocate_host(num_bytes(place.dtype, place.shape))
        return held.view(host_dtype(place.dtype)).reshape(place.shape)
