"""Gemma 3n in whole jobs: what transformers computes, in any company."""

from pathlib import Path

import numpy as np
import pytest
import torch

from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from export.__main__ import export
from tests.doubles.command_line import CommandLine
from tests.doubles.gemma3n_models import TinyGemma3n, save_published, states_of, tiny_gemma3n
from tests.pipelines.test_recurrent import (
    EOS,
    FLAGS,
    NEW_TOKENS,
    logprobs_of,
    tokens_of,
    uneven_rows,
)

NUM_ROWS = 64


@pytest.fixture(scope="module")
def tiny() -> TinyGemma3n:
    return tiny_gemma3n("gemma3n")


@pytest.fixture(scope="module")
def tokenizer(tiny: TinyGemma3n) -> Tokenizer:
    return Tokenizer.from_file(tiny.artifact.tokenizer_path)


@pytest.fixture
def jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, capsys)


@torch.no_grad()
def generated(reference: torch.nn.Module, prompt: list[int]) -> list[int]:
    """Return what transformers generates greedily after a prompt, with the end token."""
    outputs = reference.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS
    )
    return outputs[0, len(prompt) :].tolist()


def test_greedy_tokens_of_64_uneven_rows_are_those_of_transformers(tiny, tokenizer, jobs):
    rows = uneven_rows(NUM_ROWS)
    found = jobs.rows(
        "generate", tiny.artifact.path, jobs.table([*rows, {"id": 100, "text": None}]), *FLAGS
    )
    said = set()
    for row in rows:
        prompt = tokenizer.encode([Text(f"say {row['text']}")])
        expected = generated(tiny.reference, prompt)
        assert tokens_of(found[row["id"]]) == expected
        logprobs = logprobs_of(tiny.reference, [*prompt, *expected[:-1]])[len(prompt) - 1 :]
        # float32, the sum over a completion.
        assert found[row["id"]]["logprob"] == pytest.approx(
            float(logprobs[np.arange(len(expected)), expected].sum()), abs=2e-4
        )
        said.add(tuple(expected))
    assert len(said) > NUM_ROWS // 2
    assert "null" in found[100]["error"]


WAYS = {
    "few at once": ["--max_num_seqs=3", "--max_num_batched_tokens=64"],
    "alone": ["--max_num_seqs=1"],
    "threads": ["--direct_running_mode=multi_threading", "--direct_num_workers=3"],
}


def test_a_row_is_worth_the_same_however_it_is_run(tiny, jobs):
    """Most rows share a long beginning, whose blocks are kept for all layers that read them."""
    rows = [{**row, "text": "the cat in the hat " * 5 + row["text"]} for row in uneven_rows(40)]
    rows[::5] = [{**row, "text": row["text"][::-1]} for row in rows[::5]]
    flags = (*FLAGS, "--temperature=3", "--key_column=id")
    plain = jobs.rows("generate", tiny.artifact.path, jobs.table(rows), *flags)
    assert len({row["completion"] for row in plain.values()}) > 20
    turned = jobs.table(rows[::-1], "turned")
    for name, more in WAYS.items():
        assert jobs.rows("generate", tiny.artifact.path, turned, *flags, *more) == plain, name


def test_labels_are_scored_as_transformers_scores_them(tiny, tokenizer, jobs):
    rows = uneven_rows(10)
    labels = (" no", " yes indeed")
    found = jobs.rows(
        "classify", tiny.artifact.path, jobs.table(rows), "--prompt=say {text}:",
        f"--label={labels[0]}", f"--label={labels[1]}", "--logliks",
    )  # fmt: skip
    for row in rows:
        prompt = tokenizer.encode([Text(f"say {row['text']}:")])
        for label, loglik in zip(labels, found[row["id"]]["logliks"], strict=True):
            ids = tokenizer.encode([Text(f"say {row['text']}:{label}")])
            assert ids[: len(prompt)] == prompt
            logprobs = logprobs_of(tiny.reference, ids[:-1])[len(prompt) - 1 :]
            own = ids[len(prompt) :]
            # float32, the sum over a label's tokens.
            assert loglik == pytest.approx(logprobs[np.arange(len(own)), own].sum(), abs=1e-4)


def test_embeddings_are_the_mean_of_all_states(tiny, tokenizer, jobs):
    """All layers compute all tokens here, those that read keys and values of others too."""
    rows = uneven_rows(12)
    found = jobs.rows("embed", tiny.artifact.path, jobs.table(rows), "--text_column=text")
    for row in rows:
        mean = states_of(tiny.reference, tokenizer.encode([Text(row["text"])])).mean(axis=0)
        # float32; vectors have length 1.
        np.testing.assert_allclose(
            found[row["id"]]["embedding"], mean / np.linalg.norm(mean), rtol=0, atol=2e-5
        )
    turned = jobs.table(rows[::-1], "turned")
    flags = ("--text_column=text", "--max_num_batched_tokens=64")
    assert jobs.rows("embed", tiny.artifact.path, turned, *flags) == found


def test_a_published_folder_gives_the_same_completions(tiny, tmp_path, jobs):
    model = tmp_path / "model"
    published = save_published("gemma3n", tmp_path / "published")
    export(published, model, tasks=["generate"], text_only=True)
    table = jobs.table(uneven_rows(4))
    expected = jobs.rows("generate", tiny.artifact.path, table, *FLAGS)
    assert jobs.rows("generate", model, table, *FLAGS) == expected
