"""Decoders that see, on a card; `tests/runtime/test_cuda_pictures.py` has them on the host."""

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion
from beam_gemma.runtime.cuda_session import CudaSession
from beam_gemma.runtime.device_memory import CudaMemory
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.runtime.step_shapes import StepSizes
from export.graph.signatures import vision_signature
from tests.doubles.cuda_vision import Prompt, SeeingModel, prompts, seeing_model

SLOTS, TOKENS = 8, 160
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
TOLERANCE = {"bfloat16": 3e-2, "float16": 4e-3}
"""Of logits, relative to their norm."""

pytestmark = pytest.mark.gpu


class RoundedTower:
    """The reference's tower, whose embeddings are rounded to the decoder's dtype."""

    def __init__(self, model: SeeingModel, dtype: str) -> None:
        self.signature = vision_signature(model.config, model.vision, device="cuda", dtype=dtype)
        self._model = model

    def encode(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        features = self._model.features(pixels)
        if self.signature.dtype == "float16":
            return [values.astype(np.float16) for values in features]
        return [values.astype(ml_dtypes.bfloat16).view(np.uint16) for values in features]


def open_engine(model: SeeingModel, dtype: str, folder: Path) -> Engine:
    file = folder / "decoder.onnx"
    session = CudaSession(
        str(file),
        model.for_card(dtype, file),
        CudaMemory(),
        sizes=StepSizes(decode=(SLOTS,), prefill=(TOKENS,)),
        max_num_seqs=SLOTS,
        memory_utilization=0.5,
    )
    config = EngineConfig(max_num_seqs=SLOTS, max_num_batched_tokens=TOKENS)
    return Engine(session, config, vision=RoundedTower(model, dtype))


def gaps(model: SeeingModel, row: Prompt, completion: Completion) -> np.ndarray:
    """How far each chosen token is below the best one, by the reference, of the logits' spread."""
    ids = [*row.token_ids, *completion.token_ids[:-1]]
    logits = model.logits(dataclasses.replace(row, token_ids=ids))[len(row.token_ids) - 1 :]
    chosen = np.take_along_axis(logits, np.array(completion.token_ids)[:, None], axis=1)[:, 0]
    return (logits.max(axis=1) - chosen) / np.linalg.norm(logits, axis=1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
def test_rows_with_pictures_on_a_card(name: str, dtype: str, tmp_path: Path) -> None:
    """They are the reference's, and have the same bits alone and together."""
    model = seeing_model(name, dtype)
    rows = [row for seed in range(3) for row in prompts(model, seed=seed)]
    with closing(open_engine(model, dtype, tmp_path)) as engine:
        requests = [row.request(str(i), params=PARAMS, logprob=True) for i, row in enumerate(rows)]
        together = engine.generate(requests)
        alone = [engine.generate([request])[0] for request in requests]
    for row, one, other in zip(rows, together, alone, strict=True):
        assert one.error is None
        assert gaps(model, row, one).max() <= 2 * TOLERANCE[dtype]
        assert one.token_ids == other.token_ids
        assert one.logprob == other.logprob
