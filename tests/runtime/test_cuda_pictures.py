"""Engines whose session for CUDA takes pictures, on plain memory, beside transformers."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.cuda_session import CudaSession
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.runtime.step_shapes import StepSizes
from export.graph.signatures import vision_signature
from tests.doubles.cuda_vision import Prompt, SeeingModel, prompts, seeing_model
from tests.doubles.late_memory import LateMemory
from tests.doubles.once import exporter_digest, kept

MODELS = ("gemma3", "paligemma", "paligemma2")
TOKENS = 160
SLOTS = 4
NEW = 6
PARAMS = SamplingParams(max_tokens=NEW, ignore_eos=True)


class ReferenceTower:
    """The reference's own tower, as a session."""

    def __init__(self, model: SeeingModel) -> None:
        self.signature = vision_signature(
            model.config, model.vision, device="cuda", dtype="float32"
        )
        self._model = model

    def encode(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._model.features(pixels)


@functools.cache
def loaded(name: str) -> tuple[SeeingModel, Signature, Path]:
    model = seeing_model(name, "bfloat16")
    graph, signature = model.graph("generate", "bfloat16")

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "graph.onnx").write_bytes(model.on_cpu(graph))

    folder = kept(f"cuda-on-cpu-{name}-sees-{exporter_digest()}", make)
    return model, dataclasses.replace(signature, dtype="float32"), folder / "graph.onnx"


@contextmanager
def engine(name: str, *, sizes: StepSizes | None = None) -> Iterator[tuple[SeeingModel, Engine]]:
    model, signature, path = loaded(name)
    session = CudaSession(
        str(path),
        signature,
        LateMemory(),
        sizes=sizes or StepSizes(decode=(SLOTS,), prefill=(TOKENS,)),
        max_num_seqs=SLOTS,
        memory_utilization=0.9,
    )
    config = EngineConfig(max_num_seqs=SLOTS, max_num_batched_tokens=TOKENS)
    with closing(Engine(session, config, vision=ReferenceTower(model))) as running:
        yield model, running


def assert_completed(model: SeeingModel, prompt: Prompt, completion: Completion) -> None:
    """Compare a completion with the reference's most likely tokens after a prompt."""
    assert completion.error is None
    assert len(completion.token_ids) == NEW
    ids = [*prompt.token_ids, *completion.token_ids]
    logits = model.logits(dataclasses.replace(prompt, token_ids=ids))[
        len(prompt.token_ids) - 1 : -1
    ]
    taken = np.take_along_axis(logits, np.array(completion.token_ids)[:, None], 1)[:, 0]
    # float32 on both sides.
    np.testing.assert_allclose(taken, logits.max(axis=1), rtol=0, atol=1e-4)
    chosen = np.take_along_axis(
        log_softmax(logits, axis=1), np.array(completion.token_ids)[:, None], 1
    )
    if completion.logprob is not None:
        assert completion.logprob == pytest.approx(chosen.sum(), abs=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_an_engine_completes_as_the_reference_does(name: str) -> None:
    """Prompts with one picture, with two and with none, in the same steps."""
    with engine(name) as (model, running):
        rows = [row for seed in range(3) for row in prompts(model, seed=seed)]
        requests = [
            row.request(str(i), params=PARAMS, logprob=i % 2 == 0) for i, row in enumerate(rows)
        ]
        completions = running.generate(requests)
    for row, completion in zip(rows, completions, strict=True):
        assert_completed(model, row, completion)
    assert running.stats.num_pictures == sum(len(row.pixels) for row in rows)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_goes_on_inside_a_span_whose_beginning_is_cached(name: str) -> None:
    """A block ends inside the first picture, and inside the prefix of a PaliGemma.

    PaliGemma 2 goes on from no block: its prefix sees what a window has left behind.
    """
    with engine(name) as (model, running):
        [first, *_] = prompts(model)
        text, count = list(range(20, 78)), model.vision.num_image_tokens
        if model.vision.bidirectional == "picture":
            ids = [*text, *[0] * count, *range(30, 36)]
            row = dataclasses.replace(
                first, token_ids=ids, starts=[len(text)], spans=((len(text), len(text) + count),)
            )
        else:
            ids = [*[0] * count, *text, *range(30, 36)]
            row = dataclasses.replace(first, token_ids=ids, starts=[0], spans=((0, len(ids) - 2),))
        block = running.signature.block_size
        assert any(start < block < end for start, end in row.spans)
        for _ in range(2):
            assert_completed(model, row, *running.generate([row.request(params=PARAMS)]))
        assert running.stats.num_cached_tokens == (0 if name == "paligemma2" else block)
        assert running.stats.num_pictures == 1
