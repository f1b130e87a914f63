"""A graph that ONNX Runtime runs between fixed addresses.

Nothing falls back in silence: what keeps a graph off the GPU, whole or in part, is an error with a
remedy. On plain memory the same code runs on the CPU.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnxruntime

from beam_gemma.errors import ArtifactError, OptionsError
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.cpu_session import check_names
from beam_gemma.runtime.device_memory import DeviceMemory
from beam_gemma.runtime.devices import LOAD_ERRORS, PROVIDERS

Binding: TypeAlias = Any
"""ONNX Runtime's, which has no types."""
UNCAPTURED = -1
"""In place of the number of a CUDA graph."""
BFLOAT16 = 16
"""ONNX's number of the type that numpy lacks."""
NO_ROOM = ("failed to allocate memory", "out of memory", "alloc_failed", "bad_alloc")
"""What errors say where memory has run out, whoever raised them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an input or output lies."""

    name: str
    dtype: str
    """numpy's name, or `bfloat16`."""
    shape: tuple[int, ...]
    address: int
    is_on_host: bool = False


class BoundGraph:
    """A loaded graph."""

    def __init__(self, graph_path: str, signature: Signature, memory: DeviceMemory) -> None:
        """Load it, and its weights onto the device.

        Raises:
            OptionsError: ONNX Runtime has not got the device.
            ArtifactError: the graph is not what the signature says, or would not run there whole.
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
            inputs: All, or those that are to change.
            outputs: Likewise.
            binding: What to change; None for a new binding.
        """
        binding = binding or self._session.io_binding()
        for bind, places in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for place in places:
                kind = "cpu" if place.is_on_host else self._kind
                dtype = BFLOAT16 if place.dtype == "bfloat16" else np.dtype(place.dtype).type
                bind(place.name, kind, 0, dtype, place.shape, place.address)
        return binding

    def run(self, binding: Binding, graph_id: int = UNCAPTURED) -> None:
        """Run the graph; it may be on its way still.

        Args:
            binding: Of all inputs and outputs.
            graph_id: Names what is launched, which is recorded at the first run of the name and
                replayed at others.
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
    """Return whether an error says that the device has no more memory."""
    text = f"{type(error).__name__}: {error}".lower()
    return any(words in text for words in NO_ROOM)


def _load(graph_path: str, memory: DeviceMemory) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    provider = PROVIDERS["cuda" if memory.kind == "cuda" else "cpu"]
    if memory.kind == "cuda":
        # Where CUDA comes as packages, as outside of the workers' image, it lies in none of the
        # places that the system looks in.
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
        # What is left after a peak is for caches, so the arena takes what it needs and no more.
        "arena_extend_strategy": "kSameAsRequested",
        # Sums of probabilities need all bits of float32.
        "use_tf32": "0",
    }
