"""Reads the film reviews that several benchmarks take as their rows."""

from pathlib import Path
from typing import Any

from beam_gemma.tables.open_table import open_source

SAMPLE = Path(__file__).parent.parent / "tests/data/sst2_sample.parquet"
"""Reviews with the columns `sentence` and `sentiment`."""


def first_rows(path: str, number: int) -> list[dict[str, Any]]:
    """Return the first rows of a table."""
    return [row for batch in open_source(path).head(number) for row in batch.to_pylist()]
