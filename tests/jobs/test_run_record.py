"""Record of a run: all that it takes to run again, and what came of it."""

import dataclasses
import datetime
import json
from collections import Counter

import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.jobs.run_record import facts_of, record_of
from beam_gemma.monitoring.result_summary import Summary
from beam_gemma.monitoring.timeline import COLUMNS
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.interface import task_name
from beam_gemma.tasks.moderate import ModerateSettings, Policy
from beam_gemma.tasks.questions import ClassifySettings, Shot
from beam_gemma.tasks.text_encoder import EmbedSettings

COMMAND = ["python", "-m", "pipelines.generate", "--prompt", "Say {text}"]
GENERATE = GenerateSettings(
    prompt="Say {text}", stop=("\n",), sampling=SamplingParams(max_tokens=9)
)
CLASSIFY = ClassifySettings(
    prompt="{text}",
    labels=(" good", " bad"),
    shots=(Shot(row={"text": "x", "day": datetime.date(2024, 1, 2)}, label=0),),
)
MODERATE = ModerateSettings(policies=(Policy(name="harassment"),), prompt_column="text")


@pytest.fixture
def facts(tiny_gemma3):
    def make(*settings):
        tasks = [("models/tiny", tiny_gemma3.artifact, each) for each in settings]
        return facts_of(COMMAND, source="in.parquet", sink="out/rows.parquet", tasks=tasks)

    return make


def pulse(engine, *samples, first_row_secs=None):
    return {
        "engine": engine,
        "device": "cpu",
        "processor": "abacus",
        "first_row_secs": first_row_secs,
        "samples": [(*s, *[0] * (1 + len(COLUMNS) - len(s))) for s in samples],
    }


def told(tag, **what):
    return {"tag": tag, **what}


def test_what_is_known_before_the_run(facts, tiny_gemma3):
    found = facts(GENERATE)
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == COMMAND
    assert (found["input"], found["output"]) == ("in.parquet", "out/rows.parquet")
    assert {"python", "apache-beam", "onnxruntime", "pyarrow", "sentencepiece"} <= set(
        found["packages"]
    )
    (task,) = found["tasks"]
    assert task["task"] == "generate"
    assert task["model"] == "models/tiny"
    assert task["model_digest"] == tiny_gemma3.artifact.digest
    assert task["settings"]["prompt"] == "Say {text}"
    assert task["settings"]["stop"] == ["\n"]
    assert task["settings"]["sampling"]["max_tokens"] == 9


def test_of_shots_there_is_a_hash_but_no_row(facts):
    """Shots are rows: the record tells apart jobs with other shots, and shows none of them."""
    others = [
        dataclasses.replace(CLASSIFY, shots=(Shot(row={"text": "y", "day": None}, label=0),)),
        dataclasses.replace(CLASSIFY, shots=(dataclasses.replace(CLASSIFY.shots[0], label=1),)),
    ]
    found, again, *rest = (facts(s)["tasks"][0]["settings"] for s in (CLASSIFY, CLASSIFY, *others))
    assert "shots" not in found
    assert found["num_shots"] == 1
    assert found == again
    assert len({settings["shots_sha256"] for settings in (found, *rest)}) == 3
    assert "2024-01-02" not in json.dumps(found)
    without = facts(dataclasses.replace(CLASSIFY, shots=()))["tasks"][0]["settings"]
    assert not [name for name in without if "shots" in name]


def test_secrets_are_in_no_part_of_a_record(tiny_gemma3):
    found = facts_of(
        [*COMMAND, "--s3_secret_access_key=HUSH", "--s3_session_token", "HUSH"],
        source="s3://user:HUSH@bucket/in.parquet",
        sink="https://account.blob.core.windows.net/out?sv=1&sig=HUSH",
        tasks=[("models/tiny", tiny_gemma3.artifact, GENERATE)],
    )
    assert "HUSH" not in json.dumps(found)
    assert found["command"][:-3] == COMMAND
    assert found["input"] == "s3://REDACTED@bucket/in.parquet"


