"""The real Gemma 3 270M scores labels as transformers does, to the command line's last column."""

import json
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.monitoring.progress import METER
from beam_gemma.runtime.limits import Limits
from beam_gemma.tasks.classify import Classifier
from beam_gemma.tasks.moderate import POLICIES, ModerateSettings, Policy
from beam_gemma.tasks.open_model import start_engine
from beam_gemma.tasks.questions import ClassifySettings, QuestionEncoder
from tests.doubles.real_model import real_artifact, real_checkpoint

pytestmark = [pytest.mark.weights, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
# What transformers gives (tests/data/make_classify.py).
EXPECTED = json.loads((DATA / "classify.json").read_text())
TOLERANCE = 1e-4
CHOICES = tuple(f" {{choice{i}}}" for i in range(4))


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return real_artifact(real_checkpoint())


def classified(artifact: Artifact, source: Path, output: Path, *flags: str) -> list[dict]:
    """Return what the command line writes, in the order of the input."""
    subprocess.run(
        [
            sys.executable, "-m", "pipelines.classify", "--model", artifact.path,
            "--input", source, "--output", output / "out.parquet", "--logliks", *flags,
        ],
        check=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    rows = [row for path in output.glob("out-*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: row["id"])


def in_order(rows: list[dict], expected: list[list[float]]) -> list[list[float]]:
    """Return expected numbers in the order of the rows' ids."""
    return [expected[i] for i in sorted(range(len(rows)), key=lambda i: rows[i]["id"])]


def best(scores: list[float]) -> int:
    return scores.index(max(scores))


def check(results: list[dict], expected: list[list[float]], truth: str) -> None:
    assert len(results) == len(expected)
    for row, logliks in zip(results, expected, strict=True):
        assert row["logliks"] == pytest.approx(logliks, abs=TOLERANCE)
        assert row["label_index"] == best(logliks)
    ours = sum(row["label_index"] == row[truth] for row in results)
    theirs = sum(best(e) == row[truth] for e, row in zip(expected, results, strict=True))
    assert ours == theirs
    print(f"accuracy: {ours} of {len(results)}, of ours as of transformers")


def test_reviews_behind_eight_examples(artifact: Artifact, tmp_path: Path) -> None:
    rows = pq.read_table(DATA / "sst2_sample.parquet").slice(0, 200)
    results = classified(
        artifact, DATA / "sst2_sample.parquet", tmp_path, "--limit", "200",
        "--prompt", "Review: {sentence}\nSentiment: ", "--labels", "negative,positive",
        "--num_fewshot", "8", "--label_column", "sentiment",
    )  # fmt: skip
    check(results, in_order(rows.to_pylist(), EXPECTED["reviews"]), "sentiment")


def test_choices_of_each_row(artifact: Artifact, tmp_path: Path) -> None:
    source = DATA / "gsm8k_choices.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    labels = [word for choice in CHOICES for word in ("--label", choice)]
    prompt = "Question: {question}\nAnswer:"
    results = classified(artifact, source, tmp_path, "--prompt", prompt, *labels)
    check(results, in_order(rows, EXPECTED["choices"]), "right")


@contextmanager
def loaded(artifact: Artifact, settings: ClassifySettings | ModerateSettings, **config: int):
    """Return the task on an engine of its own, which ends with the test."""
    tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
    encoders = [
        QuestionEncoder(tokenizer, question, chat_template=None, max_model_len=2000)
        for question in settings.questions
    ]
    with closing(start_engine(artifact, "score", "cpu", Limits(**config))) as engine:
        yield Classifier(engine, encoders, settings, on_result=METER.add)


def test_policies(artifact: Artifact) -> None:
    policies = tuple(Policy(name=name) for name in POLICIES)
    settings = ModerateSettings(policies=policies, prompt_column="sentence")
    rows = pq.read_table(DATA / "sst2_sample.parquet").slice(0, len(EXPECTED["moderated"]))
    with loaded(artifact, settings) as classify:
        results = classify(rows.to_pylist())
    for result, expected in zip(results, EXPECTED["moderated"], strict=True):
        assert result["scores"] == pytest.approx(expected, abs=TOLERANCE)


def test_a_row_is_worth_the_same_alone_and_in_any_batch(artifact: Artifact) -> None:
    settings = ClassifySettings(
        prompt="Question: {question}\nAnswer:", labels=CHOICES, logliks=True, label_norm="chars"
    )
    rows = [json.loads(x) for x in (DATA / "gsm8k_choices.jsonl").read_text().splitlines()[:8]]
    with loaded(artifact, settings) as classify:
        together = classify(rows)
    assert {row["error"] for row in together} == {None}
    with loaded(artifact, settings, max_num_seqs=2, max_num_batched_tokens=64) as classify:
        assert [classify([row])[0] for row in rows[:3]] == together[:3]
        assert classify(rows[::-1]) == together[::-1]
