"""Report: one page from the record alone, with nothing of the rows in it unless they are given."""

import copy
import itertools
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.monitoring.html_report import MAX_BINS, bins_of, render
from beam_gemma.monitoring.result_summary import Summary, length_bin
from beam_gemma.monitoring.timeline import COLUMNS, GPU_SECS, timeline

SUMMARY = Summary(
    rows=1200,
    failed=200,
    prompt_tokens=34_567,
    completion_tokens=7_654,
    prompt_lengths=Counter({30: 900, 31: 100}),
    completion_lengths=Counter({5: 600, 16: 400}),
    finish_reasons=Counter(stop=600, length=400),
    reasons=Counter({"prompt: expected <b> tokens, got N": 150, "other": 30}),
)
RECORD = {
    "format": 1,
    "tool": "beam-gemma 1.2.3",
    "packages": {"python": "3.11.7", "onnxruntime": "9.8.7"},
    "command": ["python", "-m", "pipelines.generate", "--prompt", "Say {text}"],
    "input": "in.parquet",
    "output": "out/rows.parquet",
    "started": "2026-01-02T03:04:05.678+00:00",
    "seconds": 83.2,
    "rows": 1200,
    "shards": 3,
    "tasks": [
        {
            "task": "generate",
            "model": "models/gemma-tiny",
            "model_digest": "abc123",
            "settings": {
                "prompt": "Say {text}",
                "truncate": None,
                "sampling": {"max_tokens": 16, "temperature": 0.0},
                "shots": [{"row": {"text": "secret"}, "label": 0}],
            },
            "prefix": "",
            "requests": 1100,
            "duplicate_rows": 90,
            "resumed_rows": 10,
            "results": SUMMARY.as_dict(),
        }
    ],
    "processors": ["cpu: abacus"],
    "engines": 1,
    "timelines": [
        {
            "seconds": [0, 1, 2],
            "prompt_tokens": [0, 100, 100],
            "cached_tokens": [0, 5, 50],
            "completion_tokens": [0, 10, 30],
            "used_slots": [0, 50, 60],
            "slots": [0, 50, 100],
        }
    ],
}
FIGURES = (*COLUMNS, GPU_SECS)
VOID = {"meta", "br", "rect", "line", "polygon", "polyline"}


