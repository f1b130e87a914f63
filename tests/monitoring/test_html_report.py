"""Report: one page from the record alone, with nothing of the rows in it unless they are given."""

import copy
import itertools
import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser

import jinja2
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


def charts_of(record):
    """The SVG charts of a page, by title."""
    charts = re.findall(r"<h3>([^<]*)</h3>(<svg.*?</svg>)", render(record), re.DOTALL)
    return {title: ET.fromstring(svg) for title, svg in charts}


def points_of(shape):
    return [tuple(map(float, point.split(","))) for point in shape.get("points").split()]


def heights_of(record):
    """The values of each chart over time, by its title, from the height of its line."""
    return {
        title: [round(100 * (124 - y) / 114) for _, y in points_of(line)[::2]]
        for title, svg in charts_of(record).items()
        if (line := svg.find("polyline")) is not None
    }


def test_bars_are_drawn_as_high_as_their_numbers():
    svg = charts_of(RECORD)["Tokens of prompts"]
    bars = [(float(rect.get("y")), float(rect.get("height"))) for rect in svg.iter("rect")]
    assert bars[0][1] == pytest.approx(9 * bars[1][1], abs=0.5)
    assert [y + height for y, height in bars] == pytest.approx([124, 124])
    assert [title.text for title in svg.iter("title")] == [
        "30 tokens: 900 rows",
        "31 tokens: 100 rows",
    ]


def test_an_area_is_drawn_from_its_line_to_zero():
    charts = [svg for svg in charts_of(RECORD).values() if svg.find("polyline") is not None]
    assert len(charts) == 3
    for svg in charts:
        line = points_of(svg.find("polyline"))
        assert points_of(svg.find("polygon")) == [(42, 124), *line, (322, 124)]


def test_names_of_bars_are_text():
    labels = Summary(rows=4, labels=Counter({"<b>a & b</b>": 1, "c": 3}))
    page = render(changed(tasks=[task("classify", labels)]))
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in page
    assert "width:25.00%" in page
    assert "75.0 %" in page


def page_full_of(word):
    """A page with a word wherever a record or a row has text."""
    counts = {name: Counter({word: 1}) for name in ("finish_reasons", "labels", "reasons")}
    settings = {word: word, "prompt": f"{word}\n", "sampling": {word: word}, "stop": [word]}
    said = task(word, Summary(rows=2, failed=1, **counts), prefix=word)
    said |= {"model": word, "model_digest": word, "settings": settings}
    record = changed(
        tool=word,
        packages={word: word},
        command=[word],
        input=word,
        output=word,
        tasks=[said, said],
        processors=[word],
        timelines=[RECORD["timelines"][0] | GPU_LINE] * 2,
    )
    return Page(render(record, [{word: word}]))


def test_markup_in_a_record_is_shown_as_text():
    markup, plain = '<script>"&amp;', "[plain]"
    page, same = page_full_of(markup), page_full_of(plain)
    assert page.tags == same.tags
    assert "".join(page.text).replace(markup, plain) == "".join(same.text)
    assert "".join(page.text).count(markup) > 40


def test_a_run_of_no_time_has_no_speed():
    text = text_of(changed(seconds=0))
    assert "from start to end 0 s tokens/s computed unknown" in text


def test_shots_are_shown_as_their_number_and_hash():
    settings = {"num_shots": 8, "shots_sha256": "c0ffee"}
    tasks = [RECORD["tasks"][0] | {"settings": settings}]
    assert "num_shots 8 shots_sha256 c0ffee" in text_of(changed(tasks=tasks))


def test_record_without_a_field_of_the_template_is_refused():
    record = {name: value for name, value in RECORD.items() if name != "input"}
    with pytest.raises(jinja2.UndefinedError, match="no attribute 'input'"):
        render(record)


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
