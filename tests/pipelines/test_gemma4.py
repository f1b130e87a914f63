"""Gemma 4 in whole jobs: what transformers computes, in any company."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from export.__main__ import export
from tests.conftest import TinyModel
from tests.doubles.command_line import CommandLine
from tests.doubles.reference import logits_of

NUM_ROWS, NEW_TOKENS = 64, 10
PAD, EOS = 0, 1
FLAGS = ("--prompt=say {text}", f"--max_tokens={NEW_TOKENS}", "--token_ids", "--logprob")


@pytest.fixture(scope="module", params=["gemma4_e2b", "gemma4_moe"])
def tiny(request: pytest.FixtureRequest, tiny_of: Callable[[str], TinyModel]) -> TinyModel:
    return tiny_of(request.param)


@pytest.fixture
def jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, capsys)


def uneven_rows(number: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Return texts of 1 to 150 letters, most of them beyond the window."""
    rng = np.random.default_rng(6)
    letters = [*"abcdefghijklmnopqrstuvwxyz  "]
    texts = ["".join(rng.choice(letters, n)) for n in rng.integers(1, 150, number)]
    return [{"id": i, "text": text} for i, text in enumerate(texts)]


def ids_of(tiny: TinyModel, text: str) -> list[int]:
    return Tokenizer.from_file(tiny.artifact.tokenizer_path).encode([Text(text)])


@torch.no_grad()
def generated(tiny: TinyModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return what transformers generates greedily after prompts, with the end token."""
    longest = max(map(len, prompts))
    outputs = tiny.reference.generate(
        input_ids=torch.tensor([[PAD] * (longest - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor(
            [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        ),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    new = [row[longest:] for row in outputs.tolist()]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in new]


def tokens_of(row: dict[str, Any]) -> list[int]:
    """Return the tokens of a completion, with the end token."""
    assert row["error"] is None, row
    return row["completion_token_ids"] + [EOS] * (row["finish_reason"] == "stop")


def loglik(tiny: TinyModel, prompt: list[int], tokens: list[int]) -> float:
    """Return transformers' log-likelihood of tokens after a prompt."""
    logits = torch.tensor(logits_of(tiny.reference, [*prompt, *tokens[:-1]]))
    rows = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 :]
    return sum(float(rows[i, token]) for i, token in enumerate(tokens))


def test_greedy_tokens_of_64_uneven_rows_are_those_of_transformers(tiny, jobs):
    rows = uneven_rows()
    table = jobs.table([*rows, {"id": 100, "text": None}])
    found = jobs.rows("generate", tiny.artifact.path, table, *FLAGS)
    prompts = [ids_of(tiny, f"say {row['text']}") for row in rows]
    expected = generated(tiny, prompts)
    assert [tokens_of(found[row["id"]]) for row in rows] == expected
    assert len(set(map(tuple, expected))) > 20
    for i in (0, 7, 23):
        # float32, the sum over a completion.
        total = loglik(tiny, prompts[i], expected[i])
        assert found[i]["logprob"] == pytest.approx(total, abs=2e-4)
    assert "null" in found[100]["error"]


WAYS = {
    "few at once": ["--max_num_seqs=3", "--max_num_batched_tokens=16"],
    "alone": ["--max_num_seqs=1"],
}


def test_a_row_is_worth_the_same_however_it_is_run(tiny, jobs):
    """Most rows share a long beginning, whose blocks are kept; steps may need no head."""
    rows = [{**row, "text": "the cat in the hat " * 5 + row["text"]} for row in uneven_rows(40)]
    rows[::5] = [{**row, "text": row["text"][::-1]} for row in rows[::5]]
    flags = (*FLAGS, "--temperature=3", "--key_column=id")
    model = tiny.artifact.path
    plain = jobs.rows("generate", model, jobs.table(rows), *flags)
    assert len({row["completion"] for row in plain.values()}) > 20
    turned = jobs.table(rows[::-1], "turned")
    for name, more in WAYS.items():
        assert jobs.rows("generate", model, turned, *flags, *more) == plain, name


def test_labels_are_scored_as_transformers_scores_them(tiny, jobs):
    rows = uneven_rows(10)
    labels = (" no", " yes indeed")
    found = jobs.rows(
        "classify", tiny.artifact.path, jobs.table(rows), "--prompt=say {text}:",
        f"--label={labels[0]}", f"--label={labels[1]}", "--logliks",
    )  # fmt: skip
    for row in rows:
        prompt = ids_of(tiny, f"say {row['text']}:")
        for label, got in zip(labels, found[row["id"]]["logliks"], strict=True):
            ids = ids_of(tiny, f"say {row['text']}:{label}")
            assert ids[: len(prompt)] == prompt
            # float32, the sum over a label's tokens.
            assert got == pytest.approx(loglik(tiny, prompt, ids[len(prompt) :]), abs=1e-4)


def test_embeddings_are_the_mean_of_the_last_states(tiny, jobs, tmp_path):
    export(tiny.checkpoint.path, tmp_path / "embedder", tasks=("embed",))
    rows = uneven_rows(12)
    found = jobs.rows("embed", tmp_path / "embedder", jobs.table(rows), "--text_column=text")
    for row in rows:
        with torch.no_grad():
            states = tiny.reference.model(torch.tensor([ids_of(tiny, row["text"])]))
        mean = states.last_hidden_state[0].mean(dim=0)
        expected = (mean / mean.norm()).numpy()
        # float32; vectors have length 1.
        np.testing.assert_allclose(found[row["id"]]["embedding"], expected, rtol=0, atol=1e-5)
