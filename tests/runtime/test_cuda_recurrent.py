"""Engines whose session for CUDA keeps recurrent state, on plain memory, beside transformers."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.cuda_session import CudaSession
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.runtime.step_shapes import StepSizes
from tests.doubles.cuda_models import Model
from tests.doubles.late_memory import LateMemory
from tests.doubles.reference import VOCAB, logits_of
from tests.export.test_recurrent_cuda import model_in

SLOTS = 4
TOKENS = 64
NEW = 5
Loaded = tuple[Model, Signature, str]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder: Path = tmp_path_factory.mktemp("recurrent")
    model = model_in(folder)
    graph, signature = model.graph("generate", "bfloat16")
    path = folder / "graph.onnx"
    path.write_bytes(model.on_cpu(graph))
    # What is bfloat16 on a GPU is float32 here.
    states = tuple(
        replace(s, dtype="float32") if s in signature.recurrent_states else s
        for s in signature.states
    )
    return model, replace(signature, dtype="float32", states=states), str(path)


@contextmanager
def engine(loaded: Loaded, **options: bool) -> Iterator[Engine]:
    _, signature, path = loaded
    session = CudaSession(
        path,
        signature,
        LateMemory(),
        sizes=StepSizes(decode=(SLOTS,), prefill=(TOKENS,)),
        max_num_seqs=SLOTS,
        memory_utilization=0.9,
    )
    config = EngineConfig(max_num_seqs=SLOTS, max_num_batched_tokens=TOKENS, **options)
    with closing(Engine(session, config)) as running:
        yield running


def requests(prompts: Sequence[Sequence[int]]) -> list[Request]:
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    return [
        Request(request_id=str(i), prompt_token_ids=tuple(ids), params=params)
        for i, ids in enumerate(prompts)
    ]


def assert_completed(
    model: Model, prompts: Sequence[list[int]], completions: Sequence[Completion]
) -> None:
    """Compare completions with the reference's most likely tokens."""
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.error is None
        taken = np.array(completion.token_ids)
        logits = logits_of(model.reference, [*prompt, *taken.tolist()])[len(prompt) - 1 : -1]
        chosen = np.take_along_axis(logits, taken[:, None], 1)[:, 0]
        # float32 on both sides.
        np.testing.assert_allclose(chosen, logits.max(axis=1), rtol=0, atol=2e-5)


def test_an_engine_completes_as_the_reference_does(loaded: Loaded) -> None:
    """Prompts of several lengths, side by side in a step and in several steps."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, VOCAB, n).tolist() for n in (9, 150, 33, 1, 2, 64, 20)]
    with engine(loaded) as running:
        completions = running.generate(requests(prompts))
    assert_completed(loaded[0], prompts, completions)
    assert running.stats.num_decode_steps > 0


def test_rows_start_from_the_state_at_the_end_of_a_prefix(loaded: Loaded) -> None:
    """What a row computes from there is what it computes from its first token."""
    rng = np.random.default_rng(4)
    prefix = rng.integers(3, VOCAB, loaded[1].block_size).tolist()
    prompts = [[*prefix, *rng.integers(3, VOCAB, n).tolist()] for n in (3, 9, 4, 1, 6)]
    with engine(loaded) as running:
        reused = running.generate(requests(prompts))
        assert running.stats.num_cached_tokens >= 2 * len(prefix)
    with engine(loaded, enable_prefix_caching=False) as running:
        computed = running.generate(requests(prompts))
        assert running.stats.num_cached_tokens == 0
    assert reused == computed
    assert_completed(loaded[0], prompts[:1], computed[:1])
