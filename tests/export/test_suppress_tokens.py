"""Tokens that a model's generation_config.json suppresses are never written, as in transformers."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.errors import CheckpointError, ConfigError
from beam_gemma.model.artifact import Artifact
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint
from export.modules.heads import NEVER
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import Stepper, checked, cuda_model, reference
from tests.doubles.ragged import Feeder
from tests.doubles.reference import logits_of, save_checkpoint

NUM_ROWS, NEW_TOKENS, EOS = 8, 12, 1
NAME, CAPPED = "gemma3_text", "gemma2"
"""The second caps its logits, which must not bring a suppressed one back."""


def prompts(vocab: int = 300) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, vocab, n).tolist() for n in range(2, 2 + NUM_ROWS)]


@torch.no_grad()
def generated(model: torch.nn.Module, suppressed: list[int] | None) -> list[tuple[int, ...]]:
    """Return what transformers generates greedily."""
    found = []
    for ids in prompts():
        output = model.generate(  # type: ignore[operator]
            torch.tensor([ids]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, suppress_tokens=suppressed,
        )  # fmt: skip
        found.append(tuple(output[0, len(ids) :].tolist()))
    return found


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return reference(NAME)


@pytest.fixture(scope="module")
def ids(model: torch.nn.Module) -> list[int]:
    """The two tokens that the model writes most, and the one that ends a text."""
    written = np.bincount(np.concatenate(generated(model, None)))
    return sorted([*np.argsort(-written, kind="stable")[:2].tolist(), EOS])


@pytest.fixture(scope="module")
def artifact(
    model: torch.nn.Module, ids: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    folder = tmp_path_factory.mktemp("suppressed")
    checkpoint = save_checkpoint(model, folder / "checkpoint")
    (checkpoint / "generation_config.json").write_text(json.dumps({"suppress_tokens": ids}))
    export(checkpoint, folder / "artifact", tasks=["generate"])
    return Artifact.open(folder / "artifact")


def completed(artifact: Artifact, params: SamplingParams) -> list[Completion]:
    signature = artifact.signature("generate", "cpu")
    blocks = {state.group: 500 for state in signature.paged_states}
    path = str(artifact.graph_path("generate", "cpu"))
    session = Session(path, signature, Capacity(num_blocks=blocks, num_state_slots=0))
    requests = [
        Request(request_id=str(i), prompt_token_ids=tuple(prompt), params=params)
        for i, prompt in enumerate(prompts())
    ]
    with closing(Engine(session, EngineConfig())) as engine:
        return engine.generate(requests)


def test_greedy_tokens_are_those_of_transformers(
    model: torch.nn.Module, ids: list[int], artifact: Artifact
) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    expected = generated(model, ids)
    assert [c.token_ids for c in completed(artifact, params)] == expected
    assert expected != generated(model, None)


def test_a_hot_draw_from_all_tokens_has_none_of_them(ids: list[int], artifact: Artifact) -> None:
    params = SamplingParams(max_tokens=300, ignore_eos=True, temperature=50.0, top_k=0, seed=1)
    drawn = {token for c in completed(artifact, params) for token in c.token_ids}
    assert len(drawn) > 200
    assert drawn.isdisjoint(ids)


def test_the_cuda_graph_gives_them_no_chance(ids: list[int], tmp_path: Path) -> None:
    plain = cuda_model(CAPPED, tmp_path)
    tiny = replace(plain, config=replace(plain.config, suppress_tokens=tuple(ids)))
    graph, signature = tiny.graph("generate", "float16")
    assert unplaced(checked(graph)) == [], "nodes without a kernel for CUDA"
    feeder = Feeder(signature, NUM_ROWS, NUM_ROWS + 2)
    feeds = feeder.feeds(list(enumerate(prompts())), all_rows=False)
    found = Stepper(tiny.session(graph), signature, feeder.state()).run(feeds)
    assert (found["logits"][:, ids] == np.float32(NEVER)).all()
    for row, prompt in enumerate(prompts()):
        logits = np.array(logits_of(tiny.reference, prompt)[-1])
        logits[ids] = -np.inf
        assert found["chosen_ids"][row] == logits.argmax()
        share = 1 / np.exp(logits - logits.max()).sum()
        # float32 on both sides
        np.testing.assert_allclose(found["top_probability"][row], share, rtol=1e-4)


@pytest.mark.parametrize("found", ["3", [-1], [10**6], [True], {"a": 1}])
def test_what_are_no_ids_is_refused(model: torch.nn.Module, found: object, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(model, tmp_path)
    (checkpoint / "generation_config.json").write_text(json.dumps({"suppress_tokens": found}))
    with pytest.raises(CheckpointError, match="suppress_tokens as token ids below"):
        read_checkpoint(checkpoint)


def test_a_config_refuses_ids_beyond_the_vocabulary(artifact: Artifact) -> None:
    with pytest.raises(ConfigError, match="suppress_tokens: expected token ids below"):
        replace(artifact.config, suppress_tokens=(artifact.config.vocab_size,))
