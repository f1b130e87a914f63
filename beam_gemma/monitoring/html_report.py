"""HTML report of a run, rendered from its record: one file without scripts or network access.

The report contains data from the table's rows only if rows are passed to `render`.
"""

import html
import itertools
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from beam_gemma.monitoring.charts import Bin, Number, bars, duration, histogram, over_time
from beam_gemma.monitoring.result_summary import Summary, bin_width

MAX_BINS = 36
"""Most bins of a histogram."""
MAIN_PART = 0.99
"""Share of rows, shortest first, that get regular bins; longer rows go to the last bin."""
SHOWN_REASONS = 20
SHOWN_LABELS = 40
SHOWN_CHARS = 400
"""Most characters shown of one value in a row."""
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2127; --faint: #667080;
  --rule: #dde1e7; --fill: #3f6fb5; --bad: #b3372b; --tint: #f4f6f9 }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e7eb;
  --faint: #98a1ad; --rule: #333941; --fill: #7aa5e2; --bad: #ee8378; --tint: #1d2126 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 64rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums }
h1 + p { margin-top: .3rem }
h1 { margin: 0; font-size: 1.7rem; font-weight: 650; letter-spacing: -.015em }
h2 { margin: 2.8rem 0 .9rem; padding-top: .9rem; border-top: 1px solid var(--rule);
  font-size: 1.15rem; font-weight: 620 }
h3 { margin: 0 0 .4rem; font-size: .85rem; font-weight: 600; color: var(--faint) }
p { margin: 1rem 0 0; max-width: 46rem } .faint { color: var(--faint); overflow-wrap: anywhere }
.figures { display: flex; flex-wrap: wrap; gap: 1.2rem 2.6rem; margin: 1.8rem 0 0; padding: 0 }
.figures div { display: flex; flex-direction: column-reverse }
.figures dt { color: var(--faint); font-size: .85rem }
.figures dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.25 }
.figures .bad { color: var(--bad) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr));
  gap: 1.8rem 2.2rem }
figure { margin: 0; min-width: 0 }
svg { display: block; width: 100%; overflow: visible }
svg text { fill: var(--faint); font-size: 11px }
.grid { stroke: var(--rule) } .bar { fill: var(--fill) } g:hover .bar { opacity: .7 }
.area { fill: var(--fill); opacity: .22 } .line { fill: none; stroke: var(--fill);
  stroke-width: 1.5; stroke-linejoin: round }
table { width: 100%; border-collapse: collapse }
th { font-weight: 400; text-align: left } td, th { padding: .25rem .8rem .25rem 0;
  vertical-align: top; overflow-wrap: anywhere }
.bars th { width: 40% } .reasons th { width: 65% }
.share { vertical-align: middle } .share i { display: block; height: .7rem; min-width: 1px;
  border-radius: 1px; background: var(--fill) } .reasons i { background: var(--bad) }
.number { width: 1%; padding: .25rem 0 .25rem .6rem; text-align: right; white-space: nowrap }
.facts th { width: 13rem; color: var(--faint) }
pre { margin: 0; padding: .5rem .7rem; border-radius: 4px; background: var(--tint);
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere }
.rows { overflow-x: auto } .rows td { min-width: 8rem; border-top: 1px solid var(--rule) }
.rows th { font-weight: 600 }
"""


def render(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the report as an HTML page.

    Args:
        record: Run record from `run_record.record_of`.
        rows: Output rows to show, values cut to `SHOWN_CHARS`; by default none are shown.
    """
    jobs = ", ".join(task["task"] for task in record["tasks"]).capitalize()
    title = f"{jobs} with {', '.join(dict.fromkeys(map(_model, record['tasks'])))}"
    started = datetime.fromisoformat(record["started"])
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="faint">{_text(record["input"])} → {_text(record["output"])}<br>'
        f"{started:%-d %B %Y, %H:%M} {started.tzname()}</p>",
        _figures(record),
        *map(_task, _names(record), record["tasks"], record["timelines"]),
        _section("The run", _run(record)),
        _section("First rows", _rows(rows)) if rows else "",
    ]
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def _names(record: Mapping[str, Any]) -> list[str]:
    """Return a name per task: empty for a single task, else its kind and column prefix."""
    if len(record["tasks"]) == 1:
        return [""]
    return [f"{task['task']} {task['prefix']}…" for task in record["tasks"]]


def _figures(record: Mapping[str, Any]) -> str:
    """Return the key figures of the run."""
    summaries = [Summary.from_dict(task["results"]) for task in record["tasks"]]
    total = sum(summaries, Summary())
    secs = record["seconds"]
    computed = sum(
        _last(line[name])
        for line in record["timelines"]
        for name in ("prompt_tokens", "completion_tokens")
    )
    figures = [
        ("rows", f"{record['rows']:,}", ""),
        *(
            (f"failed {name}".strip(), f"{summary.failed:,}", "bad" if summary.failed else "")
            for name, summary in zip(_names(record), summaries, strict=True)
        ),
        ("prompt tokens", f"{total.prompt_tokens:,}", ""),
        ("new tokens", f"{total.completion_tokens:,}", ""),
        ("from start to end", duration(round(secs, 1) if secs < 60 else secs), ""),
        ("tokens/s computed", f"{computed / max(secs, 1e-9):,.0f}", ""),
    ]
    if not total.completion_tokens:
        del figures[-3]
    return (
        '<dl class="figures">'
        + "".join(
            f'<div><dt>{name}</dt><dd class="{kind}">{value}</dd></div>'
            for name, value, kind in figures
        )
        + "</dl>"
    )


