"""One forward pass: the only module that imports onnxruntime.

A session owns the loaded graph and the state buffers, which are bound once, as input and as output
of every step, so that a step updates them in place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil

from beam_gemma.artifact import Artifact
from beam_gemma.errors import ArtifactError, OptionsError
from beam_gemma.runner import EmbedOutput, Feeds, Finished, ScoreOutput, StepOutput
from beam_gemma.signature import (
    CONTEXT_ALIGNMENT,
    Device,
    Head,
    PagedState,
    Signature,
    StateTensor,
    blocks_for,
)

try:
    import onnxruntime
except ModuleNotFoundError as error:
    # Its two builds are one package under two names, of which no dependency can ask for either.
    raise ModuleNotFoundError(
        "onnxruntime: expected one of its builds, got none; install beam-gemma[cpu], or "
        "beam-gemma[gpu] for NVIDIA GPUs",
        name="onnxruntime",
    ) from error

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
RUNNABLE: tuple[Device, ...] = ("cpu",)
"""Devices whose state buffers a session can keep."""
NUMERICS = 1
"""Raised where a request may give other bits than with the version before."""
CACHE_FRACTION = 0.4
"""Share of the free memory that caches may fill once the weights are loaded."""
LOGITS = "logits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """How much state a session keeps."""

    num_blocks: Mapping[str, int]
    """Cache blocks for each paged group; block 0 is padding and belongs to nobody."""
    num_state_slots: int
    """Sequences with recurrent state."""


class Session:
    """A loaded graph with its state."""

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
            signature: Its contract.
            capacity: Sizes of the state buffers.
            num_threads: Threads of one operator; 0 for one per core.

        Raises:
            OptionsError: the device is absent.
            ArtifactError: the graph is not what the signature says.
        """
        self.signature = signature
        self.num_blocks = dict(capacity.num_blocks)
        self.num_state_slots = capacity.num_state_slots
        self._session = _load(graph_path, signature.device, num_threads)
        _check_names(self._session, signature)
        sizes = {"S": capacity.num_state_slots}
        sizes |= {f"P_{group}": count for group, count in capacity.num_blocks.items()}
        self._state = {t.input_name: _zeros(t, sizes) for t in signature.state_tensors()}
        # What a binding has returned once it would fill again, so each set of outputs has its own.
        self._bindings = {with_logits: self._bind() for with_logits in (False, True)}

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        *,
        head: Head = "generate",
        device: Device = "cpu",
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_threads: int = 0,
    ) -> "Session":
        """Load a model folder's graph, with caches sized from the free memory."""
        signature = artifact.signature(head, device)
        graph_path = str(artifact.graph_path(head, device))
        weights = sum(
            entry.num_bytes for name, entry in artifact.files.items() if name.startswith("weights/")
        )
        # Weights are held once as file pages and once repacked for the matrix kernels.
        free = max(psutil.virtual_memory().available - 2 * weights, 0) * CACHE_FRACTION
        capacity = plan_capacity(
            signature,
            num_bytes=int(free),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        return cls(graph_path, signature, capacity, num_threads=num_threads)

    def run(self, feeds: Feeds, *, with_logits: bool = False) -> StepOutput | ScoreOutput:
        """Run one step to its end, as `start` does."""
        return self.start(feeds, with_logits=with_logits).result()

    def start(
        self,
        feeds: Feeds,
        *,
        with_logits: bool = False,
        with_candidates: bool = True,  # noqa: ARG002 - the host chooses among them
    ) -> Finished:
        """Run one step, at once, and update the state in place.

        Args:
            feeds: Exactly the arrays of `Signature.step_inputs`.
            with_logits: Whether to return the whole distribution of each row.
            with_candidates: Without effect, since the host chooses here: they always come.
        """
        arrays = self._run(feeds, with_logits=with_logits)
        if self.signature.head == "score":
            return Finished(ScoreOutput(**arrays))
        # ONNX Runtime's 64-bit integers come as C's `long long`, which numpy tells from int64.
        ids = arrays["topk_ids"].view(np.int64)
        return Finished(
            StepOutput(arrays["topk_logits"], ids, arrays["top_probability"], arrays.get(LOGITS))
        )

    def embed(self, feeds: Feeds) -> EmbedOutput:
        """Run one step over whole texts."""
        return EmbedOutput(**self._run(feeds, with_logits=False))

    def _run(self, feeds: Feeds, *, with_logits: bool) -> dict[str, np.ndarray]:
        """Run the graph and return its outputs, but the state, by name."""
        binding = self._bindings[with_logits]
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        names = [t.name for t in self.signature.outputs() if with_logits or t.name != LOGITS]
        for name in names:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        # State was bound first and comes first.
        fresh = binding.get_outputs()[len(self._state) :]
        return {name: value.numpy() for name, value in zip(names, fresh, strict=True)}

    def zero_blocks(self, group: str, blocks: Sequence[int]) -> None:
        """Overwrite cache blocks with zeros, so that no NaN outlives its row."""
        state = next(s for s in self.signature.paged_states if s.group == group)
        axis = 0 if self.signature.device == "cuda" else 1
        for layer in state.layers:
            for name in (f"key_cache.{layer}", f"value_cache.{layer}"):
                np.moveaxis(self._state[name], axis, 0)[list(blocks)] = 0

    def _bind(self) -> onnxruntime.IOBinding:
        """Return a binding that reads and writes the state buffers."""
        binding = self._session.io_binding()
        for tensor in self.signature.state_tensors():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(self._state[tensor.input_name])
            binding.bind_ortvalue_input(tensor.input_name, value)
            binding.bind_ortvalue_output(tensor.output_name, value)
        return binding


def plan_capacity(
    signature: Signature, *, num_bytes: int, max_num_seqs: int, max_num_batched_tokens: int
) -> Capacity:
    """Divide memory among the paged groups.

    A group with a window never needs more than the window, one chunk and the alignment of tables
    for each sequence; what it leaves goes to the others, up to the longest sequences there can be.
    """
    block = signature.block_size
    longest = blocks_for(signature.max_model_len + CONTEXT_ALIGNMENT, block)
    need, cost = {}, {}
    for state in signature.paged_states:
        per_sequence = longest
        if state.sliding_window is not None and signature.device == "cpu":
            reach = state.sliding_window + max_num_batched_tokens + 2 * CONTEXT_ALIGNMENT
            per_sequence = min(longest, blocks_for(reach, block))
        need[state.group] = max_num_seqs * per_sequence + 1
        cost[state.group] = block_bytes(signature, state)
    if not need:
        return Capacity(num_blocks={}, num_state_slots=max_num_seqs)
    num_blocks = {}
    left = num_bytes
    # The cheapest need first, each with at most an equal share of what is left.
    for i, group in enumerate(sorted(need, key=lambda g: need[g] * cost[g])):
        share = left // (len(need) - i)
        num_blocks[group] = min(need[group], share // cost[group])
        left -= num_blocks[group] * cost[group]
    starved = [group for group, count in num_blocks.items() if count < 2]
    if starved:
        raise OptionsError(
            f"cache: expected memory for at least 2 blocks of {starved[0]}, "
            f"got {num_bytes:,} bytes in all; free memory or run on a larger machine"
        )
    return Capacity(num_blocks=num_blocks, num_state_slots=max_num_seqs)


def block_bytes(signature: Signature, state: PagedState) -> int:
    """Return the bytes of one block in all layers of a group, keys and values."""
    item = np.dtype(signature.dtype).itemsize if signature.dtype != "bfloat16" else 2
    elements = state.num_key_value_heads * state.head_dim * signature.block_size
    return 2 * len(state.layers) * elements * item


def _zeros(tensor: StateTensor, sizes: Mapping[str, int]) -> np.ndarray:
    """Allocate a state buffer; zeros from the system cost no memory until they are written."""
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape]
    return np.zeros(shape, tensor.dtype)


def numerics() -> str:
    """Return whose arithmetic results are made with: ours, and ONNX Runtime's."""
    return f"{NUMERICS}, onnxruntime {onnxruntime.__version__}"


def require_device(device: Device) -> None:
    """Refuse a device that this machine's ONNX Runtime does not have.

    Raises:
        OptionsError: with the remedy; nothing falls back in silence.
    """
    have = onnxruntime.get_available_providers()
    if PROVIDERS[device] not in have:
        raise OptionsError(
            f"device: expected {device}, got an ONNX Runtime with {', '.join(have)}; install "
            "onnxruntime-gpu on a machine with an NVIDIA GPU, or run with --device cpu"
        )
    if device not in RUNNABLE:
        raise OptionsError(
            f"device: expected {' or '.join(RUNNABLE)}, got {device}; this version exports graphs "
            "for it and does not run them yet"
        )


def _load(graph_path: str, device: Device, num_threads: int) -> onnxruntime.InferenceSession:
    require_device(device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(graph_path, options, providers=[PROVIDERS[device]])
    except (
        onnxruntime.capi.onnxruntime_pybind11_state.Fail,
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf,
        onnxruntime.capi.onnxruntime_pybind11_state.NoSuchFile,
    ) as error:
        raise ArtifactError(f"{graph_path}: ONNX Runtime cannot load it: {error}") from error
    if PROVIDERS[device] not in session.get_providers():
        raise OptionsError(f"device: expected {device}, got a session without it")
    return session


def _check_names(session: onnxruntime.InferenceSession, signature: Signature) -> None:
    """Compare the graph's inputs and outputs with the signature."""
    state = signature.state_tensors()
    inputs = [t.name for t in signature.step_inputs()] + [t.input_name for t in state]
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
