"""Decoders that see, as graphs for CUDA: checked, then run on the CPU beside their references."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
from scipy.special import log_softmax

from beam_gemma.model.signature import Signature
from beam_gemma.runtime.step_shapes import METADATA, StepSizes, host_dtype, pad
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import Stepper, checked
from tests.doubles.cuda_vision import (
    Prompt,
    SeeingFeeder,
    SeeingModel,
    prompts,
    seeing_model,
    seeing_schedules,
)
from tests.doubles.ragged import Feeds, run_schedule

SIZES = StepSizes(decode=(4,), prefill=(160,))
MODELS = ("gemma3", "paligemma", "paligemma2")
GRAPHS = [
    ("gemma3", "bfloat16"),
    ("paligemma", "float16"),
    ("paligemma2", "bfloat16"),
    ("paligemma2", "float16"),
]
"""A window with spans inside it, none, and one that spans reach beyond, with a softcap."""
SCHEDULES = ("alone", "packed with others", "chunked", "decode over cache", "decode beside prefill")
Run = Callable[[Feeds], np.ndarray]


@functools.cache
def loaded(name: str, dtype: str) -> tuple[SeeingModel, Signature, onnxruntime.InferenceSession]:
    model = seeing_model(name, dtype)
    graph, signature = model.graph("generate", dtype)
    assert unplaced(checked(graph)) == [], "nodes without a kernel for CUDA"
    return model, dataclasses.replace(signature, dtype="float32"), model.session(graph)


def padded(feeds: Feeds, signature: Signature, num_slots: int) -> Feeds:
    """Return the inputs of a step as a session for CUDA pads them."""
    shape = SIZES.shape(feeds, signature, with_logits=True)
    into = {
        t.name: np.empty(shape.of(t), host_dtype(t.dtype))
        for t in signature.step_inputs()
        if t.name != METADATA
    }
    pad(feeds, shape, into, spare_slot=num_slots)
    into["full_rows"] = np.arange(shape.num_rows)
    return into | {METADATA: shape.metadata(signature.block_size)}


def assert_logits(
    model: SeeingModel, rows: list[Prompt], feeder: SeeingFeeder, steps: list, run: Run
) -> None:
    """Compare the logits of each position with the reference's."""
    ours = run_schedule(steps, [row.token_ids for row in rows], feeder, run)
    for row, got in zip(rows, ours, strict=True):
        expected = model.logits(row)
        # float32 on both sides.
        difference = np.abs(log_softmax(got, axis=1) - log_softmax(expected, axis=1)).max()
        assert difference < 1e-4, difference


@pytest.mark.parametrize(("name", "dtype"), GRAPHS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_graph_gives_the_reference_s_logits(name: str, dtype: str, schedule: str) -> None:
    """Steps are padded as for a GPU, also those without pictures."""
    model, signature, session = loaded(name, dtype)
    rows = prompts(model)
    feeder = SeeingFeeder(model, signature, rows)
    stepper = Stepper(session, signature, feeder.state())

    def run(feeds: Feeds) -> np.ndarray:
        is_decode = len(feeds["input_ids"]) == len(feeds["past_seqlens"])
        feeds[METADATA] = np.array([1 if is_decode else 2, 256, 0], np.int32)
        outputs = stepper.run(padded(feeds, signature, len(rows)))
        return outputs["logits"][: len(feeds["logit_rows"])]

    assert_logits(model, rows, feeder, seeing_schedules(rows)[schedule], run)
