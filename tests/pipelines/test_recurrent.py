"""RecurrentGemma in whole jobs: what the original's windows give, in any company."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beam_gemma.errors import OptionsError
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from export.__main__ import export
from tests.doubles.command_line import CommandLine
from tests.doubles.recurrent_models import WINDOW, recurrent_model, tiny_recurrent
from tests.doubles.reference import logits_of

ROOT = Path(__file__).parent.parent.parent
NUM_ROWS, NEW_TOKENS = 64, 10
EOS = 1
FLAGS = ("--prompt=say {text}", f"--max_tokens={NEW_TOKENS}", "--token_ids", "--logprob")


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_recurrent() / "artifact"


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """Transformers with the window of the original, which counts one token more."""
    return recurrent_model(WINDOW + 1)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(model / "tokenizer.model")


@pytest.fixture
def jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, capsys)


def uneven_rows(number: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Return texts of 1 to 150 letters, most of them beyond the window."""
    rng = np.random.default_rng(6)
    letters = [*"abcdefghijklmnopqrstuvwxyz  "]
    texts = ["".join(rng.choice(letters, n)) for n in rng.integers(1, 150, number)]
    return [{"id": i, "text": text} for i, text in enumerate(texts)]


def logprobs_of(reference: torch.nn.Module, ids: list[int]) -> np.ndarray:
    return torch.log_softmax(torch.tensor(logits_of(reference, ids)), dim=-1).numpy()


def tokens_of(row: dict[str, Any]) -> list[int]:
    """Return the tokens of a completion, with the end token."""
    assert row["error"] is None, row
    return row["completion_token_ids"] + [EOS] * (row["finish_reason"] == "stop")


def test_greedy_tokens_of_64_uneven_rows_are_those_of_the_reference(
    model, reference, tokenizer, jobs
):
    """Each is the likeliest by a pass of its own over all tokens before it."""
    rows = uneven_rows()
    found = jobs.rows("generate", model, jobs.table([*rows, {"id": 100, "text": None}]), *FLAGS)
    said = set()
    for row in rows:
        prompt = tokenizer.encode([Text(f"say {row['text']}")])
        tokens = tokens_of(found[row["id"]])
        logprobs = logprobs_of(reference, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        chosen = logprobs[np.arange(len(tokens)), tokens]
        # float32; the softcap leaves the likeliest tokens as close as this.
        np.testing.assert_allclose(chosen, logprobs.max(axis=-1), rtol=0, atol=1e-5)
        total = chosen.sum()
        # float32, the sum over a completion.
        assert found[row["id"]]["logprob"] == pytest.approx(float(total), abs=2e-4)
        said.add(tuple(tokens))
    assert len(said) > 10
    assert "null" in found[100]["error"]


WAYS = {
    "few at once": ["--max_num_seqs=3", "--max_num_batched_tokens=64"],
    "alone": ["--max_num_seqs=1"],
    "threads": ["--direct_running_mode=multi_threading", "--direct_num_workers=3"],
}


def test_a_row_is_worth_the_same_however_it_is_run(model, jobs):
    """Most rows share a long beginning, whose state is kept."""
    rows = [{**row, "text": "the cat in the hat " * 5 + row["text"]} for row in uneven_rows(40)]
    rows[::5] = [{**row, "text": row["text"][::-1]} for row in rows[::5]]
    flags = (*FLAGS, "--temperature=3", "--key_column=id")
    plain = jobs.rows("generate", model, jobs.table(rows), *flags)
    assert len({row["completion"] for row in plain.values()}) > 20
    turned = jobs.table(rows[::-1], "turned")
    for name, more in WAYS.items():
        assert jobs.rows("generate", model, turned, *flags, *more) == plain, name


def test_labels_are_scored_as_the_reference_scores_them(model, reference, tokenizer, jobs):
    rows = uneven_rows(10)
    labels = (" no", " yes indeed")
    found = jobs.rows(
        "classify", model, jobs.table(rows), "--prompt=say {text}:", f"--label={labels[0]}",
        f"--label={labels[1]}", "--logliks",
    )  # fmt: skip
    for row in rows:
        prompt = tokenizer.encode([Text(f"say {row['text']}:")])
        for label, loglik in zip(labels, found[row["id"]]["logliks"], strict=True):
            ids = tokenizer.encode([Text(f"say {row['text']}:{label}")])
            assert ids[: len(prompt)] == prompt
            logprobs = logprobs_of(reference, ids[:-1])[len(prompt) - 1 :]
            own = ids[len(prompt) :]
            # float32, the sum over a label's tokens.
            assert loglik == pytest.approx(logprobs[np.arange(len(own)), own].sum(), abs=1e-4)


def test_structured_completions_are_valid(model, jobs):
    table = jobs.table(uneven_rows(6))
    flags = ("--prompt_column=text", "--max_tokens=30")
    chosen = jobs.rows("generate", model, table, *flags, "--choices=yes,no,not sure")
    assert {row["completion"] for row in chosen.values()} <= {"yes", "no", "not sure"}
    matched = jobs.rows("generate", model, table, *flags, "--regex=[a-c]{3}")
    assert all(re.fullmatch("[a-c]{3}", row["completion"]) for row in matched.values())


def test_equal_rows_are_computed_once(model, jobs):
    rows = [{"id": i, "text": text} for i, text in enumerate(["the cat", "a tent", "the cat"])]
    found = jobs.rows("generate", model, jobs.table(rows), *FLAGS)
    assert {**found[0], "id": 2} == found[2]
    record = json.loads((jobs.folder / "out1/_x.run.json").read_text())
    assert record["tasks"][0]["duplicate_rows"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt_column=text", "--decoder_prompt=x"], "decoder_prompt: expected an encoder-dec"),
        (["--prefix_column=text", "--suffix_column=text"], "prefix_column: .* such as CodeGemma"),
        (["--prompt_column=text", "--image_column=id"], "image_columns: expected a model that"),
    ],
)
def test_what_it_cannot_do_is_refused(model, jobs, flags, message):
    table = jobs.table(uneven_rows(1))
    code, _, err = jobs.run(
        "generate", f"--model={model}", f"--input={table}",
        f"--output={jobs.folder}/out/x.jsonl", *flags,
    )  # fmt: skip
    assert (code, err.count("\n")) == (2, 1)
    assert re.match(f"error: {message}", err), err


def test_a_job_that_embeds_says_so_too(jobs, model):
    code, _, err = jobs.run(
        "embed", f"--model={model}", f"--input={jobs.table(uneven_rows(1))}",
        f"--output={jobs.folder}/x.jsonl", "--text_column=text",
    )  # fmt: skip
    assert code == 2
    assert err.startswith("error: model: expected one that embeds texts, got a RecurrentGemma")


def test_it_embeds_nothing(tmp_path):
    with pytest.raises(OptionsError, match=r"--tasks: .* for a RecurrentGemma"):
        export(tiny_recurrent() / "checkpoint", tmp_path / "model", tasks=["embed"])
    assert not (tmp_path / "model").exists()


def test_from_a_published_folder_by_the_command_line(tmp_path, jobs, model):
    checkpoint = tiny_recurrent() / "checkpoint"
    command = ["export", f"--checkpoint={checkpoint}", f"--output={tmp_path}/model"]
    command.append("--tasks=generate")
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    table = jobs.table(uneven_rows(2))
    again = jobs.rows("generate", tmp_path / "model", table, *FLAGS)
    assert again == jobs.rows("generate", model, table, *FLAGS)
