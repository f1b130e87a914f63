"""The classify pipeline, end to end with a tiny model, and every way to ask it wrongly."""

import json
import re
import sys

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that

from beam_gemma.cli import run as cli
from beam_gemma.cli.classify_flags import classify_parser, classify_settings
from beam_gemma.inference.handlers import GemmaClassifyModelHandler
from beam_gemma.inference.transforms import Classify
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.tasks.moderate import POLICIES, ModerateSettings, Policy
from beam_gemma.tasks.questions import ClassifySettings
from pipelines.classify import main
from tests.doubles.fake_models import local_pipeline


@pytest.fixture(scope="module")
def model(tiny_gemma3):
    return str(tiny_gemma3.artifact.path)


@pytest.fixture
def rows(tmp_path):
    """A table of JSON lines; the third row lacks its text."""
    texts = ["the cat", "in the hat", None, "a tent", "the bin"]
    lines = [
        {"id": i, "text": text, "reply": f"no {i}", "kind": ["no", "yes"][i % 2], "other": f"o{i}"}
        for i, text in enumerate(texts)
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys, model, rows, tmp_path):
    """Run the command line in this process; return exit code, output, errors and rows by id."""

    def run_with(*flags):
        out = tmp_path / "out"
        shared = [f"--model={model}", f"--input={rows}", f"--output={out}/x.jsonl", "--overwrite"]
        monkeypatch.setattr(sys, "argv", ["classify", *shared, *map(str, flags)])
        code = cli.exit_code(main)
        lines = [line for p in sorted(out.glob("*.jsonl")) for line in p.read_text().splitlines()]
        results = {row["id"]: row for row in map(json.loads, lines)}
        return code, *capsys.readouterr(), results

    return run_with


PROMPT = "--prompt={text}: "


def test_a_record_and_a_report_hold_no_row_and_no_secret(run, tmp_path):
    """Not even of few-shot examples, which are rows, nor of Beam's own flags."""
    shots = ["--labels=no,yes", "--label_column=kind", "--num_fewshot=2"]
    secrets = ["--s3_secret_access_key=HUSH", "--s3_session_token", "HUSH"]
    code, stdout, stderr, _ = run(PROMPT, *shots, *secrets, f"--report={tmp_path}/x.html")
    assert code == 0, stderr
    record = (tmp_path / "out" / "_x.run.json").read_text()
    for shown in (record, (tmp_path / "x.html").read_text(), stdout, stderr):
        assert not re.search(r"HUSH|\b(cat|hat|tent|bin|no \d|o\d)\b", shown)
    (task,) = json.loads(record)["tasks"]
    assert task["settings"]["num_shots"] == 3
    assert {*shots, "REDACTED"} < set(json.loads(record)["command"])


def test_rows_in_rows_out(run):
    code, stdout, _, results = run(PROMPT, "--labels=no,yes", "--logliks")
    assert code == 0
    assert stdout.startswith("read 5 = ok 4 + failed 1 = written 5 rows; ")
    assert list(results[0])[5:] == [
        "label", "label_index", "scores", "num_prompt_tokens", "logliks", "error"
    ]  # fmt: skip
    assert [results[i]["error"] is None for i in range(5)] == [True, True, False, True, True]
    for i in (0, 1, 3, 4):
        assert results[i]["label"] == ["no", "yes"][results[i]["label_index"]]
        assert sum(results[i]["scores"]) == pytest.approx(1.0)
        assert max(results[i]["logliks"]) < 0


def test_a_row_is_worth_the_same_however_it_is_run(run):
    flags = (PROMPT, "--label={kind}", "--label=x{other}", "--logliks")
    _, _, _, plain = run(*flags)
    assert {type(row["scores"]) for row in plain.values()} == {list, type(None)}
    for more in (
        ["--max_num_seqs=1", "--max_num_batched_tokens=64"],
        ["--direct_running_mode=multi_threading", "--direct_num_workers=3"],
    ):
        code, _, _, results = run(*flags, *more)
        assert code == 0
        assert results == plain


