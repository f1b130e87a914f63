"""Choose few-shot examples from a table, once per job and in the same order for every row.

Errors name a row by its number, since the text of rows is shown nowhere at launch.
"""

import random
from collections.abc import Mapping
from typing import Any

from beam_gemma.errors import OptionsError, nearest
from beam_gemma.inference.rows import rows_of
from beam_gemma.inputs.row import as_text, shots_own_errors
from beam_gemma.inputs.template import Template
from beam_gemma.tables.source import Source
from beam_gemma.tasks.questions import ClassifySettings, Shot

POOL_ROWS = 10_000
"""Number of rows, from the start of a table, that shots are drawn from."""


def draw_shots(
    source: Source, settings: ClassifySettings, label_column: str, *, number: int, seed: int
) -> tuple[Shot, ...]:
    """Draw shots at random, plus one spare, because a row never serves as its own shot.

    Rows that lack a label or a column of the prompt are skipped.

    Args:
        source: The table to draw from.
        settings: The classification task that the shots are for.
        label_column: The column with the index or the text of a row's label.
        number: The number of shots in each prompt.
        seed: The random seed; the same table and seed give the same shots.

    Raises:
        OptionsError: the table lacks a column or has too few rows with a label, or a label is not
            among the settings' labels.
    """
    pool = all_shots(source, settings, label_column)
    if len(pool) < number:
        raise OptionsError(
            f"num_fewshot: expected at most the {len(pool):,} rows with a label among the first "
            f"{POOL_ROWS:,} of {source.uri}, got {number}"
        )
    return tuple(random.Random(seed).sample(pool, min(number + 1, len(pool))))


def all_shots(source: Source, settings: ClassifySettings, label_column: str) -> tuple[Shot, ...]:
    """Return all rows of the pool that can be shots, in order.

    Raises:
        OptionsError: the table lacks a column, or a label is not among the settings' labels.
    """
    columns = (*settings.columns, label_column)
    for column in columns:
        if column not in source.schema.names:
            raise OptionsError(
                f"column {column!r}: expected in {source.uri}, got "
                f"{', '.join(source.schema.names)}{nearest(column, source.schema.names)}"
            )
    templates = [Template(label, ()) for label in settings.labels]
    rows = (row for batch in source.head(POOL_ROWS) for row in rows_of(batch))
    return tuple(
        Shot(
            row={column: row[column] for column in settings.columns},
            label=_index(settings, templates, row, label_column, f"{source.uri}, row {position}"),
        )
        for position, row in enumerate(rows)
        if isinstance(row, Mapping) and all(row[column] is not None for column in columns)
    )


def _index(
    settings: ClassifySettings,
    labels: list[Template],
    row: Mapping[str, Any],
    label_column: str,
    place: str,
) -> int:
    """Return the index of a row's label; space around label texts is ignored."""
    value = row[label_column]
    if isinstance(value, int) and 0 <= value < len(labels):
        return int(value)
    with shots_own_errors():
        names = [as_text(label.render(row)).strip() for label in labels]
    if str(value).strip() not in names:
        raise OptionsError(
            f"{place} (the first is 0): expected in column {label_column!r} an index below "
            f"{len(labels)} or one of {', '.join(settings.labels)}, got another "
            f"{type(value).__name__}; correct it, or set it to null to leave the row out"
        )
    return names.index(str(value).strip())
