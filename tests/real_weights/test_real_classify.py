"""The real Gemma 3 270M scores labels as transformers does, to the command line's last column."""

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from beam_gemma.engine.engine import Engine
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.monitoring.progress import METER
from beam_gemma.runtime.limits import Limits
from beam_gemma.tasks.classify import Classifier
from beam_gemma.tasks.moderate import POLICIES, ModerateSettings, Policy
from beam_gemma.tasks.open_model import start_engine
from beam_gemma.tasks.questions import ClassifySettings, QuestionEncoder
from pipelines import classify
from tests.doubles.real_model import real_artifact, real_checkpoint

pytestmark = [pytest.mark.weights, pytest.mark.timeout(600)]

DATA = Path(__file__).parents[1] / "data"
# What transformers gives (tests/data/make_classify.py).
EXPECTED = json.loads((DATA / "classify.json").read_text())
TOLERANCE = 1e-4
CHOICES = tuple(f" {{choice{i}}}" for i in range(4))
NUM_REVIEWS, NUM_QUESTIONS = 100, 20


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return real_artifact(real_checkpoint())


@pytest.fixture(scope="module")
def engine(artifact: Artifact) -> Iterator[Engine]:
    """An engine with the default limits, which holds rows of several tests."""
    with closing(start_engine(artifact, "score", "cpu", Limits())) as engine:
        yield engine


def classifier(
    artifact: Artifact, engine: Engine, settings: ClassifySettings | ModerateSettings
) -> Classifier:
    tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
    encoders = [
        QuestionEncoder(tokenizer, question, chat_template=None, max_model_len=2000)
        for question in settings.questions
    ]
    return Classifier(engine, encoders, settings, on_result=METER.add)


@pytest.fixture
def classified(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return what the command line writes, in the order of the rows' ids."""

    def run(source: Path, *flags: str) -> list[dict]:
        files = [f"--input={source}", f"--output={tmp_path}/out.parquet"]
        argv = ["classify", f"--model={artifact.path}", *files, "--logliks", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        assert classify.main() == 0
        shards = [pq.read_table(path) for path in tmp_path.glob("out-*.parquet")]
        return sorted((r for shard in shards for r in shard.to_pylist()), key=lambda r: r["id"])

    return run


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


def test_reviews_behind_eight_examples(classified) -> None:
    rows = pq.read_table(DATA / "sst2_sample.parquet").slice(0, NUM_REVIEWS)
    results = classified(
        DATA / "sst2_sample.parquet", "--limit", str(NUM_REVIEWS),
        "--prompt", "Review: {sentence}\nSentiment: ", "--labels", "negative,positive",
        "--num_fewshot", "8", "--label_column", "sentiment",
    )  # fmt: skip
    check(results, in_order(rows.to_pylist(), EXPECTED["reviews"][:NUM_REVIEWS]), "sentiment")


def test_choices_of_each_row(classified) -> None:
    source = DATA / "gsm8k_choices.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()[:NUM_QUESTIONS]]
    labels = [word for choice in CHOICES for word in ("--label", choice)]
    results = classified(
        source, "--limit", str(NUM_QUESTIONS), "--prompt", "Question: {question}\nAnswer:", *labels
    )
    check(results, in_order(rows, EXPECTED["choices"][:NUM_QUESTIONS]), "right")


def test_policies(artifact: Artifact, engine: Engine) -> None:
    policies = tuple(Policy(name=name) for name in POLICIES)
    settings = ModerateSettings(policies=policies, prompt_column="sentence")
    rows = pq.read_table(DATA / "sst2_sample.parquet").slice(0, len(EXPECTED["moderated"]))
    results = classifier(artifact, engine, settings)(rows.to_pylist())
    for result, expected in zip(results, EXPECTED["moderated"], strict=True):
        assert result["scores"] == pytest.approx(expected, abs=TOLERANCE)


def test_a_row_is_worth_the_same_alone_and_in_any_batch(artifact: Artifact, engine: Engine) -> None:
    settings = ClassifySettings(
        prompt="Question: {question}\nAnswer:", labels=CHOICES, logliks=True, label_norm="chars"
    )
    rows = [json.loads(x) for x in (DATA / "gsm8k_choices.jsonl").read_text().splitlines()[:5]]
    together = classifier(artifact, engine, settings)(rows)
    assert {row["error"] for row in together} == {None}
    limits = Limits(max_num_seqs=2, max_num_batched_tokens=64)
    assert max(row["num_prompt_tokens"] for row in together) > 64  # a prompt takes several steps
    with closing(start_engine(artifact, "score", "cpu", limits)) as small:
        classify_alone = classifier(artifact, small, settings)
        assert [classify_alone([row])[0] for row in rows[:2]] == together[:2]
        assert classify_alone(rows[::-1]) == together[::-1]
