"""Gemma 3n with pictures in whole jobs: what transformers computes, in any company."""

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beam_gemma.errors import CheckpointError
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint
from tests.doubles.command_line import CommandLine
from tests.doubles.gemma3n_seeing import published_processor, save_seeing_gemma3n, seeing_gemma3n
from tests.doubles.once import exporter_digest, kept
from tests.doubles.seeing import picture
from tests.pipelines.test_recurrent import EOS, NEW_TOKENS, tokens_of

NUM_ROWS, NUM_PICTURES = 16, 5
FLAGS = ("--prompt={photo}so {text}", "--image_column=photo", "--allow_missing_images",
         f"--max_tokens={NEW_TOKENS}", "--token_ids", "--logprob")  # fmt: skip
FEWER = ("--max_num_seqs=2", "--max_num_batched_tokens=32")


@functools.cache
def reference() -> torch.nn.Module:
    return seeing_gemma3n().eval()


@functools.cache
def folder() -> Path:
    """The folder with the checkpoint `hf` and the export `model`."""

    def make(made: Path) -> None:
        save_seeing_gemma3n(reference(), made / "hf")
        export(made / "hf", made / "model", tasks=["generate", "classify"])

    return kept(f"gemma3n-pictures-{exporter_digest()}", make)


@pytest.fixture
def jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    for number in range(NUM_PICTURES):
        (tmp_path / f"{number}.png").write_bytes(picture(number, (100, 60 + 10 * number)))
    return CommandLine(tmp_path, capsys)


def rows_with_pictures() -> list[dict[str, Any]]:
    """Return rows with no, one and two pictures, of which some are the same."""
    draw = np.random.default_rng(3)
    letters = [*"abcdefghijklmnopqrstuvwxyz  "]
    return [
        {
            "id": i,
            "text": "".join(draw.choice(letters, draw.integers(1, 60))),
            "photo": [f"{n}.png" for n in draw.choice(NUM_PICTURES, i % 3, replace=False)],
        }
        for i in range(NUM_ROWS)
    ]


def inputs_of(jobs: CommandLine, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return transformers' inputs for a row."""
    images = [Image.open(io.BytesIO((jobs.folder / n).read_bytes())) for n in row["photo"]]
    text = "<image_soft_token>" * len(images) + f"so {row['text']}"
    found = published_processor()(text=text, images=images or None, return_tensors="pt")
    return {k: v for k, v in found.items() if k != "token_type_ids"}


@torch.no_grad()
def test_greedy_tokens_of_rows_with_pictures_are_those_of_transformers(jobs):
    rows = rows_with_pictures()
    found = jobs.rows("generate", folder() / "model", jobs.table(rows), *FLAGS)
    said = set()
    for row in rows:
        inputs = inputs_of(jobs, row)
        count = inputs["input_ids"].shape[1]
        outputs = reference().generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS
        )
        expected = outputs[0, count:].tolist()
        assert tokens_of(found[row["id"]]) == expected
        assert found[row["id"]]["num_prompt_tokens"] == count
        said.add(tuple(expected))
    assert len(said) > NUM_ROWS // 2


def test_a_row_with_pictures_is_worth_the_same_in_any_company(jobs):
    rows, model = rows_with_pictures(), folder() / "model"
    flags = (*FLAGS, "--temperature=3", "--key_column=id")
    plain = jobs.rows("generate", model, jobs.table(rows), *flags)
    turned = jobs.table(rows[::-1], "turned")
    assert jobs.rows("generate", model, turned, *flags, *FEWER) == plain


@torch.no_grad()
def test_a_picture_changes_the_scores_of_labels_as_in_transformers(jobs):
    row = {"id": 0, "text": "it", "photo": ["1.png"]}
    found = jobs.rows(
        "classify", folder() / "model", jobs.table([row]), "--prompt={photo}so {text}",
        "--image_column=photo", "--labels=a,b", "--logliks",
    )  # fmt: skip
    for label, loglik in zip(("a", "b"), found[0]["logliks"], strict=True):
        inputs = inputs_of(jobs, row | {"text": f"it{label}"})
        ids = inputs["input_ids"][0]
        logits = reference()(**inputs).logits[0, -2]
        # float32
        expected = float(torch.log_softmax(logits, -1)[ids[-1]])
        assert loglik == pytest.approx(expected, abs=1e-4)


def test_text_only_leaves_the_tower_out(caplog):
    plain = read_checkpoint(folder() / "hf", text_only=True)
    assert plain.vision is None
    assert not [name for name in plain.tensors if name.startswith(("vision_", "embed_vision"))]
    assert "without what it has for images" in caplog.text
    caplog.clear()
    seeing = read_checkpoint(folder() / "hf")
    assert seeing.vision is not None
    assert not caplog.text


def test_another_id_of_the_token_before_a_picture_is_refused(tmp_path):
    published = save_seeing_gemma3n(reference(), tmp_path / "hf")
    config = published / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "boi_token_id": 7}))
    with pytest.raises(CheckpointError, match=r"boi_token_index .* <start_of_image>, 6, got 7"):
        read_checkpoint(published)
