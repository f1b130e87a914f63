"""How Gemma 4, EmbeddingGemma 2 and Gemma 3n hear: the ladder of their graphs of sound."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from beam_gemma.model.signature import Signature
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.runtime.sound_session import CpuSound
from export.checkpoints.sound_tensors import sound_shapes
from export.graph.to_onnx import trace
from export.modules.sound import SoundModel
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import with_weights_as_inputs
from tests.doubles.gemma4_hearing import (
    HEARING,
    clip,
    clip_features,
    exact_features,
    hearing_model,
    sound_config,
    sound_weights,
)

LENGTHS = (1, 2, 3, 4, 5, *range(41, 90, 4), 90, 91, 92, 193)
"""Frames of clips: from one token to 49, with every remainder of tokens modulo 12."""
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Hearing:
    """A tiny model, clips, and what transformers makes of them."""

    name: str
    config: SoundConfig
    signature: Signature
    weights: dict[str, np.ndarray]
    clips: list[np.ndarray]
    exact: list[np.ndarray]
    """Features of each clip in float64."""
    float32: list[np.ndarray]


@pytest.fixture(scope="module")
def load() -> Callable[[str], Hearing]:
    @cache
    def loaded(name: str) -> Hearing:
        model = hearing_model(name)
        config, signature = sound_config(model)
        clips = [clip(number, config.num_features) for number in LENGTHS]
        float32 = [clip_features(model, frames) for frames in clips]
        weights = sound_weights(model)
        exact = exact_features(model, clips)
        return Hearing(name, config, signature, weights, clips, exact, float32)

    return loaded


@pytest.fixture(params=HEARING)
def hearing(load: Callable[[str], Hearing], request: pytest.FixtureRequest) -> Hearing:
    return load(request.param)


def test_tensors_have_the_shapes_of_the_reference(hearing: Hearing) -> None:
    found = {name: x.shape or (1,) for name, x in hearing.weights.items()}
    assert found == sound_shapes(hearing.config, hearing.signature.hidden_size)


def test_module_in_float64_equals_the_reference(hearing: Hearing) -> None:
    """Float64 leaves no room for a wrong formula."""
    module = SoundModel(hearing.config, hearing.signature).double().eval()
    module.load_state_dict(
        {name: torch.from_numpy(x).double().reshape(x.shape or (1,))
         for name, x in hearing.weights.items()},
        strict=True,
    )  # fmt: skip
    for frames, exact in zip(hearing.clips, hearing.exact, strict=True):
        with torch.no_grad():
            outputs, _ = module({"sound_frames": torch.from_numpy(frames).double()}, {})
        # float64 on both sides.
        np.testing.assert_allclose(outputs["sound_features"].numpy(), exact, rtol=0, atol=1e-9)


def traced(hearing: Hearing, signature: Signature) -> ir.Model:
    """Return a graph without its weights."""
    return trace(partial(SoundModel, hearing.config, signature), signature)


def with_weights(graph: ir.Model, weights: dict[str, np.ndarray]) -> ir.Model:
    """Give a graph its weights, rounded to its dtypes; return it."""
    initializers: Any = graph.graph.initializers
    for name, value in initializers.items():
        if value.const_value is None:
            array = weights[name].astype(value.dtype.numpy())
            value.const_value = ir.tensor(array.reshape(array.shape or (1,)), name=name)
    return graph


def test_graph_for_the_cpu_equals_the_reference(hearing: Hearing, tmp_path: Path) -> None:
    """It has the same bits for a clip alone, in company, and with one thread or two."""
    file = tmp_path / "sound.onnx"
    graph = traced(hearing, hearing.signature)
    ir.save(with_weights(graph, hearing.weights), file)
    one, two = (CpuSound(str(file), hearing.signature, num_threads=n) for n in (1, 2))
    worst, allowed = 0.0, 0.0
    together = two.encode(hearing.clips)
    for i, features in enumerate(together):
        np.testing.assert_array_equal(features, one.encode([hearing.clips[i]])[0])
        worst = max(worst, float(np.abs(features - hearing.exact[i]).max()))
        allowed = max(allowed, float(np.abs(hearing.float32[i] - hearing.exact[i]).max()))
    # float32 on both sides.
    assert worst < TOLERANCE
    assert worst <= 2 * allowed
    operators = {node.op_type for node in graph.graph}
    assert not operators & {"If", "Loop", "Scan", "Conv"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gemma4_e2b", "bfloat16"), ("gemma4_unified", "bfloat16"), ("gemma3n", "float16")],
)
def test_graph_for_cuda_has_kernels(load: Callable[[str], Hearing], name: str, dtype: str) -> None:
    """The module is that of the CPU in another dtype, whose numbers are compared above."""
    hearing = load(name)
    graph = traced(hearing, replace(hearing.signature, device="cuda", dtype=dtype))
    assert unplaced(with_weights_as_inputs(graph)) == [], "nodes without a kernel for CUDA"
    assert [value.dtype for value in graph.graph.outputs] == [ir.DataType[dtype.upper()]]