def test_what_came_of_it(facts):
    summaries = [Summary(rows=7, failed=1, reasons=Counter(no=1))]
    ledger = [
        told(0, counts={"requests": 3, "duplicate_rows": 1, "resumed_rows": 0}),
        told(0, pulse=pulse("a", (0.0, 0, 0, 0, 0, 0), first_row_secs=None)),
        told(0, pulse=pulse("a", (2.0, 9, 0, 4, 0, 0), first_row_secs=8.5)),
        told(0, pulse=pulse("a", (2.0, 9, 0, 4, 0, 0), first_row_secs=8.5)),
        told(0, counts={"requests": 2, "duplicate_rows": 0, "resumed_rows": 1}),
        told(0, pulse=pulse("b", (1.0, 0, 0, 0, 0, 0), (2.0, 1, 0, 1, 0, 0), first_row_secs=3.5)),
    ]
    record = record_of(
        facts(GENERATE), num_shards=2, prefixes=[""], summaries=summaries, ledger=ledger
    )
    assert json.loads(json.dumps(record)) == record
    assert (record["rows"], record["shards"]) == (7, 2)
    assert 0 <= record["seconds"] < 60
    (task,) = record["tasks"]
    assert (task["requests"], task["duplicate_rows"], task["resumed_rows"]) == (5, 1, 1)
    assert (record["processors"], record["engines"]) == (["cpu: abacus"], 2)
    assert record["first_row_secs"] == [3.5, 8.5]
    assert [line["completion_tokens"] for line in record["timelines"]] == [[0, 2, 5]]
    assert Summary.from_dict(task["results"]) == summaries[0]


def test_a_clock_behind_that_of_the_launch_gives_no_negative_time(facts):
    ahead = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    late = facts(GENERATE) | {"started": ahead.isoformat(timespec="milliseconds")}
    record = record_of(late, num_shards=1, prefixes=[""], summaries=[Summary()], ledger=[])
    assert record["seconds"] == 0


def test_what_came_of_each_task(facts):
    summaries = [Summary(rows=7, failed=1), Summary(rows=7, failed=3)]
    ledger = [
        told(1, counts={"requests": 2}),
        told(1, pulse=pulse("b", (2.0, 0, 0, 0, 0, 0), (3.0, 1, 0, 5, 0, 0))),
        told(0, pulse=pulse("a", (0.0, 0, 0, 0, 0, 0), (1.0, 9, 0, 4, 0, 0))),
        told(0, counts={"requests": 3}),
    ]
    record = record_of(
        facts(GENERATE, GENERATE),
        num_shards=1,
        prefixes=["short_", "long_"],
        summaries=summaries,
        ledger=ledger,
    )
    assert [(t["prefix"], t["requests"], t["results"]["failed"]) for t in record["tasks"]] == [
        ("short_", 3, 1),
        ("long_", 2, 3),
    ]
    assert [line["completion_tokens"][-1] for line in record["timelines"]] == [4, 5]
    assert record["engines"] == 2


def test_labels_have_their_names(facts):
    summaries = [
        Summary(rows=5, labels=Counter({"1": 3, "0": 2})),
        Summary(rows=5, labels=Counter(harassment=1)),
    ]
    record = record_of(
        facts(CLASSIFY, MODERATE),
        num_shards=1,
        prefixes=["a_", "b_"],
        summaries=summaries,
        ledger=[],
    )
    classified, moderated = (task["results"]["labels"] for task in record["tasks"])
    assert classified == {" bad": 3, " good": 2}
    assert moderated == {"harassment": 1}


def test_names_of_tasks():
    tasks = [GENERATE, CLASSIFY, MODERATE, EmbedSettings()]
    assert list(map(task_name, tasks)) == ["generate", "classify", "moderate", "embed"]
