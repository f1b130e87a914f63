"""The example files: the table is what its script writes, and the template fits the table."""

import tomllib

import pyarrow as pa
import pyarrow.parquet as pq

from beam_gemma.prompt import Template
from examples.make_articles import FOLDER, SCHEMA, rows

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
