"""Build the record of a run: settings, models, versions, results, and the command to repeat it.

The record is JSON and holds no row contents apart from the job's own templates and shots.
"""

import dataclasses
import hashlib
import itertools
import json
import platform
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import beam_gemma
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
        command: The shell command that repeats the job, as a list of words.
        source: URI of the table that is read.
        sink: URI of the table that is written.
        tasks: The model location, model artifact and settings of each task.
    """
    return {
        "format": FORMAT,
        "tool": f"beam-gemma {beam_gemma.__version__}",
        "packages": {"python": platform.python_version(), **installed(PACKAGES)},
        "command": list(command),
        "input": source,
        "output": sink,
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "tasks": [
            {
                "task": task_name(settings),
                "model": model,
                "model_digest": artifact.digest,
                "settings": _as_json(settings),
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
        "seconds": round(time.time() - datetime.fromisoformat(facts["started"]).timestamp(), 3),
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


def _as_json(value: Any) -> Any:
    """Return a setting as a JSON value; values without a JSON form become text."""
    if dataclasses.is_dataclass(value):
        return {f.name: _as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
