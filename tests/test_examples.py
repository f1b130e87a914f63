"""The example files: the table is what its script writes, and the template fits the table."""

import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from beam_gemma.prompt import Template
from examples import demo
from examples.make_articles import FOLDER, SCHEMA, rows
from examples.picture import draw

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
    draw(table, tmp_path / "picture.html", "A title")
    page = (tmp_path / "picture.html").read_text()
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "fine &amp; good" in page
    assert '<td class="error">prompt: too long</td>' in page
    assert "2 rows, 1 with an error; 130 prompt tokens, 10 new tokens" in page
    # The longest row fills the width: 100 tokens in 14 ems.
    assert 'style="width:14.00em"' in page
