"""HTML report of a run, rendered from its record: one file without scripts or network access.

The report contains data from the table's rows only if rows are passed to `render`.
"""

import itertools
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

import jinja2

from beam_gemma.monitoring import charts
from beam_gemma.monitoring.charts import Bin, Chart, Number, duration, histogram, over_time
from beam_gemma.monitoring.result_summary import Summary, bin_width

MAX_BINS = 36
"""Most bins of a histogram."""
MAIN_PART = 0.99
"""Share of rows, shortest first, that get regular bins; longer rows go to the last bin."""
SHOWN_REASONS = 20
SHOWN_LABELS = 40
SHOWN_CHARS = 400
"""Most characters shown of one value in a row."""
Timeline: TypeAlias = Mapping[str, Sequence[Number]]
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("beam_gemma.monitoring", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the report as an HTML page.

    Args:
        record: Run record from `run_record.record_of`.
        rows: Output rows to show, values cut to `SHOWN_CHARS`; by default none are shown.
    """
    jobs = ", ".join(task["task"] for task in record["tasks"]).capitalize()
    title = f"{jobs} with {', '.join(dict.fromkeys(map(_model, record['tasks'])))}"
    started = datetime.fromisoformat(record["started"])
    return _ENVIRONMENT.get_template("report.html.jinja").render(
        charts=charts,
        command=shlex.join(record["command"]),
        facts=_facts(record),
        figures=_figures(record),
        record=record,
        rows=[{name: str(value)[:SHOWN_CHARS] for name, value in row.items()} for row in rows],
        started=f"{started:%-d %B %Y, %H:%M} {started.tzname()}",
        tasks=[*map(_task, _names(record), record["tasks"], record["timelines"])],
        title=title,
    )


def _names(record: Mapping[str, Any]) -> list[str]:
    """Return a name per task: empty for a single task, else its kind and column prefix."""
    if len(record["tasks"]) == 1:
        return [""]
    return [f"{task['task']} {task['prefix']}…" for task in record["tasks"]]


def _figures(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the name, value and CSS class of each key figure of the run."""
    summaries = [Summary.from_dict(task["results"]) for task in record["tasks"]]
    total = sum(summaries, Summary())
    secs = record["seconds"]
    computed = sum(
        _last(line[name])
        for line in record["timelines"]
        for name in ("prompt_tokens", "completion_tokens")
    )
    num_new_tokens = total.thinking_tokens + total.completion_tokens
    figures = [
        ("rows", f"{record['rows']:,}", ""),
        *(
            (f"failed {name}".strip(), f"{summary.failed:,}", "bad" if summary.failed else "")
            for name, summary in zip(_names(record), summaries, strict=True)
        ),
        ("prompt tokens", f"{total.prompt_tokens:,}", ""),
        ("new tokens", f"{num_new_tokens:,}", ""),
        ("from start to end", duration(round(secs, 1) if secs < 60 else secs), ""),
        ("tokens/s computed", f"{computed / secs:,.0f}" if secs else "unknown", ""),
    ]
    if not num_new_tokens:
        del figures[-3]
    return figures


def _timeline(line: Timeline) -> list[tuple[str, Chart]]:
    """Return the title and chart of each quantity that was measured over time."""
    seconds = line["seconds"]
    spans = [max(end - start, 1e-9) for start, end in itertools.pairwise(seconds)]
    found = []
    for name, title in (("prompt_tokens", "Prompt"), ("completion_tokens", "New")):
        rates = [new / secs for new, secs in zip(_steps(line[name]), spans, strict=True)]
        if any(rates):
            chart = over_time(seconds, rates, unit="tokens/s", top=1)
            found.append((f"{title} tokens computed per second", chart))
    for used, whole, title in (
        ("used_slots", "slots", "Slots of each step in use, percent"),
        ("used_cache", "cache", "Cache in use, percent"),
        ("busy_secs", "gpu_secs", "GPU busy, percent of the time"),
        ("replays", "steps", "GPU steps that replayed a captured graph, percent"),
    ):
        found += _shares(title, seconds, _steps(line.get(used, [])), _steps(line.get(whole, [])))
    used_mib, total_mib = (line.get(name, [])[1:] for name in ("used_mib", "total_mib"))
    return found + _shares("GPU memory in use, percent", seconds, used_mib, total_mib)


def _shares(
    title: str, seconds: Sequence[Number], used: Sequence[Number], whole: Sequence[Number]
) -> list[tuple[str, Chart]]:
    """Return a chart of the used share per time step, or nothing if there was no capacity."""
    if not any(whole):
        return []
    shares = [100 * u / w if w else 0.0 for u, w in zip(used, whole, strict=True)]
    return [(title, over_time(seconds, shares, unit="percent", top=100))]


def _last(totals: Sequence[Number]) -> Number:
    return totals[-1] if totals else 0


def _steps(totals: Sequence[Number]) -> list[Number]:
    return [after - before for before, after in itertools.pairwise(totals)]


def _task(name: str, task: Mapping[str, Any], line: Timeline) -> dict[str, Any]:
    """Return what the template shows of one task."""
    summary = Summary.from_dict(task["results"])
    lengths = (("prompts", summary.prompt_lengths), ("completions", summary.completion_lengths))
    counts = (("Ends of completions", summary.finish_reasons), ("Labels", summary.labels))
    savings = {
        "rows asked what others ask": task.get("duplicate_rows", 0),
        "rows were done by an earlier run": task.get("resumed_rows", 0),
        "prompt tokens were in the cache": _last(line["cached_tokens"]),
    }
    reasons = summary.reasons.most_common(SHOWN_REASONS)
    if others := summary.failed - sum(number for _, number in reasons):
        reasons.append(("other reasons", others))
    return {
        "name": name,
        "rows": summary.rows,
        "failed": summary.failed,
        "timeline": _timeline(line),
        "savings": [f"{number:,} {what}" for what, number in savings.items() if number],
        "lengths": [_lengths(what, found) for what, found in lengths if found],
        "counts": [(title, found.most_common(SHOWN_LABELS)) for title, found in counts if found],
        "reasons": reasons,
    }


def _lengths(what: str, lengths: Counter[int]) -> tuple[str, Chart]:
    bins = bins_of(lengths)
    title = f"Tokens of {what}"
    if bins[-1].end is None:
        title += f" (last bar: ≥ {bins[-1].first:,})"
    return title, histogram(bins, unit="tokens", counted="rows")


def bins_of(lengths: Counter[int]) -> list[Bin]:
    """Return at most `MAX_BINS` adjoining bins of one width; the last includes all longer rows.

    Args:
        lengths: Counts of a `Summary`, keyed by the smallest length of each of its bins. The
            returned bins end at bounds of those bins.
    """
    ordered = sorted(lengths)
    so_far = itertools.accumulate(lengths[length] for length in ordered)
    enough = MAIN_PART * lengths.total()
    top = next(length for length, n in zip(ordered, so_far, strict=True) if n >= enough)
    width = bin_width(top)
    while top // width - ordered[0] // width >= MAX_BINS:
        width *= 2
    firsts = range(ordered[0] // width * width, top + 1, width)
    counts: Counter[int] = Counter()
    for length, count in lengths.items():
        counts[min(length // width * width, firsts[-1])] += count
    is_open = ordered[-1] >= firsts[-1] + width
    return [
        Bin(first, None if is_open and first == firsts[-1] else first + width, counts[first])
        for first in firsts
    ]


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the name and value of each fact about the run."""
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    facts = [
        ("tool", record["tool"]),
        ("packages", packages),
        ("processors", "; ".join(record["processors"]) or "none was needed"),
        ("engines", f"{record['engines']:,}"),
        *_starts(record.get("first_row_secs", [])),
        *_gpus(record),
        ("shards", f"{record['shards']:,}"),
    ]
    for task in record["tasks"]:
        facts += [("model", task["model"]), ("digest of the model", task["model_digest"])]
        facts += _settings(task["settings"])
    return facts


def _starts(secs: Sequence[Number]) -> list[tuple[str, str]]:
    """Return the range of times from process start to first row, over all engines."""
    if not secs:
        return []
    span = duration(secs[0]) if secs[0] == secs[-1] else f"{secs[0]:g} to {duration(secs[-1])}"
    return [("process start to first row", span)]


def _gpus(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return GPU usage of each task that ran on a GPU."""
    facts = []
    for name, line in zip(_names(record), record["timelines"], strict=True):
        if not any(line.get("total_mib", [])):
            continue
        last = {key: _last(totals) for key, totals in line.items()}
        told = (
            f"busy {100 * last['busy_secs'] / max(last['gpu_secs'], 1e-9):.1f} % of the time; "
            f"{last['used_mib'] / 1024:,.1f} of {last['total_mib'] / 1024:,.1f} GiB of memory in "
            f"use at the end; {last['replays']:,} of {last['steps']:,} steps replayed "
            f"{last['graphs']:,} captured graphs"
        )
        facts.append((f"GPU {name}".strip(), told))
    return facts


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the settings with a value.

    Shots are rows, which records of version 0.7.0 have in full; only their count is shown.
    """
    facts: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            facts += _settings(value)
        elif name == "shots" and value:
            facts.append((name, f"{len(value):,}"))
        elif value is not None and value is not False and value not in ([], ""):
            facts.append((name, str(value)))
    return facts


def _model(task: Mapping[str, Any]) -> str:
    return str(task["model"]).rstrip("/").rpartition("/")[2]
