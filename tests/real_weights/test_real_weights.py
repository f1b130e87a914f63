"""The real Gemma 3 270M through the whole pipeline: every token as transformers chooses it."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import generate
from tests.doubles.real_model import real_artifact, real_checkpoint

pytestmark = [pytest.mark.weights, pytest.mark.timeout(900)]

DATA = Path(__file__).parents[1] / "data"
PROMPTS = json.loads((DATA / "prompts64.json").read_text())
EXPECTED = json.loads((DATA / "greedy64.json").read_text())
"""Tokens that transformers' own `generate` chose, each the most likely one of a pass without
caches too, and their log-probability (tests/data/make_greedy64.py)."""
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the command line wrote for the prompts, in their order."""
    folder = tmp_path_factory.mktemp("greedy")
    numbers = pa.array(range(len(PROMPTS)), pa.int32())
    pq.write_table(pa.table({"number": numbers, "text": PROMPTS}), folder / "prompts.parquet")
    arguments = [
        "--model", real_artifact(real_checkpoint()).path,
        "--input", folder / "prompts.parquet", "--output", folder / "out.parquet",
        "--prompt_column", "text", "--max_tokens", NUM_TOKENS, "--ignore_eos",
        "--token_ids", "--logprob", "--num_shards", 3,
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        assert generate.main() == 0
    rows = pa.concat_tables(map(pq.read_table, sorted(folder.glob("out-*.parquet"))))
    assert rows["number"].type == pa.int32()
    return rows.sort_by("number").to_pylist()


def test_every_row_came_back(completions: list[dict]) -> None:
    assert [row["text"] for row in completions] == PROMPTS
    assert {row["error"] for row in completions} == {None}
    assert {row["finish_reason"] for row in completions} == {"length"}
    counts = [(row["num_prompt_tokens"], row["num_completion_tokens"]) for row in completions]
    assert counts == [(len(row["prompt_token_ids"]), NUM_TOKENS) for row in EXPECTED]
    assert sum(num_prompt_tokens > 512 for num_prompt_tokens, _ in counts) == 3  # the window


def test_greedy_tokens_equal_transformers(completions: list[dict]) -> None:
    differences = []
    for row, expected in zip(completions, EXPECTED, strict=True):
        pairs = zip(row["completion_token_ids"], expected["token_ids"], strict=True)
        step = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if step is not None:
            differences.append(f"row {row['number']} differs from step {step}")
    assert not differences, "; ".join(differences)


def test_log_probabilities_equal_transformers(completions: list[dict]) -> None:
    # float32 on both sides, 48 summands.
    logprobs = [row["logprob"] for row in completions]
    assert logprobs == pytest.approx([row["logprob"] for row in EXPECTED], abs=1e-3)
