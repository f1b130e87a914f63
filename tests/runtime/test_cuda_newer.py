"""Engines of Gemma 3n and Gemma 4 for CUDA on plain memory, beside transformers."""

import logging
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.errors import ArtifactError
from beam_gemma.model.graph_tensors import Table
from beam_gemma.runtime import placed_tables
from beam_gemma.runtime.capacity import within_reach
from beam_gemma.runtime.cuda_session import CudaSession
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.runtime.step_shapes import StepSizes
from tests.doubles.cuda_newer_models import graph_with_tables, newer_export, newer_reference
from tests.doubles.fakes import STATES, fake_signature
from tests.doubles.late_memory import MEMORY, LateMemory
from tests.doubles.reference import VOCAB, logits_of

PRECISIONS = {"gemma4_e2b": "fp16", "gemma4_wide_heads": "bf16", "gemma3n": "fp16"}
SLOTS = 4
NEW = 6
TOKENS = 32
LENGTHS = (5, 70, 33, 1, 12, 40)
"""Tokens of each row's prompt: beyond windows, and beyond the tokens of a step."""


def session(name: str, *, has_flash: bool = True, num_bytes: int = MEMORY) -> CudaSession:
    path, signature = graph_with_tables(newer_export(name, PRECISIONS[name]), "generate")
    return CudaSession(
        str(path),
        signature,
        LateMemory(num_bytes),
        sizes=StepSizes(decode=(SLOTS,), prefill=(TOKENS,), has_flash=has_flash),
        max_num_seqs=SLOTS,
        memory_utilization=0.9,
    )


def requests() -> list[Request]:
    rng = np.random.default_rng(3)
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=(2, *rng.integers(3, VOCAB, n).tolist()),
            params=SamplingParams(max_tokens=NEW, ignore_eos=True),
            logprob=i % 2 == 0,
        )
        for i, n in enumerate(LENGTHS)
    ]


def completed(decoder: CudaSession) -> list[Completion]:
    config = EngineConfig(max_num_seqs=SLOTS, max_num_batched_tokens=TOKENS)
    with closing(Engine(decoder, config)) as engine:
        return engine.generate(requests())


def assert_completed(completions: list[Completion], model: torch.nn.Module) -> None:
    """Compare completions with the reference's most likely tokens."""
    for request, completion in zip(requests(), completions, strict=True):
        assert completion.error is None
        assert len(completion.token_ids) == NEW
        ids = [*request.prompt_token_ids, *completion.token_ids]
        logits = logits_of(model, ids)[len(request.prompt_token_ids) - 1 : -1]
        taken = np.array(completion.token_ids)[:, None]
        # float32 on both sides.
        chosen = np.take_along_axis(logits, taken, 1)[:, 0]
        np.testing.assert_allclose(chosen, logits.max(axis=1), rtol=0, atol=5e-5)
        if completion.logprob is not None:
            exact = np.take_along_axis(log_softmax(logits, axis=1), taken, 1).sum()
            assert completion.logprob == pytest.approx(exact, abs=2e-4)


@pytest.mark.parametrize(
    ("name", "has_flash"),
    [
        ("gemma4_e2b", True),
        ("gemma3n", True),
        ("gemma4_wide_heads", True),
        ("gemma4_wide_heads", False),
    ],
)
def test_an_engine_completes_as_the_reference_does(name: str, has_flash: bool) -> None:
    """With two steps in flight, and a captured graph for steps of completions."""
    decoder = session(name, has_flash=has_flash)
    completions = completed(decoder)
    stats = decoder.stats()
    assert decoder.max_steps_in_flight == 2
    assert 0 < stats.replays < stats.steps
    assert_completed(completions, newer_reference(name))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_table_may_lie_in_host_memory(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(placed_tables, "MOST_TABLE_SHARE", share)
    monkeypatch.setattr(placed_tables, "PIECE_BYTES", 1000)
    decoder = session("gemma4_e2b")
    [place] = decoder._tables.places
    assert (place.address in decoder._memory._held) == (share == 1.0)
    assert_completed(completed(decoder), newer_reference("gemma4_e2b"))


def test_a_table_whose_file_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.bin").write_bytes(bytes(100))
    table = Table(name="table", dtype="float32", shape=(5, 5), file="table.bin", offset=4)
    signature = fake_signature(device="cuda", states=STATES[:2], tables=(table,))
    with pytest.raises(ArtifactError, match="expected 100 bytes of table from 4 on"):
        placed_tables.PlacedTables(signature, tmp_path, LateMemory())


def test_sequences_are_as_long_as_a_step_can_gather(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        decoder = session("gemma4_wide_heads", num_bytes=12 << 20)
    longest = decoder.signature.max_model_len
    assert TOKENS < longest < 512
    assert f"room to gather the keys and values of {longest} tokens" in caplog.text
    config = EngineConfig(max_num_seqs=SLOTS, max_num_batched_tokens=TOKENS)
    with closing(Engine(decoder, config)) as engine:
        request = Request(
            request_id="long",
            prompt_token_ids=(5,) * longest,
            params=SamplingParams(max_tokens=1),
        )
        [completion] = engine.generate([request])
    assert f"expected at most {longest:,} together" in (completion.error or "")


def test_what_a_step_gathers_has_a_share_of_the_memory() -> None:
    """2 tensors of 4 heads with 8 numbers of 2 bytes are 128 bytes for a token."""
    signature = fake_signature(device="cuda", states=STATES[:2], gathered_heads=4)
    head_dim = max(state.head_dim for state in signature.paged_states)
    assert signature.gathered_bytes == 2 * 4 * head_dim * 2
    memory = 4 * 300 * signature.gathered_bytes
    limited = within_reach(signature, num_bytes=memory, num_prefill_tokens=100)
    assert limited.max_model_len == 200, "300 tokens less those of a step"
    rich = within_reach(signature, num_bytes=100 * memory, num_prefill_tokens=100)
    assert rich == signature
    others = fake_signature(device="cuda", states=STATES[:2])
    assert within_reach(others, num_bytes=0, num_prefill_tokens=100) == others
