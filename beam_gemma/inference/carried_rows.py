"""Rows on their way to the process that has the model: each as the request that it makes.

A request is made here, where the row is, of whatever values Python can hold. What crosses is its
token ids as JSON, with the keys of the row and the files of its pictures; see
`tasks/encoded_rows.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from beam_gemma.inference.media_rows import files_of
from beam_gemma.inference.wire import batch_bytes, batch_of
from beam_gemma.inputs.row import Row
from beam_gemma.tasks.encoded_rows import request_of
from beam_gemma.tasks.interface import Settings
from beam_gemma.tasks.row_keys import ENCODED, FILES, REQUEST_KEY, ROW_KEY

SCHEMA = pa.schema(
    {
        ENCODED: pa.large_binary(),
        REQUEST_KEY: pa.large_binary(),
        ROW_KEY: pa.large_string(),
        FILES: pa.large_list(pa.large_binary()),
    }
)
Identify = Callable[[Row], Any]
"""Function that returns the JSON-serializable identity of a row's request."""
DrawKey = Callable[[Row], str | None]
"""Function that returns the key that seeds a row's random draws; None if the request does."""


class RowCarrier:
    """Turns rows into bytes; needs no weights."""

    def __init__(
        self, identify: Identify, draw_key: DrawKey, settings: Settings | None = None
    ) -> None:
        """Initialize the carrier with what a task makes of a row.

        Args:
            identify: Returns the identity of a row's request.
            draw_key: Returns the key of a row's random draws.
            settings: The settings of the task; None if rows have no pictures.
        """
        self._identify = identify
        self._draw_key = draw_key
        self._settings = settings

    def __call__(self, rows: Sequence[Row]) -> bytes:
        """Return rows as bytes that `rows_of_bytes` decodes.

        Raises:
            OptionsError: the settings do not fit the rows.
        """
        carried = [self._carried(row) for row in rows]
        return batch_bytes(pa.RecordBatch.from_pylist(carried, schema=SCHEMA))

    def _carried(self, row: Row) -> dict[str, Any]:
        if isinstance(row, str):
            return {ENCODED: request_of(row, self._identify)}
        keys: dict[str, Any] = {REQUEST_KEY: row[REQUEST_KEY]} if REQUEST_KEY in row else {}
        if ROW_KEY in row:
            keys[ROW_KEY] = str(row[ROW_KEY])
        if ENCODED in row:
            return {ENCODED: row[ENCODED], FILES: row.get(FILES), **keys}

        def identify(row: Row) -> Any:
            identity = self._identify(row)
            if self._settings is not None and (files := files_of(row, self._settings)):
                keys[FILES] = files
            if ROW_KEY not in row:
                keys[ROW_KEY] = self._draw_key(row)
            return identity

        return {ENCODED: request_of(row, identify), **keys}


def rows_of_bytes(encoded: bytes) -> list[Row]:
    """Return the rows of a `RowCarrier`, each with the columns that it has.

    Raises:
        ArrowInvalid: the bytes are no valid rows.
    """
    rows = batch_of(encoded).cast(SCHEMA).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]
