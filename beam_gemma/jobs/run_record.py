"""Build the record of a run: settings, models, versions, results, and the command to repeat it.

The record is JSON. It holds no text of a row and no secret: of few-shot examples, which are rows,
it has the number and a hash, and of secret flags the names. The command draws the same examples.
"""

import dataclasses
import hashlib
import itertools
import json
import platform
import reprlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import beam_gemma
from beam_gemma.jobs.redaction import without_password, without_secrets
from beam_gemma.model.artifact import Artifact
from beam_gemma.monitoring.result_summary import Summary
from beam_gemma.monitoring.timeline import timeline
from beam_gemma.tasks.interface import Settings, task_name
from beam_gemma.versions import installed

FORMAT = 2
"""Version of the record format, raised when readers would misread a new record."""
PACKAGES = (
    "apache-beam", "llguidance", "numpy", "onnxruntime", "onnxruntime-gpu", "pyarrow",
    "sentencepiece",
)  # fmt: skip
"""Packages that results depend on, of which some may not be installed."""


def facts_of(
    command: Sequence[str],
    *,
    source: str,
    sink: str,
    tasks: Iterable[tuple[str, Artifact, Settings]],
) -> dict[str, Any]:
    """Return the part of a record that is known before the job runs.

    Args:
        command: The shell command that repeats the job, as a list of words; the record has it
            without the values of secret flags.
        source: URI of the table that is read.
        sink: URI of the table that is written.
        tasks: The model location, model artifact and settings of each task.
    """
    return {
        "format": FORMAT,
        "tool": f"beam-gemma {beam_gemma.__version__}",
        "packages": {"python": platform.python_version(), **installed(PACKAGES)},
        "command": without_secrets(command),
        "input": without_password(source),
        "output": without_password(sink),
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "tasks": [
            {
                "task": task_name(settings),
                "model": model,
                "model_digest": artifact.digest,
                "settings": _without_rows(_as_json(settings)),
            }
            for model, artifact, settings in tasks
        ],
    }


def marks_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return a file's metadata about its job: version, models, and a hash of the settings."""
    # Keys stay in order, because the order of a schema's properties is part of the settings.
    settings = json.dumps([task["settings"] for task in facts["tasks"]])
    return {
        "beam_gemma.version": beam_gemma.__version__,
        "beam_gemma.models": ", ".join(
            f"{task['model']} {task['model_digest']}" for task in facts["tasks"]
        ),
        "beam_gemma.settings_sha256": hashlib.sha256(settings.encode()).hexdigest(),
    }


def difference(
    record: Mapping[str, Any], facts: Mapping[str, Any], num_rows: int | None
) -> str | None:
    """Return how a job differs from the one that a record is of; None if it asks for the same.

    Settings that only one of them has are passed over, since another version may have written the
    record.

    Args:
        record: The record of a finished job.
        facts: The facts of the job to compare.
        num_rows: The number of rows of its table, if that is known.
    """
    here, there = _compared(json.loads(json.dumps(facts))), _compared(record)
    there["rows"] = record["rows"]
    if num_rows is not None:
        here["rows"] = num_rows
    for name in (name for name in here if name in there):
        if here[name] != there[name]:
            return f"{name} {reprlib.repr(there[name])} there and {reprlib.repr(here[name])} here"
    return None


def _compared(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name what makes two runs of one task the same, from a record or facts as JSON."""
    (task,) = run["tasks"]
    found = {"input": run["input"], **{name: task[name] for name in ("task", "model_digest")}}
    for name, value in task["settings"].items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def record_of(
    facts: Mapping[str, Any],
    *,
    num_shards: int,
    prefixes: Sequence[str],
    summaries: Sequence[Summary],
    ledger: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the record of a finished job.

    Args:
        facts: The result of `facts_of`.
        num_shards: The number of output shards.
        prefixes: The prefix of each task's result columns, in the order of the facts.
        summaries: The result summary of each task.
        ledger: Events, each with the `tag` of a task: `counts` of requests, or a sample of its
            engine as `pulse`.
    """
    counts: list[Counter[str]] = [Counter() for _ in summaries]
    pulses: list[list[Any]] = [[] for _ in summaries]
    for told in ledger:
        if "pulse" in told:
            pulses[told["tag"]].append(told["pulse"])
        else:
            counts[told["tag"]].update(told["counts"])
    tasks = [
        {**task, "prefix": prefix, **count, "results": _results(task, summary)}
        for task, prefix, count, summary in zip(
            facts["tasks"], prefixes, counts, summaries, strict=True
        )
    ]
    every = list(itertools.chain.from_iterable(pulses))
    return {
        **facts,
        "seconds": _seconds_since(facts["started"]),
        "rows": max((summary.rows for summary in summaries), default=0),
        "shards": num_shards,
        "tasks": tasks,
        "processors": sorted({f"{p['device']}: {p['processor']}" for p in every}),
        "engines": len({pulse["engine"] for pulse in every}),
        "first_row_secs": sorted(
            {p["engine"]: secs for p in every if (secs := p["first_row_secs"]) is not None}.values()
        ),
        "timelines": [timeline(own) for own in pulses],
    }


def _results(task: Mapping[str, Any], summary: Summary) -> dict[str, Any]:
    """Return a summary as a dict, with label names from the settings."""
    results = summary.as_dict()
    if names := task["settings"].get("labels"):
        results["labels"] = {names[int(i)]: count for i, count in results["labels"].items()}
    return results


def _seconds_since(started: str) -> float:
    """Return the time since the launch, which another machine's clock may have told.

    Clocks of two machines differ, and one clock may be set back, so that no monotonic clock spans a
    job. A launch in the future counts as one just now.
    """
    return round(max(0.0, time.time() - datetime.fromisoformat(started).timestamp()), 3)


def _without_rows(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the number and a hash of the shots, which are rows, in their place."""
    shots = settings.pop("shots", None)
    if not shots:
        return settings
    content = json.dumps(shots, sort_keys=True).encode()
    return {
        **settings,
        "num_shots": len(shots),
        "shots_sha256": hashlib.sha256(content).hexdigest(),
    }


def _as_json(value: Any) -> Any:
    """Return a setting as a JSON value; values without a JSON form become text."""
    if dataclasses.is_dataclass(value):
        return {f.name: _as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
