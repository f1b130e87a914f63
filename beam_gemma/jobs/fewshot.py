"""Shots out of a table, chosen once for a job: every row sees the same ones in the same order."""

import random
from collections.abc import Mapping
from typing import Any

from beam_gemma.errors import OptionsError, nearest
from beam_gemma.inference.rows import rows_of
from beam_gemma.inputs.row import as_text
from beam_gemma.inputs.template import Template
from beam_gemma.tables.source import Source
from beam_gemma.tasks.questions import ClassifySettings, Shot

POOL_ROWS = 10_000
"""Rows that shots are drawn from, from the first of a table."""


def draw_shots(
    source: Source, settings: ClassifySettings, label_column: str, *, number: int, seed: int
) -> tuple[Shot, ...]:
    """Draw shots at random, and one to spare: the row of a shot is not shown to itself.

    Rows that lack a label, or a column of the prompt, are no shots.

    Args:
        source: The table.
        settings: What they are to be shots of.
        label_column: Holds the index of a row's label, or its text.
        number: How many each prompt is to have.
        seed: Of the draw; the same table and seed give the same shots.

    Raises:
        OptionsError: the table lacks a column or has too few rows with a label, or a label is none
            of the settings'.
    """
    pool = all_shots(source, settings, label_column)
    if len(pool) < number:
        raise OptionsError(
            f"num_fewshot: expected at most the {len(pool):,} rows with a label among the first "
            f"{POOL_ROWS:,} of {source.uri}, got {number}"
        )
    return tuple(random.Random(seed).sample(pool, min(number + 1, len(pool))))


def all_shots(source: Source, settings: ClassifySettings, label_column: str) -> tuple[Shot, ...]:
    """Return the rows of a table that can be shots, in order.

    Raises:
        OptionsError: the table lacks a column, or a label is none of the settings'.
    """
    columns = (*settings.columns, label_column)
    for column in columns:
        if column not in source.schema.names:
            raise OptionsError(
                f"column {column!r}: expected in {source.uri}, got "
                f"{', '.join(source.schema.names)}{nearest(column, source.schema.names)}"
            )
    templates = [Template(label, ()) for label in settings.labels]
    return tuple(
        Shot(
            row={column: row[column] for column in settings.columns},
            label=_index(templates, row, label_column),
        )
        for batch in source.head(POOL_ROWS)
        for row in rows_of(batch)
        if isinstance(row, Mapping) and all(row[column] is not None for column in columns)
    )


def _index(labels: list[Template], row: Mapping[str, Any], label_column: str) -> int:
    """Return which label a row has; space around a label is no part of its name."""
    value = row[label_column]
    if isinstance(value, int) and 0 <= value < len(labels):
        return int(value)
    names = [as_text(label.render(row)).strip() for label in labels]
    if str(value).strip() not in names:
        raise OptionsError(
            f"column {label_column!r}: expected an index below {len(labels)} or one of "
            f"{', '.join(names)}, got {value!r}"
        )
    return names.index(str(value).strip())
