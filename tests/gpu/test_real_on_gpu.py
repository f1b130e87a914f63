"""The real Gemma 3 270M on a card, token by token beside transformers in bfloat16."""

from contextlib import closing
from pathlib import Path

import pytest
import torch

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.model.artifact import Artifact
from beam_gemma.runtime.limits import Limits
from beam_gemma.runtime.open_session import open_session
from export.__main__ import export
from tests.doubles.real_model import real_checkpoint
from tests.doubles.reference import real_model
from tests.real_weights.test_real_weights import EXPECTED, NUM_TOKENS

pytestmark = [pytest.mark.gpu, pytest.mark.weights, pytest.mark.timeout(900)]
NEAR = {"bf16": 0.5, "fp16": 0.1}
"""How far the best two logits, in float32, may be apart where a token differs from theirs."""


@pytest.mark.parametrize("precision", NEAR)
def test_the_first_token_that_differs_was_nearly_a_tie(precision: str, tmp_path: Path) -> None:
    checkpoint = real_checkpoint()
    export(checkpoint, tmp_path / "model", device="cuda", precision=precision)
    artifact, limits = Artifact.open(tmp_path / "model"), Limits(max_num_seqs=64)
    session = open_session(artifact, "generate", "cuda", limits)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [row["prompt_token_ids"] for row in EXPECTED]
    with closing(Engine(session, limits.engine_config("cuda"))) as engine:
        completions = engine.generate(
            Request(request_id=str(i), prompt_token_ids=tuple(ids), params=params)
            for i, ids in enumerate(prompts)
        )
    model = real_model(checkpoint).to("cuda")
    theirs = real_model(checkpoint).to("cuda", torch.bfloat16)
    same, problems = 0, []
    for ids, completion in zip(prompts, completions, strict=True):
        chosen = torch.tensor(completion.token_ids)
        text = torch.tensor([[*ids, *completion.token_ids[:-1]]], device="cuda")
        with torch.no_grad():
            best = theirs(text).logits[0, len(ids) - 1 :].argmax(-1).cpu()
            exact = model(text).logits[0, len(ids) - 1 :].float().cpu()
        differing = torch.nonzero(best != chosen)
        if not len(differing):
            same += 1
            continue
        step = int(differing[0])
        gap = float((exact[step].max() - exact[step, chosen[step]]).abs())
        if gap > NEAR[precision]:
            problems.append(f"{completion.token_ids[: step + 1]}: {gap:.3f} below the best")
    print(f"{precision}: {same} of {len(prompts)} rows are as theirs throughout")
    assert not problems, "; ".join(problems)
