"""Read and write tables of rows: Parquet, JSON lines and BigQuery."""

from typing import Any

from beam_gemma import moved


def __getattr__(name: str) -> Any:
    """Find a class that version 0.7 kept in a module of this name."""
    return moved.attribute(__name__, name)
