"""Read Hive partition columns from folder names: `table/day=2024-01-01/part-0.parquet`.

Hive, Spark and others write tables this way. A folder's value applies to every row below it.
"""

import datetime
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa

from beam_gemma.errors import OptionsError

NULL = "__HIVE_DEFAULT_PARTITION__"
"""Folder value that stands for null."""
HIDDEN = (".", "_")
"""Prefixes of files and folders without data: `_SUCCESS`, `_temporary`, checksums."""


class Partitions(NamedTuple):
    """Partition columns and their values per file."""

    schema: pa.Schema
    values: dict[str, tuple[Any, ...]]
    """Values of each file by path, in the order of the schema."""


def is_data(path: str, root: str) -> bool:
    """Return whether a file belongs to a table: it is in the root or in partition folders.

    Args:
        path: The path of the file.
        root: The folder of the table.
    """
    *folders, name = parts_below(path, root)
    if any(part.startswith(HIDDEN) for part in (*folders, name)):
        return False
    return all("=" in folder for folder in folders)


def partitions_of(root: str, paths: Sequence[str]) -> Partitions:
    """Return the partition columns of the folders below a root.

    A column holds integers or dates if all of its values are written as such, otherwise text.

    Raises:
        OptionsError: files have different partition columns.
    """
    said = {path: dict(_said(path, root)) for path in paths}
    names = list(said[paths[0]])
    for path, texts in said.items():
        if list(texts) != names:
            raise OptionsError(
                f"{path}: expected folders of {', '.join(names) or 'no columns'}, as of the files "
                f"before it, got {', '.join(texts) or 'none'}"
            )
    columns = {name: _column([said[path][name] for path in paths]) for name in names}
    rows = zip(*(column.to_pylist() for column in columns.values()), strict=True)
    return Partitions(
        schema=pa.schema([(name, column.type) for name, column in columns.items()]),
        values=dict(zip(paths, rows, strict=True)) if names else dict.fromkeys(paths, ()),
    )


def parts_below(path: str, root: str) -> list[str]:
    """Return the names of the folders below a root that lead to a file, and its own."""
    return path.removeprefix(root).strip("/").split("/")


def _said(path: str, root: str) -> Iterator[tuple[str, str | None]]:
    """Yield the partition columns of a file with their values as text."""
    for folder in parts_below(path, root)[:-1]:
        name, is_column, text = folder.partition("=")
        if is_column:
            yield unquote(name), None if text == NULL else unquote(text)


def _column(texts: list[str | None]) -> pa.Array:
    """Return values as integers or dates if all have that form, otherwise as text."""
    given = [text for text in texts if text is not None]
    # An integer would lose leading zeros, so 007 stays text.
    if given and all(re.fullmatch(r"0|-?[1-9]\d{0,17}", text, re.ASCII) for text in given):
        return pa.array([None if t is None else int(t) for t in texts], pa.int64())
    if given and all(map(_is_day, given)):
        days = [None if t is None else datetime.date.fromisoformat(t) for t in texts]
        return pa.array(days, pa.date32())
    return pa.array(texts, pa.string())


def _is_day(text: str) -> bool:
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        return False
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True
