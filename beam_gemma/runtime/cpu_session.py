"""Steps on the CPU.

A session owns the loaded graph and the state buffers. Each buffer is bound once, as both input and
output of every step, so that a step updates it in place.

Dimensions: T tokens, D hidden.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Head
from beam_gemma.model.signature import Signature
from beam_gemma.monitoring.timeline import DeviceStats
from beam_gemma.runtime.capacity import Capacity, plan_capacity
from beam_gemma.runtime.devices import LOAD_ERRORS, PROVIDERS, onnxruntime
from beam_gemma.runtime.host_memory import host_memory
from beam_gemma.runtime.step_interface import EmbedOutput, Feeds, Finished, ScoreOutput, StepOutput

CACHE_FRACTION = 0.4
"""Share of the memory left after loading the weights that caches may use."""
LOGITS = "logits"


class Session:
    """A loaded graph with its state, on the CPU."""

    max_steps_in_flight = 1

    def __init__(
        self,
        graph_path: str,
        signature: Signature,
        capacity: Capacity,
        *,
        num_threads: int = 0,
    ) -> None:
        """Load a graph and allocate its state.

        Args:
            graph_path: The ONNX file.
            signature: The graph's contract.
            capacity: Sizes of the state buffers.
            num_threads: Threads per operator; 0 means one per core.

        Raises:
            ArtifactError: the graph cannot be loaded or differs from its signature.
        """
        self.signature = signature
        self.num_blocks = dict(capacity.num_blocks)
        self.num_state_slots = capacity.num_state_slots
        self._session = load_graph(graph_path, num_threads)
        check_names(self._session, signature)
        # The pages of zeros take no memory until they are written.
        self._state = {
            t.input_name: np.zeros(capacity.shape_of(t), t.dtype) for t in signature.state_tensors()
        }
        self._recurrent = [name for s in signature.recurrent_states for name in s.names]
        # A binding keeps every output once bound to it, so each set of outputs has its own binding.
        self._bindings = {with_logits: self._bind() for with_logits in (False, True)}

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        *,
        head: Head = "generate",
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_threads: int = 0,
    ) -> "Session":
        """Load a model folder's graph, with caches sized to the free memory."""
        signature = artifact.signature(head, "cpu")
        graph_path = str(artifact.graph_path(head, "cpu"))
        weights = sum(
            entry.num_bytes for name, entry in artifact.files.items() if name.startswith("weights/")
        )
        # Weights are in memory twice: as file pages, and repacked for the matrix kernels.
        free = max(host_memory().available - 2 * weights, 0) * CACHE_FRACTION
        capacity = plan_capacity(
            signature,
            num_bytes=int(free),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        return cls(graph_path, signature, capacity, num_threads=num_threads)

    def run(self, feeds: Feeds, *, with_logits: bool = False) -> StepOutput | ScoreOutput:
        """Run one step and return its outputs."""
        return self.start(feeds, with_logits=with_logits).result()

    def start(
        self,
        feeds: Feeds,
        *,
        with_logits: bool = False,
        with_candidates: bool = True,  # noqa: ARG002 - the host chooses among them
    ) -> Finished:
        """Run one step synchronously, which updates the state in place.

        Args:
            feeds: The step's inputs: exactly the arrays of `Signature.step_inputs`.
            with_logits: Whether to return the full distribution of each row.
            with_candidates: Ignored; candidates are always returned, since the host chooses.
        """
        arrays = self._run(feeds, with_logits=with_logits)
        if self.signature.head == "score":
            return Finished(ScoreOutput(**arrays))
        # ONNX Runtime returns C's `long long`, which numpy distinguishes from int64.
        ids = arrays["topk_ids"].view(np.int64)
        return Finished(
            StepOutput(arrays["topk_logits"], ids, arrays["top_probability"], arrays.get(LOGITS))
        )

    def embed(self, feeds: Feeds) -> EmbedOutput:
        """Run one step over whole texts and return their embeddings."""
        return EmbedOutput(**self._run(feeds, with_logits=False))

    def encode(self, feeds: Feeds) -> Float32[np.ndarray, "T D"]:
        """Run one step over whole sources and return the state of each token."""
        [states] = self._run(feeds, with_logits=False).values()
        return states

    def stats(self) -> DeviceStats:
        """Return empty GPU statistics."""
        return DeviceStats()

    def _run(self, feeds: Feeds, *, with_logits: bool) -> dict[str, np.ndarray]:
        """Run the graph and return its outputs by name, without the state."""
        binding = self._bindings[with_logits]
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        names = [t.name for t in self.signature.outputs() if with_logits or t.name != LOGITS]
        for name in names:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        # The state was bound first, so its outputs come first.
        fresh = binding.get_outputs()[len(self._state) :]
        return {name: value.numpy() for name, value in zip(names, fresh, strict=True)}

    def zero_blocks(self, group: str, blocks: Sequence[int]) -> None:
        """Overwrite cache blocks with zeros, so that a finished row leaves no NaN in them."""
        state = next(s for s in self.signature.paged_states if s.group == group)
        for layer in state.layers:
            for name in state.names(layer):
                self._state[name][:, list(blocks)] = 0

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the recurrent state of a slot to another one."""
        for name in self._recurrent:
            self._state[name][target] = self._state[name][source]

    def _bind(self) -> onnxruntime.IOBinding:
        """Return a binding that reads and writes the state buffers."""
        binding = self._session.io_binding()
        for tensor in self.signature.state_tensors():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(self._state[tensor.input_name])
            binding.bind_ortvalue_input(tensor.input_name, value)
            binding.bind_ortvalue_output(tensor.output_name, value)
        return binding


def load_graph(graph_path: str, num_threads: int) -> onnxruntime.InferenceSession:
    """Load a graph onto the CPU.

    Raises:
        ArtifactError: ONNX Runtime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(graph_path, options, providers=[PROVIDERS["cpu"]])
    except LOAD_ERRORS as error:
        raise ArtifactError(f"{graph_path}: ONNX Runtime cannot load it: {error}") from error


def check_names(session: onnxruntime.InferenceSession, signature: Signature) -> None:
    """Compare the names of a graph's inputs and outputs with its signature.

    Raises:
        ArtifactError: the names differ.
    """
    state = signature.state_tensors()
    inputs = [t.name for t in signature.step_inputs()] + [t.input_name for t in state]
    inputs += [table.name for table in signature.tables]
    outputs = [t.name for t in signature.outputs()] + [t.output_name for t in state]
    for kind, names, values in (
        ("inputs", inputs, session.get_inputs()),
        ("outputs", outputs, session.get_outputs()),
    ):
        missing = sorted(set(names) - {value.name for value in values})
        extra = sorted({value.name for value in values} - set(names))
        if missing or extra:
            raise ArtifactError(
                f"graph: expected the {kind} {missing}, got {extra} in their place; "
                "export the model again"
            )
