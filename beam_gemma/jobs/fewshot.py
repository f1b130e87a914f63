"""Choose few-shot examples from a table, once per job and in the same order for every row.

Errors name a row by its number, since the text of rows is shown nowhere at launch.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from beam_gemma.errors import OptionsError, nearest
from beam_gemma.inference.media_files import MediaReading
from beam_gemma.inference.media_rows import with_files
from beam_gemma.inference.rows import rows_of
from beam_gemma.inputs.row import Row, as_text, shots_own_errors
from beam_gemma.inputs.template import Template
from beam_gemma.tables.source import Source
from beam_gemma.tasks.questions import ClassifySettings, Shot

POOL_ROWS = 10_000
"""Number of rows, from the start of a table, that shots are drawn from."""


def draw_shots(
    source: Source,
    settings: ClassifySettings,
    label_column: str,
    *,
    number: int,
    seed: int,
    reading: MediaReading = MediaReading(),
) -> tuple[Shot, ...]:
    """Draw shots at random, plus one spare, because a row never serves as its own shot.

    Rows that lack a label or a column of the prompt are skipped.

    Args:
        source: The table to draw from.
        settings: The classification task that the shots are for.
        label_column: The column with the index or the text of a row's label.
        number: The number of shots in each prompt.
        seed: The random seed; the same table and seed give the same shots.
        reading: The limits of reading the files that rows name.

    Raises:
        OptionsError: the table lacks a column or has too few rows with a label, or a label is not
            among the settings' labels.
    """
    pool = _pool(source, settings, label_column)
    if len(pool) < number:
        raise OptionsError(
            f"num_fewshot: expected at most the {len(pool):,} rows with a label among the first "
            f"{POOL_ROWS:,} of {source.uri}, got {number}"
        )
    drawn = random.Random(seed).sample(list(pool.items()), min(number + 1, len(pool)))
    return _with_files(source, drawn, settings, reading)


def all_shots(
    source: Source,
    settings: ClassifySettings,
    label_column: str,
    *,
    reading: MediaReading = MediaReading(),
) -> tuple[Shot, ...]:
    """Return all rows of the pool that can be shots, in order.

    Raises:
        OptionsError: the table lacks a column, or a label is not among the settings' labels.
    """
    pool = _pool(source, settings, label_column)
    return _with_files(source, list(pool.items()), settings, reading)


def _pool(source: Source, settings: ClassifySettings, label_column: str) -> dict[int, Shot]:
    """Return the rows that can be shots by their positions, without their files."""
    columns = (*settings.columns, label_column)
    for column in columns:
        if column not in source.schema.names:
            raise OptionsError(
                f"column {column!r}: expected in {source.uri}, got "
                f"{', '.join(source.schema.names)}{nearest(column, source.schema.names)}"
            )
    templates = [Template(label, ()) for label in settings.labels]
    texts = [column for column in settings.columns if column not in settings.file_columns]
    return {
        position: Shot(
            row={column: row[column] for column in texts},
            label=_index(settings, templates, row, label_column, f"{source.uri}, row {position}"),
        )
        for position, row in _rows(source)
        if isinstance(row, Mapping) and all(row[column] is not None for column in columns)
    }


def _with_files(
    source: Source,
    shots: Sequence[tuple[int, Shot]],
    settings: ClassifySettings,
    reading: MediaReading,
) -> tuple[Shot, ...]:
    """Return shots with their files, which are read for these alone."""
    columns = settings.file_columns
    if not columns:
        return tuple(shot for _, shot in shots)
    wanted = {position for position, _ in shots}
    found = {
        position: {column: read[column] for column in columns}
        for position, row in _rows(source)
        if position in wanted
        for read in with_files([row], settings, reading)
        if isinstance(read, Mapping)
    }
    return tuple(_joined(shot, found[place]) for place, shot in shots)


def _joined(shot: Shot, files: Mapping[str, Any]) -> Shot:
    assert isinstance(shot.row, Mapping)
    return replace(shot, row={**shot.row, **files})


def _rows(source: Source) -> Iterator[tuple[int, Row]]:
    batches = source.head(POOL_ROWS)
    return enumerate(row for batch in batches for row in rows_of(batch))


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
