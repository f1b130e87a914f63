"""Embeddings of pictures: a model's tower, which runs apart from its decoder.

On the CPU each picture is computed by itself, so its bits do not depend on the others. On a GPU
pictures are computed a few at a time, always the same number: a batch that is not full is filled up
with black pictures, so each picture is computed by the same kernels in any company. Pictures that
vary in size are computed one by one there too.

Dimensions: N pictures of a batch, I height and J width in pixels, L tokens of a picture, D hidden.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Shaped, UInt8

from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.device_memory import (
    CudaMemory,
    DeviceMemory,
    compute_capability,
    require_bfloat16,
)
from beam_gemma.runtime.tower_graph import CpuGraph, CudaGraph, TowerSession

PATCHES_PER_BATCH = 8192
"""CUDA: most patches of a batch; bounds the memory of a run."""
MAX_BATCH = 8
"""CUDA: most pictures of a batch, about as many as a prefill step has tokens for."""
Pixels: TypeAlias = Sequence[UInt8[np.ndarray, "3 _ _"]]
Embeddings: TypeAlias = list[Shaped[np.ndarray, "_ D"]]


class VisionSession(TowerSession):
    """Makes embeddings of pictures; loads the graph with the first picture.

    Example:
        >>> from beam_gemma.model.artifact import Artifact
        >>> artifact = Artifact.open(MODEL)
        >>> VisionSession.of(artifact, "cpu")
        Traceback (most recent call last):
        beam_gemma.errors.ArtifactError: ...expected a model that takes pictures, got one...
    """

    what = "pictures"

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


class CpuTower:
    """A graph of pictures on the CPU, which computes one picture at a time."""

    def __init__(self, graph_path: str, signature: Signature, *, num_threads: int = 0) -> None:
        """Load a graph.

        Raises:
            ArtifactError: the graph cannot be loaded or differs from its signature.
        """
        self._graph = CpuGraph(graph_path, signature, num_threads=num_threads)
        self._signature = signature

    def encode(self, items: Pixels) -> Embeddings:
        """Return the embeddings of each picture."""
        return [self._encode(one) for one in items]

    def _encode(self, pixels: UInt8[np.ndarray, "3 I J"]) -> Shaped[np.ndarray, "L D"]:
        if self._signature.image_step:
            return self._graph.run(patches_of(pixels, self._signature))
        return self._graph.run({"pixels": pixels[None]})[0]


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
        self._signature, self._batch = signature, batch
        most = {"N": batch, "L": signature.num_image_tokens}
        self._graph = CudaGraph(graph_path, signature, memory, most)

    def encode(self, items: Pixels) -> Embeddings:
        """Return the embeddings of each picture."""
        if self._signature.image_step:
            return [self._encode(one) for one in items]
        embeddings: Embeddings = []
        for begin in range(0, len(items), self._batch):
            few = items[begin : begin + self._batch]
            made = self._graph.run({"pixels": np.stack(few)}, {"N": self._batch})
            embeddings += list(made[: len(few)])
        return embeddings

    def _encode(self, pixels: UInt8[np.ndarray, "3 I J"]) -> Shaped[np.ndarray, "L D"]:
        feeds = patches_of(pixels, self._signature)
        return self._graph.run(feeds, {"L": len(feeds["patches"])})


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
