"""Steps on a GPU, started without waiting for the previous step.

Weights, caches, and one buffer each for a step's inputs and outputs keep fixed addresses. A step's
inputs lie in one piece of pinned memory and are copied to the device in one call; the outputs
fetched in every step come back in another. So the host prepares the next step while the device
works. A decode step is one CUDA graph, which ONNX Runtime captures once for each shape and replays
for all later steps of that shape.

A graph is captured with an empty step: ONNX Runtime runs a graph twice while capturing it, so a
real step would choose two tokens.

Dimensions: V vocabulary, T tokens, D hidden.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from beam_gemma.errors import DeviceError, OptionsError
from beam_gemma.model.signature import Signature
from beam_gemma.monitoring.startup_log import logged
from beam_gemma.monitoring.timeline import DeviceStats
from beam_gemma.runtime.bound_graph import UNCAPTURED, Binding, BoundGraph, Place, is_lack_of_memory
from beam_gemma.runtime.capacity import Capacity, num_slots, plan_capacity, within_reach
from beam_gemma.runtime.device_memory import DeviceMemory, Mark
from beam_gemma.runtime.device_state import DeviceState
from beam_gemma.runtime.placed_tables import PlacedTables
from beam_gemma.runtime.step_buffers import CANDIDATES, Layout, StepBuffers, num_real
from beam_gemma.runtime.step_interface import EmbedOutput, Feeds, ScoreOutput, StepOutput
from beam_gemma.runtime.step_shapes import (
    StepShape,
    StepSizes,
    largest_shapes,
    no_step,
    pad,
    side_by_side,
)

LOGGER = logging.getLogger(__name__)
MAX_STEPS_IN_FLIGHT = 2
MIB = 1 << 20


class CudaSession:
    """A loaded graph with its state on one GPU; only one thread at a time may use it."""

    max_steps_in_flight = MAX_STEPS_IN_FLIGHT

    def __init__(
        self,
        graph_path: str,
        signature: Signature,
        memory: DeviceMemory,
        *,
        sizes: StepSizes,
        max_num_seqs: int,
        memory_utilization: float,
    ) -> None:
        """Load a graph, run its largest steps, and allocate caches in the memory that is left.

        Args:
            graph_path: The ONNX file.
            signature: The graph's contract.
            memory: The device's memory.
            sizes: Sizes that steps are padded to.
            max_num_seqs: Maximum number of sequences with state of a fixed size.
            memory_utilization: Share of the device's memory to use.

        Raises:
            OptionsError: the device has too little memory.
            ArtifactError: the graph differs from its signature, or part of it cannot run there.
        """
        self.signature = signature
        self.num_state_slots = num_slots(signature, max_num_seqs) + 1
        """Number of slots, including those for snapshots and a spare last one for padding."""
        self._max_num_seqs = max_num_seqs
        self._memory = memory
        self._sizes = sizes
        self._stats = DeviceStats(total_mib=memory.room().total // MIB)
        self._bound: dict[StepShape, _Bound] = {}
        """Bindings of decode steps, each with a captured graph."""
        self._latest: _Bound | None = None
        """Binding of the latest step that was not a decode step."""
        self._pending: list[PendingStep | None] = [None] * MAX_STEPS_IN_FLIGHT
        with logged("moved weights to the device"):
            self._graph = BoundGraph(graph_path, signature, memory)
        with logged("read tables"):
            self._tables = PlacedTables(signature, Path(graph_path).parent, memory)
        if self._gathers:
            self._shorten(memory_utilization)
        try:
            with logged("ran the largest steps and allocated caches"):
                self._open(memory_utilization)
        except Exception as error:  # lack of memory comes as many types, with one remedy
            if is_lack_of_memory(error):
                raise _no_room(memory, error) from error
            raise

    def start(
        self, feeds: Feeds, *, with_logits: bool = False, with_candidates: bool = True
    ) -> "PendingStep":
        """Start one step, which updates the state in place.

        Args:
            feeds: The step's inputs.
            with_logits: Whether the full distributions of the `full_rows` can be fetched.
            with_candidates: Whether to return candidates even if the device chooses tokens.

        Raises:
            DeviceError: the step is larger than all step sizes, or a CUDA call failed.
        """
        shape = self._sizes.shape(feeds, self.signature, with_logits=with_logits)
        frame = self._free_frame()
        try:
            bound = self._bound_to(shape)
            begin = self._memory.mark()
            self._launch(bound, feeds)
            num_bytes = bound.layout.num_output_bytes(with_candidates=with_candidates)
            target = self._buffers.outputs[frame][:num_bytes]
            self._memory.copy_out(target, self._buffers.output_address)
            end = self._memory.mark()
        except Exception as error:  # a device may raise any type; in-flight copies must end first
            self._rest()
            if is_lack_of_memory(error):
                self._give_up(shape)
            raise
        is_replay = bound.graph_id != UNCAPTURED
        steps, replays = self._stats.steps + 1, self._stats.replays + is_replay
        self._stats = replace(self._stats, steps=steps, replays=replays)
        outputs = {
            name: slot.of(target)[: num_real(slot.tensor, feeds)]
            for name, slot in bound.layout.fetched(with_candidates=with_candidates).items()
        }
        pending = PendingStep(self, outputs, begin, end, with_logits=with_logits)
        self._pending[frame] = pending
        return pending

    def run(self, feeds: Feeds, *, with_logits: bool = False) -> StepOutput | ScoreOutput:
        """Start one step, wait for it and return its outputs."""
        return self.start(feeds, with_logits=with_logits).result()

    def embed(self, feeds: Feeds) -> EmbedOutput:
        """Run one step over whole texts and return their embeddings."""
        if self.signature.device == "cuda":
            feeds = side_by_side(feeds)
        return EmbedOutput(**self.start(feeds).arrays())

    def encode(self, feeds: Feeds) -> Shaped[np.ndarray, "T D"]:
        """Run one step over whole sources and return the state of each token."""
        if self.signature.device == "cuda":
            feeds = side_by_side(feeds)
        [states] = self.start(feeds).arrays().values()
        return states

    def zero_blocks(self, group: str, blocks: list[int]) -> None:
        """Overwrite cache blocks with zeros, after all steps started so far."""
        self._state.zero_blocks(group, blocks)

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the recurrent state of a slot to another one, after all steps started so far."""
        self._state.copy_slot(source, target)

    def stats(self) -> DeviceStats:
        """Return statistics so far; querying the device here could break a graph capture."""
        return self._stats

    def logits(self, row: int) -> Float32[np.ndarray, " V"]:
        """Return the logits of one of the `full_rows` of the step that was started last."""
        return self._buffers.logits(row)

    def count(self, seconds: float) -> None:
        """Add the seconds that the device spent on a step to the statistics."""
        self._stats = replace(self._stats, busy_secs=self._stats.busy_secs + seconds)

    def _open(self, memory_utilization: float) -> None:
        """Run the largest steps, empty, with one-block caches; then size caches to free memory."""
        largest = largest_shapes(self._sizes, self.signature)
        self._buffers = StepBuffers(
            self.signature, self._memory, largest=largest, num_frames=MAX_STEPS_IN_FLIGHT
        )
        groups = [state.group for state in self.signature.paged_states]
        capacity = Capacity(
            num_blocks=dict.fromkeys(groups, 1), num_state_slots=self.num_state_slots
        )
        self._state = DeviceState(self.signature, capacity, self._memory)
        for shape in largest:
            past = self.signature.max_model_len if self._gathers and not shape.is_decode else 0
            self._run_for_nobody(self._bind(shape, UNCAPTURED), past)
        self._state.free()
        capacity = plan_capacity(
            self.signature,
            num_bytes=self._num_free_bytes(memory_utilization),
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._sizes.prefill[-1],
        )
        self.num_blocks = dict(capacity.num_blocks)
        capacity = replace(capacity, num_state_slots=self.num_state_slots)
        self._state = DeviceState(self.signature, capacity, self._memory)
        self._measure()

    @property
    def _gathers(self) -> bool:
        """True if prefill steps gather the keys and values of some layers."""
        return self.signature.gathered_heads > 0 and self._sizes.has_flash

    def _shorten(self, memory_utilization: float) -> None:
        """Lower the length of the longest sequence to what a step has room to gather."""
        before = self.signature.max_model_len
        self.signature = within_reach(
            self.signature,
            num_bytes=self._num_free_bytes(memory_utilization),
            num_prefill_tokens=self._sizes.prefill[-1],
        )
        if (after := self.signature.max_model_len) < before:
            LOGGER.warning(
                "device: room to gather the keys and values of %d tokens, so that no sequence may "
                "have more than these; the model takes %d",
                after,
                before,
            )

    def _num_free_bytes(self, memory_utilization: float) -> int:
        """Return the free part of the share of the memory that may be used, in bytes."""
        room = self._memory.room()
        return max(0, room.free - round((1 - memory_utilization) * room.total))

    def _bound_to(self, shape: StepShape) -> "_Bound":
        """Return the binding of a shape; a decode shape's graph is captured at its first step."""
        if not shape.is_decode:
            # These shapes differ in their number of sequences and have no captured graph to keep.
            if self._latest is None or self._latest.layout.shape != shape:
                self._latest = self._bind(shape, UNCAPTURED, self._latest)
            return self._latest
        if shape not in self._bound:
            bound = self._bind(shape, graph_id=len(self._bound) + 1)
            self._run_for_nobody(bound)
            self._bound[shape] = bound
            self._stats = replace(self._stats, graphs=len(self._bound))
            self._measure()
        return self._bound[shape]

    def _bind(self, shape: StepShape, graph_id: int, old: "_Bound | None" = None) -> "_Bound":
        """Bind all inputs and outputs of a shape, or update all but the state in binding `old`."""
        layout = self._buffers.layout(shape)
        inputs, outputs = self._buffers.places(layout)
        inputs += () if old else self._tables.places
        for placed in () if old else self._state:
            tensor, where = placed.tensor, (placed.tensor.dtype, placed.shape, placed.address)
            inputs.append(Place(tensor.input_name, *where))
            outputs.append(Place(tensor.output_name, *where))
        return _Bound(layout, self._graph.bind(inputs, outputs, old and old.binding), graph_id)

    def _launch(self, bound: "_Bound", feeds: Feeds, past: int = 0) -> None:
        """Copy a step's inputs to the device and start the graph.

        Args:
            bound: The binding of the step's shape.
            feeds: The step's inputs.
            past: Number of tokens before those of the first padding sequence.
        """
        buffer = self._buffers.inputs[self._free_frame()]
        views = {name: slot.of(buffer) for name, slot in bound.layout.inputs.items()}
        pad(feeds, bound.layout.shape, views, spare_slot=self.num_state_slots - 1)
        if past:
            views["past_seqlens"][len(feeds["past_seqlens"])] = past
        source = buffer[: bound.layout.num_input_bytes]
        self._memory.copy_in(self._buffers.input_address, source)
        self._graph.run(bound.binding, bound.graph_id)

    def _run_for_nobody(self, bound: "_Bound", past: int = 0) -> None:
        """Run a step without sequences, which changes no sequence's state, and wait for it."""
        self._launch(bound, no_step(self.signature), past)
        self._memory.mark().wait()

    def _free_frame(self) -> int:
        """Return the index of the next step's pinned buffers; wait for the step that uses them."""
        frame = self._stats.steps % MAX_STEPS_IN_FLIGHT
        if (pending := self._pending[frame]) is not None:
            pending.settle()
        return frame

    def _rest(self) -> None:
        """Wait until the device is idle; a pending step raises its own errors when waited for."""
        with suppress(DeviceError):
            self._memory.mark().wait()

    def _measure(self) -> None:
        room = self._memory.room()
        self._stats = replace(self._stats, used_mib=(room.total - room.free) // MIB)

    def _give_up(self, shape: StepShape) -> None:
        """Drop a step size that the device has no memory for.

        Prompts are not split into chunks smaller than a block, so prefill steps keep at least
        `block_size` tokens.
        """
        kind, least, size = "prefill", self.signature.block_size, shape.size
        if shape.is_decode:
            kind, least = "decode", 1
        elif shape.num_source_tokens > size:
            kind, least, size = "sources", 1, shape.num_source_tokens
        sizes: tuple[int, ...] = getattr(self._sizes, kind)
        if size not in sizes or size <= least:
            return
        smaller = tuple(s for s in sizes if s < size) or (max(size // 2, least),)
        changed: dict[str, Any] = {kind: smaller}
        self._sizes = replace(self._sizes, **changed)
        LOGGER.warning(
            "device: no room for %s of %d tokens; from now on they have at most %d",
            kind if kind == "sources" else f"{kind} steps",
            size,
            smaller[-1],
        )


class PendingStep:
    """A step that was started and may still run."""

    def __init__(
        self,
        session: CudaSession,
        outputs: Mapping[str, np.ndarray],
        begin: Mark,
        end: Mark,
        *,
        with_logits: bool,
    ) -> None:
        """Record a started step.

        Args:
            session: The session that runs the step.
            outputs: Outputs by name, in pinned memory that later steps reuse.
            begin: Mark at the start of the step.
            end: Mark at which the outputs are complete.
            with_logits: Whether the step's logits can be fetched.
        """
        self._session = session
        self._outputs = outputs
        self._begin = begin
        self._end = end
        self._with_logits = with_logits
        self._is_settled = False
        self._error: Exception | None = None

    def result(self) -> StepOutput | ScoreOutput:
        """Wait for the step and return its outputs, or raise the device's error."""
        arrays: dict[str, Any] = self.arrays()
        if self._session.signature.head == "score":
            return ScoreOutput(**arrays)
        arrays = dict.fromkeys(CANDIDATES) | arrays
        return StepOutput(**arrays, logits=_Logits(self._session) if self._with_logits else None)

    def arrays(self) -> dict[str, np.ndarray]:
        """Wait for the step and return its outputs by name, or raise the device's error."""
        self.settle()
        if self._error is not None:
            raise self._error
        return dict(self._outputs)

    def settle(self) -> None:
        """Wait for the step and copy its outputs out of pinned memory."""
        if self._is_settled:
            return
        self._is_settled = True
        try:
            self._end.wait()
            self._session.count(self._end.seconds_since(self._begin))
        except Exception as error:  # raised by `arrays`
            self._error = error
        self._outputs = {name: array.copy() for name, array in self._outputs.items()}


class _Logits:
    """Full logits of a step's rows, each row fetched on access."""

    def __init__(self, session: CudaSession) -> None:
        self._session = session

    def __getitem__(self, row: int) -> Float32[np.ndarray, " V"]:
        return self._session.logits(row)


@dataclass(frozen=True, slots=True)
class _Bound:
    """Layout, binding and CUDA graph number shared by all steps of a shape."""

    layout: Layout
    binding: Binding
    graph_id: int


def _no_room(memory: DeviceMemory, error: Exception) -> OptionsError:
    room = memory.room()
    return OptionsError(
        f"device: expected room for the model's weights, its largest step and its caches, got "
        f"{room.free / 2**30:.1f} of {room.total / 2**30:.1f} GiB left and {error}; take a larger "
        "GPU, a model of a smaller --precision, or a smaller --max_num_batched_tokens"
    )