class Page(HTMLParser):
    """Collects the text of a page, and checks that its elements are closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.tags = [], [], Counter()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, _):
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, _):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def text_of(record, rows=()):
    return " ".join(" ".join(Page(render(record, rows)).text).split())


def changed(**changes):
    return {**copy.deepcopy(RECORD), **changes}


def task(name, summary, prefix=""):
    changes = {"task": name, "prefix": prefix, "settings": {}, "results": summary.as_dict()}
    return RECORD["tasks"][0] | changes


def test_page_shows_the_figures_of_a_record():
    text = text_of(RECORD)
    for words in (
        "Generate with gemma-tiny",
        "in.parquet → out/rows.parquet",
        "2 January 2026, 03:04 UTC",
        "rows 1,200",
        "failed 200",
        "34,567",
        "7,654",
        "1 min 23 s",
        "90 rows asked what others ask, 10 rows were done by an earlier run, 50 prompt tokens",
        "New tokens computed per second",
        "Slots of each step in use",
        "stop 600 50.0 %",
        "prompt: expected <b> tokens, got N 150 75.0 %",
        "other reasons 20 10.0 %",
        "max_tokens 16 temperature 0.0",
        "onnxruntime 9.8.7",
        "abc123",
        "python -m pipelines.generate --prompt 'Say {text}'",
    ):
        assert words in text


def test_page_loads_nothing_from_elsewhere():
    page = render(RECORD)
    assert not re.search(r"https?:|src=|href=|url\(|@import", page)
    tags = Page(page).tags
    assert not {"script", "link", "img", "iframe"} & set(tags)
    assert tags["svg"] == 5


def test_rows_are_shown_only_if_they_are_given():
    assert "secret" not in render(RECORD)
    rows = [{"text": "<secret>", "completion": "x" * 1000}]
    text = text_of(RECORD, rows)
    assert "<secret>" in text
    assert "x" * 400 in text
    assert "x" * 401 not in text
    assert "<secret>" not in render(RECORD, rows)


def test_page_of_several_tasks_shows_each_under_its_prefix():
    tasks = [
        task("generate", SUMMARY, "gist_"),
        task("classify", Summary(rows=1200, labels=Counter({" good": 900, " bad": 300})), "l_"),
        task("embed", Summary(rows=1200, prompt_tokens=5, prompt_lengths=Counter({5: 1200})), "e_"),
    ]
    (line,) = RECORD["timelines"]
    text = text_of(changed(tasks=tasks, timelines=[line, timeline([]), line]))
    for words in (
        "rows 1,200 failed generate gist_… 200 failed classify l_… 0 failed embed e_… 0",
        "Generate gist_…: over time",
        "Generate gist_…: failed rows prompt: expected",
        "Embed e_…: over time",
        "Classify l_…: rows Labels",
    ):
        assert words in text
    assert "Classify l_…: over time" not in text
    assert text.count("Slots of each step in use") == 2
    assert "Generate, classify, embed with gemma-tiny " in text
    assert "good 900 75.0 %" in text


def test_a_run_without_an_engine_has_no_charts_of_time():
    record = changed(
        timelines=[timeline([])], processors=[], tasks=[task("embed", Summary())], rows=0
    )
    text = text_of(record)
    assert "Over time" not in text
    assert "none was needed" in text


@pytest.mark.parametrize("seconds", [[0.0, 0.0], [0.0, 1.0]])
def test_chart_over_time_of_a_run_of_at_most_a_second(seconds):
    record = changed(timelines=[{"seconds": seconds, **{name: [3, 5] for name in FIGURES}}])
    assert "tokens computed per second" in text_of(record)


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=50))
def test_bins_hold_every_row_once(lengths):
    bins = bins_of(Counter(map(length_bin, lengths)))
    assert sum(b.number for b in bins) == len(lengths)
    assert 1 <= len(bins) <= MAX_BINS
    for this, following in itertools.pairwise(bins):
        assert this.end == following.first
    for this in bins:
        end = 10**6 if this.end is None else this.end
        assert this.number == sum(this.first <= length < end for length in lengths)


def test_the_last_bin_takes_what_is_far_out():
    assert bins_of(Counter({10: 500, 11: 500, 9000: 3}))[-1] == (11, None, 503)
    assert "last bar: ≥ 11" in render(
        changed(tasks=[task("embed", Summary(prompt_lengths=Counter({10: 500, 11: 500, 9000: 3})))])
    )


GPU_LINE = {
    "used_cache": [0, 30, 130],
    "cache": [0, 100, 300],
    "busy_secs": [0.0, 0.5, 1.4],
    "gpu_secs": [0.0, 1.0, 2.0],
    "steps": [0, 10, 1110],
    "replays": [0, 0, 1000],
    "graphs": [0, 1, 2],
    "used_mib": [0, 20_480, 30_720],
    "total_mib": [0, 40_960, 40_960],
}


def heights_of(record):
    """The values of each chart over time, by its title, from the height of its line."""
    charts = re.findall(r"<h3>([^<]*)</h3>(<svg.*?</svg>)", render(record))
    found = {}
    for title, svg in charts:
        if line := re.search(r'polyline class="line" points="([^"]*)"', svg):
            points = line[1].split()
            found[title] = [round(100 * (124 - float(p.split(",")[1])) / 114) for p in points[::2]]
    return found


def test_page_shows_the_figures_of_a_gpu():
    (line,) = RECORD["timelines"]
    record = changed(timelines=[line | GPU_LINE], first_row_secs=[12.5, 70.0])
    text = text_of(record)
    assert (
        "GPU busy 70.0 % of the time; 30.0 of 40.0 GiB of memory in use at the end; "
        "1,000 of 1,110 steps replayed 2 captured graphs"
    ) in text
    assert "process start to first row 12.5 to 1 min 10 s" in text
    heights = heights_of(record)
    assert heights["Cache in use, percent"] == [30, 50]
    assert heights["GPU busy, percent of the time"] == [50, 90]
    assert heights["GPU steps that replayed a captured graph, percent"] == [0, 91]
    assert heights["GPU memory in use, percent"] == [50, 75]


def test_page_without_a_gpu_has_no_gpu_figures():
    (line,) = RECORD["timelines"]
    zeros = {name: [0, 0, 0] for name in GPU_LINE}
    cache = {name: GPU_LINE[name] for name in ("used_cache", "cache")}
    text = text_of(changed(timelines=[line | zeros | cache], first_row_secs=[3.1]))
    assert "GPU" not in text
    assert "Cache in use" in text
    assert "process start to first row 3.1 s" in text


def test_gpu_figures_name_the_task_they_belong_to():
    (line,) = RECORD["timelines"]
    tasks = [task("generate", SUMMARY, "a_"), task("classify", SUMMARY, "b_")]
    text = text_of(changed(tasks=tasks, timelines=[line, line | GPU_LINE]))
    assert "GPU classify b_… busy 70.0 %" in text
    assert text.count("GPU busy, percent of the time") == 1
