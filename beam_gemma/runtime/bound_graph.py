"""A graph that ONNX Runtime runs with inputs and outputs at fixed addresses.

Nothing falls back silently: if a graph, or part of it, cannot run on the GPU, an error names the
remedy. With `HostMemory` the same code runs on the CPU.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from beam_gemma.errors import ArtifactError, OptionsError
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.cpu_session import check_names
from beam_gemma.runtime.device_memory import DeviceMemory
from beam_gemma.runtime.devices import LOAD_ERRORS, PROVIDERS, onnxruntime

Binding: TypeAlias = Any
"""ONNX Runtime's `IOBinding`, which has no type annotations."""
UNCAPTURED = -1
"""CUDA graph number for runs without capture."""
BFLOAT16 = 16
"""ONNX's number for bfloat16, which numpy lacks."""
NO_ROOM = ("failed to allocate memory", "out of memory", "alloc_failed", "bad_alloc")
"""Lowercase phrases in libraries' errors that mean memory has run out."""


@dataclass(frozen=True, slots=True)
class Place:
    """Type, shape and address of an input or output."""

    name: str
    dtype: str
    """Name of a numpy dtype, or `bfloat16`."""
    shape: tuple[int, ...]
    address: int
    is_on_host: bool = False


class BoundGraph:
    """A loaded graph that runs on bound inputs and outputs."""

    def __init__(self, graph_path: str, signature: Signature, memory: DeviceMemory) -> None:
        """Load a graph, and its weights onto the device.

        Raises:
            OptionsError: ONNX Runtime lacks the device, or the device has too little memory.
            ArtifactError: the graph differs from its signature, or part of it cannot run there.
        """
        self._kind = memory.kind
        self._session = _load(graph_path, memory)
        check_names(self._session, signature)
        self._run_options: dict[int, Any] = {}

    def bind(
        self, inputs: Iterable[Place], outputs: Iterable[Place], binding: Binding | None = None
    ) -> Binding:
        """Bind inputs and outputs to their places.

        Args:
            inputs: Places of all inputs, or of those to change.
            outputs: Places of all outputs, or of those to change.
            binding: The binding to change; None creates a new one.
        """
        binding = binding or self._session.io_binding()
        for bind, places in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for place in places:
                kind = "cpu" if place.is_on_host else self._kind
                dtype = BFLOAT16 if place.dtype == "bfloat16" else np.dtype(place.dtype).type
                bind(place.name, kind, 0, dtype, place.shape, place.address)
        return binding

    def run(self, binding: Binding, graph_id: int = UNCAPTURED) -> None:
        """Run the graph; on a GPU, return before it has finished.

        Args:
            binding: The binding of all inputs and outputs.
            graph_id: Number of the CUDA graph, captured at its first run and replayed at later
                ones.
        """
        self._session.run_with_iobinding(binding, self._options(graph_id))

    def _options(self, graph_id: int) -> Any:
        if graph_id not in self._run_options:
            options = onnxruntime.RunOptions()
            if self._kind == "cuda":
                options.add_run_config_entry("gpu_graph_id", str(graph_id))
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._run_options[graph_id] = options
        return self._run_options[graph_id]


def is_lack_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory has run out."""
    text = f"{type(error).__name__}: {error}".lower()
    return any(words in text for words in NO_ROOM)


def _load(graph_path: str, memory: DeviceMemory) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    provider = PROVIDERS["cuda" if memory.kind == "cuda" else "cpu"]
    if memory.kind == "cuda":
        # Outside the workers' image, CUDA libraries are Python packages, which are not on the
        # system's library path.
        onnxruntime.preload_dlls()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    try:
        session = onnxruntime.InferenceSession(
            graph_path, options, providers=[(provider, _provider_options(memory))]
        )
    except LOAD_ERRORS as error:
        if is_lack_of_memory(error):
            raise OptionsError(
                f"device: expected room for the weights of {graph_path}, got {error}; take a "
                "larger GPU, or a model of a smaller --precision"
            ) from error
        raise ArtifactError(f"{graph_path}: ONNX Runtime cannot load it: {error}") from error
    if provider not in session.get_providers():
        raise OptionsError(
            f"device: expected an ONNX Runtime whose {provider} starts, got one that does not; "
            "its log says which library it lacks, and beam-gemma[gpu] has them all"
        )
    return session


def _provider_options(memory: DeviceMemory) -> Mapping[str, str]:
    if memory.kind != "cuda":
        return {}
    return {
        "user_compute_stream": str(memory.stream),
        "enable_cuda_graph": "1",
        # Memory left after the peak goes to caches, so the arena must not take more than it needs.
        "arena_extend_strategy": "kSameAsRequested",
        # Sums of probabilities need the full precision of float32.
        "use_tf32": "0",
        # By timing, two processes would choose other algorithms, whose last bits differ.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
