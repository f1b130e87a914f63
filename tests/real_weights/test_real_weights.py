"""The real Gemma 3 270M through the whole pipeline: every token as transformers chooses it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from beam_gemma.model.artifact import Artifact
from tests.doubles.real_model import real_artifact, real_checkpoint
from tests.doubles.reference import real_model

pytestmark = [pytest.mark.weights, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data"
PROMPTS = json.loads((DATA / "prompts64.json").read_text())
EXPECTED = json.loads((DATA / "greedy64.json").read_text())
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return real_checkpoint()


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Artifact:
    return real_artifact(checkpoint)


@pytest.fixture(scope="module")
def completions(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the command line wrote for the 64 prompts, in their order."""
    folder = tmp_path_factory.mktemp("greedy")
    numbers = pa.array(range(len(PROMPTS)), pa.int32())
    pq.write_table(pa.table({"number": numbers, "text": PROMPTS}), folder / "prompts.parquet")
    subprocess.run(
        [
            sys.executable, "-m", "pipelines.generate", "--model", artifact.path,
            "--input", folder / "prompts.parquet", "--output", folder / "out.parquet",
            "--prompt_column", "text", "--max_tokens", str(NUM_TOKENS), "--ignore_eos",
            "--token_ids", "--logprob", "--num_shards", "3",
        ],
        check=True, cwd=ROOT, timeout=600,
    )  # fmt: skip
    rows = pa.concat_tables(map(pq.read_table, sorted(folder.glob("out-*.parquet"))))
    assert rows["number"].type == pa.int32()
    return rows.sort_by("number").to_pylist()


def test_every_row_came_back(completions: list[dict]) -> None:
    assert [row["text"] for row in completions] == PROMPTS
    assert {row["error"] for row in completions} == {None}
    assert {row["finish_reason"] for row in completions} == {"length"}
    counts = [(row["num_prompt_tokens"], row["num_completion_tokens"]) for row in completions]
    assert counts == [(len(row["prompt_token_ids"]), NUM_TOKENS) for row in EXPECTED]


def test_greedy_tokens_equal_transformers(completions: list[dict]) -> None:
    """Against tokens that transformers' own `generate` chose (tests/data/make_greedy64.py)."""
    differences = []
    for row, expected in zip(completions, EXPECTED, strict=True):
        pairs = zip(row["completion_token_ids"], expected["token_ids"], strict=True)
        step = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if step is not None:
            differences.append(f"row {row['number']} differs from step {step}")
    assert not differences, "; ".join(differences)


def test_each_token_is_the_most_likely_one_to_transformers(
    checkpoint: Path, completions: list[dict]
) -> None:
    """One forward pass of the live reference for some rows, over prompt and our completion."""
    model = real_model(checkpoint)
    problems, gaps = [], []
    for row, expected in zip(completions[::4], EXPECTED[::4], strict=True):
        prompt, ids = expected["prompt_token_ids"], row["completion_token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits[torch.arange(NUM_TOKENS), torch.tensor(ids)]
        gap = (logits.max(dim=-1).values - chosen).numpy()
        problems += [
            f"row {row['number']} step {step}: {gap[step]:.2e} below the best"
            for step in np.flatnonzero(gap > 0)
        ]
        top = logits.topk(2).values
        gaps.append(float((top[:, 0] - top[:, 1]).min()))
        logprob = float((chosen.double() - logits.double().logsumexp(-1)).sum())
        # float32 on both sides, 48 summands.
        assert row["logprob"] == pytest.approx(logprob, abs=1e-3)
    print(f"smallest gap between the best two logits of any step: {min(gaps):.2e}")
    assert not problems, "; ".join(problems)
