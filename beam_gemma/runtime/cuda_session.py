"""Steps on a GPU, started one after another without waiting for the one before.

Everything has its place from the beginning: weights, caches, and one buffer each for what goes into
a step and for what comes out. A step's inputs lie in one piece of pinned memory and cross by one
copy; what every step returns comes back by another. So the host lays out the next step while the
device is at work, and a decode step is one CUDA graph, which ONNX Runtime records for each shape
and replays for all other steps of it.

A shape is recorded by a step for nobody: ONNX Runtime runs what it records twice, which would
choose two tokens.

Dimensions: V vocabulary.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32

from beam_gemma.errors import DeviceError, OptionsError
from beam_gemma.model.signature import Signature
from beam_gemma.monitoring.startup_log import logged
from beam_gemma.monitoring.timeline import DeviceStats
from beam_gemma.runtime.bound_graph import UNCAPTURED, Binding, BoundGraph, Place, is_lack_of_memory
from beam_gemma.runtime.capacity import Capacity, plan_capacity
from beam_gemma.runtime.device_memory import DeviceMemory, Mark
from beam_gemma.runtime.device_state import DeviceState
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
    """A loaded graph with its state, on one GPU; one thread at a time may use it."""

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
        """Load a graph, find out what its largest steps take, and give what is left to caches.

        Args:
            graph_path: The ONNX file.
            signature: Its contract.
            memory: Of the device.
            sizes: That steps are padded to.
            max_num_seqs: Sequences that have state of a fixed size.
            memory_utilization: Share of the device's memory to use.

        Raises:
            OptionsError: the device has no room for it.
            ArtifactError: the graph is not what the signature says, or would not run there whole.
        """
        self.signature = signature
        self.num_state_slots = max_num_seqs + 1
        """The last belongs to nobody."""
        self._memory = memory
        self._sizes = sizes
        self._stats = DeviceStats(total_mib=memory.room().total // MIB)
        self._bound: dict[StepShape, _Bound] = {}
        """Of decode steps, each with a recorded graph."""
        self._latest: _Bound | None = None
        """Of other steps."""
        self._pending: list[PendingStep | None] = [None] * MAX_STEPS_IN_FLIGHT
        with logged("moved weights to the device"):
            self._graph = BoundGraph(graph_path, signature, memory)
        try:
            with logged("ran the largest steps and allocated caches"):
                self._open(memory_utilization)
        except Exception as error:  # whatever says so, memory that is short has one remedy
            if is_lack_of_memory(error):
                raise _no_room(memory, error) from error
            raise

    def start(
        self, feeds: Feeds, *, with_logits: bool = False, with_candidates: bool = True
    ) -> "PendingStep":
        """Start one step, which updates the state in place.

        Args:
            feeds: The step.
            with_logits: Whether the whole distribution of the `full_rows` can be asked for.
            with_candidates: Whether to return candidates even where the device chooses.

        Raises:
            DeviceError: there is no room for a step of this size.
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
        except Exception as error:  # a device may raise anything; pinned memory must come to rest
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
        """Run one step to its end, as `start` does."""
        return self.start(feeds, with_logits=with_logits).result()

    def embed(self, feeds: Feeds) -> EmbedOutput:
        """Run one step over whole texts."""
        if self.signature.device == "cuda":
            feeds = side_by_side(feeds)
        return EmbedOutput(**self.start(feeds).arrays())

    def zero_blocks(self, group: str, blocks: list[int]) -> None:
        """Overwrite cache blocks with zeros, after the steps that were started before."""
        self._state.zero_blocks(group, blocks)

    def stats(self) -> DeviceStats:
        """Return what was done so far; the device is not asked, which could spoil a recording."""
        return self._stats

    def logits(self, row: int) -> Float32[np.ndarray, " V"]:
        """Return the distribution of one of the `full_rows` of the step that was started last."""
        return self._buffers.logits(row)

    def count(self, seconds: float) -> None:
        """Count how long the device was busy with a step."""
        self._stats = replace(self._stats, busy_secs=self._stats.busy_secs + seconds)

    def _open(self, memory_utilization: float) -> None:
        """Run the largest steps over caches for nobody; then allocate caches in what is left."""
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
            self._run_for_nobody(self._bind(shape, UNCAPTURED))
        self._state.free()
        room = self._memory.room()
        capacity = plan_capacity(
            self.signature,
            num_bytes=max(0, room.free - round((1 - memory_utilization) * room.total)),
            max_num_seqs=self.num_state_slots - 1,
            max_num_batched_tokens=self._sizes.prefill[-1],
        )
        self.num_blocks = dict(capacity.num_blocks)
        capacity = replace(capacity, num_state_slots=self.num_state_slots)
        self._state = DeviceState(self.signature, capacity, self._memory)
        self._measure()

    def _bound_to(self, shape: StepShape) -> "_Bound":
        """Return the binding of a shape; one that is replayed is recorded when it first comes."""
        if not shape.is_decode:
            # Shapes differ in their number of sequences, and there is nothing to keep of them.
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
        """Bind all inputs and outputs of a shape, or change those that are not state."""
        layout = self._buffers.layout(shape)
        inputs, outputs = self._buffers.places(layout)
        for placed in () if old else self._state:
            tensor, where = placed.tensor, (placed.tensor.dtype, placed.shape, placed.address)
            inputs.append(Place(tensor.input_name, *where))
            outputs.append(Place(tensor.output_name, *where))
        return _Bound(layout, self._graph.bind(inputs, outputs, old and old.binding), graph_id)

    def _launch(self, bound: "_Bound", feeds: Feeds) -> None:
        """Copy a step's inputs to the device, and run the graph."""
        buffer = self._buffers.inputs[self._free_frame()]
        views = {name: slot.of(buffer) for name, slot in bound.layout.inputs.items()}
        pad(feeds, bound.layout.shape, views, spare_slot=self.num_state_slots - 1)
        source = buffer[: bound.layout.num_input_bytes]
        self._memory.copy_in(self._buffers.input_address, source)
        self._graph.run(bound.binding, bound.graph_id)

    def _run_for_nobody(self, bound: "_Bound") -> None:
        """Run a step that changes nothing, to its end."""
        self._launch(bound, no_step(self.signature))
        self._memory.mark().wait()

    def _free_frame(self) -> int:
        """Return which pinned memory the next step has, once the step before it there is over."""
        frame = self._stats.steps % MAX_STEPS_IN_FLIGHT
        if (pending := self._pending[frame]) is not None:
            pending.settle()
        return frame

    def _rest(self) -> None:
        """Wait until nothing is on its way; what goes wrong on it shows where it is waited for."""
        with suppress(DeviceError):
            self._memory.mark().wait()

    def _measure(self) -> None:
        room = self._memory.room()
        self._stats = replace(self._stats, used_mib=(room.total - room.free) // MIB)

    def _give_up(self, shape: StepShape) -> None:
        """Have no more steps of a size that the device has no room for.

        No prompt is cut finer than a block, so prefill steps stay that large.
        """
        kind, least = ("decode", 1) if shape.is_decode else ("prefill", self.signature.block_size)
        sizes: tuple[int, ...] = getattr(self._sizes, kind)
        size = shape.size
        if size not in sizes or size <= least:
            return
        smaller = tuple(s for s in sizes if s < size) or (max(size // 2, least),)
        self._sizes = replace(self._sizes, **{kind: smaller})
        LOGGER.warning(
            "device: no room for %s steps of %d tokens; from now on they have at most %d",
            kind,
            size,
            smaller[-1],
        )


class PendingStep:
    """A step on its way."""

    def __init__(
        self,
        session: CudaSession,
        outputs: Mapping[str, np.ndarray],
        begin: Mark,
        end: Mark,
        *,
        with_logits: bool,
    ) -> None:
        """Begin to wait.

        Args:
            session: Runs the step.
            outputs: By name, in pinned memory that others need later.
            begin: Where the step begins in the stream.
            end: Where the outputs are complete.
            with_logits: Whether there are logits.
        """
        self._session = session
        self._outputs = outputs
        self._begin = begin
        self._end = end
        self._with_logits = with_logits
        self._is_settled = False
        self._error: Exception | None = None

    def result(self) -> StepOutput | ScoreOutput:
        """Wait for the step and return its outputs; what went wrong on the device is raised."""
        arrays: dict[str, Any] = self.arrays()
        if self._session.signature.head == "score":
            return ScoreOutput(**arrays)
        arrays = dict.fromkeys(CANDIDATES) | arrays
        return StepOutput(**arrays, logits=_Logits(self._session) if self._with_logits else None)

    def arrays(self) -> dict[str, np.ndarray]:
        """Wait for the step and return its outputs by name."""
        self.settle()
        if self._error is not None:
            raise self._error
        return dict(self._outputs)

    def settle(self) -> None:
        """Wait for the step, and take its outputs out of pinned memory."""
        if self._is_settled:
            return
        self._is_settled = True
        try:
            self._end.wait()
            self._session.count(self._end.seconds_since(self._begin))
        except Exception as error:  # whoever asks for the result hears of it
            self._error = error
        self._outputs = {name: array.copy() for name, array in self._outputs.items()}


class _Logits:
    """The distributions of a step's rows, each fetched when somebody asks for it."""

    def __init__(self, session: CudaSession) -> None:
        self._session = session

    def __getitem__(self, row: int) -> Float32[np.ndarray, " V"]:
        return self._session.logits(row)


@dataclass(frozen=True, slots=True)
class _Bound:
    """What steps of a shape have in common."""

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
