"""The example files: the table is what its script writes, and the template fits the table."""

import datetime
import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq

from beam_gemma.inputs.row import as_text
from beam_gemma.inputs.template import Template
from beam_gemma.inputs.tools import checked_tools
from beam_gemma.structured.grammar import to_regex
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.structured.tool_grammar import END, QUOTE, START, calls_language
from examples import demo
from examples.make_articles import FOLDER, SCHEMA, rows
from examples.picture import draw_completions, draw_map, draw_scores, draw_values

TABLE = pq.read_table(FOLDER / "articles.parquet")


def test_the_table_is_what_the_script_writes() -> None:
    articles = tomllib.loads((FOLDER / "articles.toml").read_text(encoding="utf-8"))["article"]
    assert pa.Table.from_pylist(rows(articles), schema=SCHEMA).equals(TABLE)


def test_the_table_has_every_kind_of_row() -> None:
    languages = TABLE["language"].to_pylist()
    assert TABLE.num_rows >= 64
    assert sum(language != "en" for language in languages) >= 16
    assert 0 < TABLE["rating"].null_count < TABLE.num_rows


def test_the_template_takes_every_row() -> None:
    template = Template((FOLDER / "keywords.txt").read_text(encoding="utf-8").rstrip(), ())
    assert template.fields == ("title", "body")
    for row in TABLE.to_pylist():
        assert template.render(row)


def test_the_sales_and_those_of_the_prompt_are_of_their_schema() -> None:
    schema = json.loads((FOLDER / "sales.schema.json").read_text())
    prompt = (FOLDER / "sales.txt").read_text(encoding="utf-8").rstrip()
    rows = [json.loads(line) for line in (FOLDER / "sales.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(24))
    template = Template(prompt, ())
    assert template.fields == ("text",)
    shots = as_text(template.render({"text": ""})).split("\n\n")[:-1]
    assert len(shots) == 7
    language = StructuredOutput(json_schema=schema).language
    for shot in shots:
        # In the very form that completions have.
        assert re.fullmatch(to_regex(language), shot.partition("Sale:")[2])
    for row in rows:
        jsonschema.validate(row["truth"], schema)
        assert list(row["truth"]) == list(schema["properties"])
        assert row["text"] not in prompt


def test_the_picture_of_values_marks_the_wrong_ones(tmp_path: Path) -> None:
    truth = pa.struct({"day": pa.string(), "name": pa.string()})
    day = datetime.date(2025, 3, 4)
    table = pa.table({
        "id": [1, 2, 3],
        "text": ["<b>one</b>", "two", "three"],
        "truth": pa.array([("2025-03-04", "a"), ("2025-03-05", None), ("2025-03-06", "c")], truth),
        "day": pa.array([day, day, None], pa.date32()),
        "name": ["a", "x&y", None],
        "error": [None, None, "prompt: too long"],
    })  # fmt: skip
    draw_values(table, "truth", tmp_path / "picture.html")
    page = (tmp_path / "picture.html").read_text()
    assert "3 rows, 1 with an error; of 3 right: day 1, name 1" in page
    assert "<th>day<br>date32[day]</th><th>name<br>string</th>" in page
    assert "<td>&lt;b&gt;one&lt;/b&gt;</td><td>2025-03-04</td><td>a</td>" in page
    assert '<td class="error">2025-03-04, not 2025-03-05</td>' in page
    assert '<td class="error">x&amp;y, not None</td>' in page
    assert page.count('<td class="error">prompt: too long</td>') == 1


def test_the_demo_shows_rows_of_the_table() -> None:
    assert max(demo.SHOWN_ROWS) < TABLE.num_rows
    shown = [TABLE["language"][row].as_py() for row in demo.SHOWN_ROWS]
    assert len(set(shown)) >= 4


def test_the_picture_shows_every_row_as_text(tmp_path: Path) -> None:
    table = pa.table({
        "id": [1, 2],
        "title": ["<b>bold</b>", "two"],
        "completion": [" fine & good", None],
        "error": [None, "prompt: too long"],
        "num_prompt_tokens": [30, 100],
        "num_completion_tokens": [10, None],
    })  # fmt: skip
    draw_completions(table, tmp_path / "picture.html")
    page = (tmp_path / "picture.html").read_text()
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "fine &amp; good" in page
    assert '<td class="error">prompt: too long</td>' in page
    assert "2 rows, 1 with an error; 130 prompt tokens, 10 new tokens" in page
    # The longest row fills the width: 100 tokens in 14 ems.
    assert 'style="width:14.00em"' in page


def test_the_picture_of_scores_counts_what_a_person_says(tmp_path: Path) -> None:
    table = pa.table({
        "id": [1, 2, 3],
        "text": ["good", "<i>bad</i>", "void"],
        "sentiment": ["positive", "negative", "positive"],
        "label": ["positive", "positive", None],
        "scores": [[0.25, 0.75], [0.5, 0.5], None],
        "error": [None, None, "row: broken"],
    })  # fmt: skip
    draw_scores(table, "sentiment", tmp_path / "picture.html")
    page = (tmp_path / "picture.html").read_text()
    assert "3 rows, 1 with an error; 1 of 3 as a person labelled them" in page
    assert "&lt;i&gt;bad&lt;/i&gt;" in page
    assert "positive, not negative" in page
    assert '<td class="error">row: broken</td>' in page
    # A score of 1 fills 14 ems.
    assert 'style="width:3.50em"' in page
    assert 'style="width:10.50em"' in page


def test_the_map_has_a_place_for_every_embedding(tmp_path: Path) -> None:
    table = pa.table({
        "title": ["one", "two", "three", "none"],
        "language": ["en", "en", "fr", "en"],
        "embedding": [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], None],
        "error": [None, None, None, "text: too long"],
    })  # fmt: skip
    draw_map(table, tmp_path / "picture.html")
    page = (tmp_path / "picture.html").read_text()
    assert page.count("<circle") == 3
    assert "4 rows, 1 with an error" in page
    assert "2 languages" in page
    assert "nan" not in page.split("<svg")[1]


def test_the_reviews_are_balanced() -> None:
    reviews = [json.loads(line) for line in (FOLDER / "reviews.jsonl").read_text().splitlines()]
    labels = [review["sentiment"] for review in reviews]
    assert {label: labels.count(label) for label in labels} == {"positive": 24, "negative": 24}
    assert [review["id"] for review in reviews] == list(range(48))


def test_the_tools_can_be_required() -> None:
    tools = checked_tools(json.loads((FOLDER / "tools.json").read_text(encoding="utf-8")))
    functions = [tool["function"] for tool in tools]
    language = calls_language(functions)
    order = f"order:{QUOTE}BX1042{QUOTE}"
    item = f"{{count:2,name:{QUOTE}mug{QUOTE}}}"
    for body in (
        "ask_a_person{}",
        f"track_order{{{order}}}",
        f"return_items{{items:[{item}],{order},reason:{QUOTE}broken{QUOTE}}}",
    ):
        assert re.fullmatch(to_regex(language), f"{START}call:{body}{END}" * 2)
    lines = (FOLDER / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [1, 2, 3, 4, 5, 6]