def _savings(task: Mapping[str, Any], cached: Number) -> str:
    """Return a sentence about the rows and tokens that did not need to be computed."""
    parts = [
        f"{number:,} {what}"
        for number, what in (
            (task.get("duplicate_rows", 0), "rows asked what others ask"),
            (task.get("resumed_rows", 0), "rows were done by an earlier run"),
            (cached, "prompt tokens were in the cache"),
        )
        if number
    ]
    return f"<p>Not computed: {', '.join(parts)}.</p>" if parts else ""


def _timeline(line: Mapping[str, Sequence[Number]]) -> list[tuple[str, str]]:
    """Return the title and chart of each quantity that was measured over time."""
    seconds = line["seconds"]
    spans = [max(end - start, 1e-9) for start, end in itertools.pairwise(seconds)]
    charts = []
    for name, title in (("prompt_tokens", "Prompt"), ("completion_tokens", "New")):
        rates = [new / secs for new, secs in zip(_steps(line[name]), spans, strict=True)]
        if any(rates):
            chart = over_time(seconds, rates, unit="tokens/s", top=1)
            charts.append((f"{title} tokens computed per second", chart))
    for used, whole, title in (
        ("used_slots", "slots", "Slots of each step in use, percent"),
        ("used_cache", "cache", "Cache in use, percent"),
        ("busy_secs", "gpu_secs", "GPU busy, percent of the time"),
        ("replays", "steps", "GPU steps that replayed a captured graph, percent"),
    ):
        charts += _shares(title, seconds, _steps(line.get(used, [])), _steps(line.get(whole, [])))
    used_mib, total_mib = (line.get(name, [])[1:] for name in ("used_mib", "total_mib"))
    return charts + _shares("GPU memory in use, percent", seconds, used_mib, total_mib)


def _shares(
    title: str, seconds: Sequence[Number], used: Sequence[Number], whole: Sequence[Number]
) -> list[tuple[str, str]]:
    """Return a chart of the used share per time step, or nothing if there was no capacity."""
    if not any(whole):
        return []
    shares = [100 * u / w if w else 0.0 for u, w in zip(used, whole, strict=True)]
    return [(title, over_time(seconds, shares, unit="percent", top=100))]


def _last(totals: Sequence[Number]) -> Number:
    return totals[-1] if totals else 0


def _steps(totals: Sequence[Number]) -> list[Number]:
    return [after - before for before, after in itertools.pairwise(totals)]


def _task(name: str, task: Mapping[str, Any], line: Mapping[str, Sequence[Number]]) -> str:
    """Return the report's sections for one task."""
    summary = Summary.from_dict(task["results"])
    charts = [
        _lengths(what, lengths)
        for what, lengths in (
            ("prompts", summary.prompt_lengths),
            ("completions", summary.completion_lengths),
        )
        if lengths
    ]
    for title, counts in (
        ("Ends of completions", summary.finish_reasons),
        ("Labels", summary.labels),
    ):
        if counts:
            charts.append((title, bars(counts.most_common(SHOWN_LABELS), summary.rows)))
    parts = [
        _section(_title(name, "over time"), _charts(_timeline(line))),
        _savings(task, _last(line["cached_tokens"])),
        _section(_title(name, "rows"), _charts(charts)),
    ]
    if summary.failed:
        reasons = summary.reasons.most_common(SHOWN_REASONS)
        others = summary.failed - sum(count for _, count in reasons)
        if others:
            reasons.append(("other reasons", others))
        parts.append(
            _section(_title(name, "failed rows"), bars(reasons, summary.failed, kind="reasons"))
        )
    return "".join(parts)


def _title(name: str, what: str) -> str:
    words = f"{name}: {what}" if name else what
    return words[0].upper() + words[1:]


def _lengths(what: str, lengths: Counter[int]) -> tuple[str, str]:
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


def _run(record: Mapping[str, Any]) -> str:
    """Return the facts and the command needed to run the job again."""
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
    rows = [f"<tr><th>{_text(name)}</th><td>{_value(value)}</td></tr>" for name, value in facts]
    command = f"<pre>{_text(shlex.join(record['command']))}</pre>"
    return f'<table class="facts">{"".join(rows)}</table><h2>Run again</h2>{command}'


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
    """Return the settings with a value; shots contain rows, so only their count is shown."""
    facts: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            facts += _settings(value)
        elif name == "shots" and value:
            facts.append((name, f"{len(value):,}"))
        elif value is not None and value is not False and value not in ([], ""):
            facts.append((name, str(value)))
    return facts


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as an HTML table."""
    head = "".join(f"<th>{_text(name)}</th>" for name in rows[0])
    lines = "".join(
        f"<tr>{''.join(f'<td>{_text(str(v)[:SHOWN_CHARS])}</td>' for v in row.values())}</tr>"
        for row in rows
    )
    return f'<div class="rows"><table><tr>{head}</tr>{lines}</table></div>'


def _charts(charts: Iterable[tuple[str, str]]) -> str:
    figures = "".join(f"<figure><h3>{_text(t)}</h3>{chart}</figure>" for t, chart in charts)
    return f'<div class="charts">{figures}</div>' if figures else ""


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>{content}" if content else ""


def _model(task: Mapping[str, Any]) -> str:
    return str(task["model"]).rstrip("/").rpartition("/")[2]


def _value(value: str) -> str:
    return f"<pre>{_text(value)}</pre>" if "\n" in value else _text(value)


def _text(value: str) -> str:
    return html.escape(value)
