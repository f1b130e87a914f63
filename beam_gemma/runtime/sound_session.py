"""Embeddings of clips of sound: a model's tower, which runs apart from its decoder.

Each clip is computed by itself on either device, so its bits do not depend on the others.

Dimensions: J frames of a clip, M features of a frame, L tokens of a clip, D hidden.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, Shaped

from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.signature import Signature
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.runtime.device_memory import (
    CudaMemory,
    DeviceMemory,
    compute_capability,
    require_bfloat16,
)
from beam_gemma.runtime.tower_graph import CpuGraph, CudaGraph, TowerSession

Frames: TypeAlias = Sequence[Float32[np.ndarray, "_ M"]]
Embeddings: TypeAlias = list[Shaped[np.ndarray, "_ D"]]


class SoundSession(TowerSession):
    """Makes embeddings of clips; loads the graph with the first clip.

    Example:
        >>> from beam_gemma.model.artifact import Artifact
        >>> artifact = Artifact.open(MODEL)
        >>> SoundSession.of(artifact, "cpu")
        Traceback (most recent call last):
        beam_gemma.errors.ArtifactError: ...expected a model that takes sound, got one...
    """

    what = "sound"

    @classmethod
    def of(cls, artifact: Artifact, device: Device, *, num_threads: int = 0) -> "SoundSession":
        """Return the session of a model folder's graph of sound.

        Args:
            artifact: The model folder.
            device: Device that runs the graph.
            num_threads: CPU: threads per operator; 0 means one per core.

        Raises:
            ArtifactError: the model takes no sound, or was exported without that graph.
            OptionsError: the GPU does not compute in the graph's bfloat16.
        """
        if (config := artifact.sound) is None:
            raise ArtifactError(
                f"{artifact.path}: expected a model that takes sound, got one that takes none; "
                "take an export of a checkpoint that has what it takes, without --text_only"
            )
        signature = artifact.signature("sound", device)
        path = str(artifact.graph_path("sound", device))
        if device == "cpu":
            return cls(signature, lambda: CpuSound(path, signature, num_threads=num_threads))
        require_bfloat16(signature.dtype, compute_capability)
        return cls(signature, lambda: CudaSound(path, signature, config, CudaMemory()))


class CpuSound:
    """A graph of sound on the CPU."""

    def __init__(self, graph_path: str, signature: Signature, *, num_threads: int = 0) -> None:
        """Load a graph.

        Raises:
            ArtifactError: the graph cannot be loaded or differs from its signature.
        """
        self._graph = CpuGraph(graph_path, signature, num_threads=num_threads)

    def encode(self, items: Frames) -> Embeddings:
        """Return the embeddings of each clip."""
        return [self._graph.run({"sound_frames": frames}) for frames in items]


class CudaSound:
    """A graph of sound on a GPU."""

    def __init__(
        self, graph_path: str, signature: Signature, config: SoundConfig, memory: DeviceMemory
    ) -> None:
        """Load a graph, with memory for the longest clip.

        Raises:
            OptionsError: ONNX Runtime lacks the device, or the device has too little memory.
            ArtifactError: the graph differs from its signature, or part of it cannot run there.
        """
        self._config = config
        most = self._sizes(config.num_frames_of(config.max_samples))
        self._graph = CudaGraph(graph_path, signature, memory, most)

    def encode(self, items: Frames) -> Embeddings:
        """Return the embeddings of each clip; bfloat16, which numpy lacks, as uint16."""
        return [
            self._graph.run({"sound_frames": frames}, self._sizes(len(frames))) for frames in items
        ]

    def _sizes(self, num_frames: int) -> dict[str, int]:
        return {"J": num_frames, "L": self._config.tokens_of_frames(num_frames)}