def test_shots_come_from_the_input_or_a_file(run, tmp_path):
    shots = ["--labels=no,yes", "--label_column=kind", "--num_fewshot=2", "--fewshot_seed=3"]
    code, first, _, _ = run(PROMPT, *shots, "--dry_run")
    assert code == 0
    assert run(PROMPT, *shots, "--dry_run")[1] == first
    prompts = first[first.index("prompt 1") :].split("\nprompt ")
    for prompt in prompts:
        *before, last = prompt.split("tokens:\n")[1].strip("\n").split("\n\n")
        assert len(before) == 2
        assert last not in before
        assert all(shot.endswith((": no", ": yes")) for shot in before)
    file = tmp_path / "shots.jsonl"
    file.write_text('{"text": "q", "kind": "yes"}\n')
    code, stdout, _, _ = run(
        PROMPT, "--labels=no,yes", "--label_column=kind", f"--fewshot_file={file}",
        "--fewshot_delimiter=|", "--dry_run",
    )  # fmt: skip
    assert code == 0
    assert "q: yes|the cat: " in stdout


def test_dry_run_loads_no_weights(run, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Session, "of", refuse)
    code, stdout, _, results = run(PROMPT, "--label={kind}", "--label=other", "--dry_run")
    assert (code, results) == (0, {})
    assert "rows: 5, of which 5 sampled" in stdout
    assert "rows that would fail: 1 of the sample" in stdout


def test_policies(tmp_path):
    own = tmp_path / "manners.txt"
    own.write_text('"No Shouting": The prompt shall not shout.')
    flags = ["--model=m", "--input=i", "--output=o", "--prompt_column=text"]
    asked = ["--policy=harassment", f"--policy={own}", "--response_column=reply"]
    settings = classify_settings(classify_parser().parse_args([*flags, *asked, "--truncate=left"]))
    assert settings == ModerateSettings(
        policies=(Policy(name="harassment"), Policy(name="manners", guideline=own.read_text())),
        prompt_column="text",
        response_column="reply",
        truncate="left",
    )
    every = classify_settings(classify_parser().parse_args([*flags, "--policy=all"]))
    assert [policy.name for policy in every.policies] == list(POLICIES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([PROMPT], "one of --labels, --label, --labels_file and --policy, got none"),
        ([PROMPT, "--labels=a,b", "--label=c"], "got --labels and --label"),
        ([PROMPT, "--labels=a, b"], "no space between them"),
        ([PROMPT, "--labels=a"], "at least two"),
        ([PROMPT, "--labels=a,,b"], "not empty"),
        ([PROMPT, "--labels_file=nowhere.txt"], "--labels_file nowhere.txt"),
        (["--labels=a,b"], "--prompt_column and --messages_column, got none"),
        ([PROMPT, "--label={knd}", "--label=b"], "'knd'.*did you mean kind"),
        ([PROMPT, "--labels=a,b", "--num_fewshot=2"], "--label_column: .*got none"),
        ([PROMPT, "--labels=a,b", "--label_column=kind"], "--label_column: .*got it alone"),
        (
            [PROMPT, "--labels=a,b", "--num_fewshot=2", "--label_column=kind"],
            r"in\.jsonl, row 0 .* a, b, got another str",
        ),
        ([PROMPT, "--labels=no,yes", "--num_fewshot=9", "--label_column=kind"], "the 4 rows"),
        ([PROMPT, "--labels=a,b", "--threshold=0.3"], "--threshold: expected --policy"),
        (["--policy=all"], "--prompt_column or --image_column beside it"),
        (["--policy=hate", "--prompt_column=text"], "'hate': expected one of dangerous_content"),
        (["--policy=all", "--prompt_column=text", "--labels=a,b"], "got --labels"),
        (["--policy=all", "--prompt_column=text", "--prompt_format=chat"], "got --prompt_format"),
        (["--policy=nowhere.txt", "--prompt_column=text"], "--policy nowhere.txt"),
    ],
)
def test_wrong_settings_are_refused(run, flags, message):
    code, _, stderr, results = run(*flags)
    assert code == 2
    assert results == {}
    assert re.search(message, stderr), stderr


def test_labels_of_a_file_keep_their_spaces(run, tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text(" no\n yes\n")
    _, _, _, results = run("--prompt={text}:", f"--labels_file={path}")
    assert results[0]["label"] in (" no", " yes")


def test_the_transform_takes_rows_of_beam(model):
    settings = ClassifySettings(prompt="{text}: ", labels=("no", "{other}"))
    rows = [beam.Row(text=text, other="x") for text in ("the cat", "a tent")]

    def check(results):
        assert sorted(row.text for row in results) == ["a tent", "the cat"]
        for row in results:
            assert row.label == ["no", "x"][row.label_index]
            assert len(row.scores) == 2

    with local_pipeline() as pipeline:
        handler = GemmaClassifyModelHandler(model, settings, large_model=False)
        assert_that(pipeline | beam.Create(rows) | Classify(handler), check)
