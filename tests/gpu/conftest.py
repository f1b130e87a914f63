"""Where graphs for CUDA run in these tests: on a card, or with the CPU's attention on plain memory.

Each test takes `place`. On the host graphs are changed by `tests/doubles/cuda_on_cpu.py`, so
everything runs there but the kernels; on a card, marked `gpu`, the graph is as it was exported.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from beam_gemma.engine.engine import Engine
from beam_gemma.model.artifact import Artifact
from beam_gemma.runtime.cuda_session import CudaSession
from beam_gemma.runtime.device_memory import CudaMemory, HostMemory
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.runtime.step_shapes import StepSizes
from tests.doubles.cuda_models import exported, rounded_reference
from tests.doubles.cuda_on_cpu import cuda_file_on_cpu

HOST_BYTES = 64 << 20
SLOTS, TOKENS = 8, 160


@dataclass(frozen=True)
class Place:
    """A tiny model for CUDA, somewhere."""

    is_card: bool
    reference: torch.nn.Module
    """In float32, with weights that bfloat16 holds."""
    artifact: Artifact
    graph: str

    @property
    def tolerance(self) -> float:
        """Of logits, relative to their norm."""
        if not self.is_card:
            return 1e-4  # float32, with sums in another order
        return {"bf16": 3e-2, "fp16": 4e-3}[self.artifact.precision]

    def session(self, *, decode: tuple[int, ...] = (SLOTS,)) -> CudaSession:
        """Load the model."""
        signature = self.artifact.signature("generate", "cuda")
        if not self.is_card:
            signature = replace(signature, dtype="float32")
        return CudaSession(
            self.graph,
            signature,
            CudaMemory() if self.is_card else HostMemory(HOST_BYTES),
            sizes=StepSizes(decode=decode, prefill=(TOKENS,)),
            max_num_seqs=SLOTS,
            memory_utilization=0.5,
        )

    def engine(self, session: CudaSession | None = None, **config: bool) -> Engine:
        """Start an engine over the model, or over a session of it."""
        settings = EngineConfig(max_num_seqs=SLOTS, max_num_batched_tokens=TOKENS, **config)
        return Engine(session or self.session(), settings)


PlaceOf = Callable[[str, str, str], Place]
"""Places by kind, model and precision."""


@pytest.fixture(scope="session")
def place_of(tmp_path_factory: pytest.TempPathFactory) -> PlaceOf:
    folder = tmp_path_factory.mktemp("places")

    @functools.cache
    def place(kind: str, name: str, precision: str) -> Place:
        artifact = exported(name, "cuda", precision, ("generate", "classify"))
        graph = artifact.graph_path("generate", "cuda")
        if kind == "host":
            graph = cuda_file_on_cpu(graph, folder / f"{name}-{precision}.onnx")
        return Place(kind == "card", rounded_reference(name), artifact, str(graph))

    return place


@pytest.fixture(params=["host", pytest.param("card", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, place_of: PlaceOf) -> Place:
    """Each place in turn, with Gemma 3 in the precision of the checkpoint."""
    return place_of(request.param, "gemma3_text", "bf16")
