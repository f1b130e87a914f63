"""Write `articles.parquet` from `articles.toml`: `python examples/make_articles.py`.

The texts are in the TOML file. Ratings, times and figures are invented here from a fixed seed, so
that the table has one column of each type that a job must pass through.
"""

import random
import tomllib
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = Path(__file__).parent
SCHEMA = pa.schema([
    pa.field("id", pa.int64(), nullable=False),
    ("title", pa.string()),
    ("body", pa.string()),
    ("language", pa.dictionary(pa.int32(), pa.string())),
    ("tags", pa.list_(pa.string())),
    ("rating", pa.decimal128(3, 1)),
    ("published", pa.timestamp("us", tz="UTC")),
    ("metrics", pa.struct([("views", pa.int32()), ("score", pa.float32())])),
])  # fmt: skip


def rows(articles: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each article, with figures drawn from a fixed seed."""
    draw = random.Random(7)
    published = datetime(2025, 1, 6, 6, tzinfo=UTC)
    table = []
    for number, article in enumerate(articles, start=1):
        published += timedelta(minutes=draw.randrange(60, 4000), microseconds=draw.randrange(10**6))
        rating = Decimal(draw.randrange(10, 51)) / 10
        metrics = {"views": draw.randrange(100_000), "score": draw.random()}
        table.append({
            **article,
            "id": number,
            "rating": rating if draw.random() < 0.8 else None,
            "published": published,
            "metrics": metrics,
        })  # fmt: skip
    return table


def main() -> None:
    """Write the table to the folder of this file."""
    articles = tomllib.loads((FOLDER / "articles.toml").read_text(encoding="utf-8"))["article"]
    table = pa.Table.from_pylist(rows(articles), schema=SCHEMA)
    pq.write_table(table, FOLDER / "articles.parquet", compression="zstd")


if __name__ == "__main__":
    main()
