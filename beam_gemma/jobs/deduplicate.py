"""Make requests from rows as record batches, and merge rows with equal requests.

Requests of rows with pictures and sounds have their files beside them, which are not small: the
files of merged rows are never held together.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from beam_gemma.batches import joined
from beam_gemma.errors import RecordError
from beam_gemma.inference.media_files import MediaReading
from beam_gemma.inference.media_rows import files_of, with_files
from beam_gemma.inference.rows import rows_of
from beam_gemma.inputs.row import Row
from beam_gemma.tasks.interface import Settings
from beam_gemma.tasks.row_keys import (
    ENCODED,
    FILES,
    KEY_BYTES,
    POSITION,
    POSITIONS,
    REQUEST_KEY,
    ROW_KEY,
)

FILE_TYPE = pa.list_(pa.large_binary())


def keyed(
    position: int,
    rows: pa.RecordBatch,
    settings: Settings,
    encode: Callable[[Row], bytes],
    reading: MediaReading = MediaReading(),
) -> pa.RecordBatch:
    """Return one request per row: its key, its position, and what the row is encoded to.

    Rows with pictures or sounds also have their files in `FILES`; rows that fail have none. With
    sampling, rows never share a request: the row's own key becomes part of the request key.

    Args:
        position: The position of the first row.
        rows: The rows, with all columns of the table; columns of files are fetched.
        settings: The settings of the task.
        encode: Encodes a row to its request, or to its error; equal requests are merged.
        reading: The limits of reading the files that conversations name.
    """
    used = rows.select([name for name in rows.schema.names if name in settings.columns])
    requests: list[bytes] = []
    files: list[list[bytes]] = []
    for row in with_files(rows_of(used), settings, reading):
        requests.append(encode(row))
        files.append(files_of(row, settings))
    keys = [_digest(request) for request in requests]
    own: dict[str, pa.Array] = {}
    if settings.file_columns or any(files):
        own[FILES] = pa.array(files, FILE_TYPE)
    if settings.is_sampled:
        if FILES in own:
            rows = _with_digests(rows.drop_columns(list(settings.file_columns)), files)
        row_keys = _row_keys(rows, settings)
        keys = [_digest(key + name.encode()) for key, name in zip(keys, row_keys, strict=True)]
        own[ROW_KEY] = pa.array(row_keys, pa.string())
    return pa.record_batch(
        {
            REQUEST_KEY: pa.array(keys, pa.binary(KEY_BYTES)),
            POSITION: pa.array(np.arange(position, position + rows.num_rows)),
            ENCODED: pa.array(requests, pa.binary()),
            **own,
        }
    )


def _with_digests(rows: pa.RecordBatch, files: Sequence[Sequence[bytes]]) -> pa.RecordBatch:
    """Return rows with the digests of their files, which tell rows apart as these do."""
    digests = [[_digest(file).hex() for file in some] for some in files]
    return rows.append_column(FILES, pa.array(digests, pa.list_(pa.string())))


def key_ranges(requests: pa.RecordBatch, num_ranges: int) -> np.ndarray:
    """Return the index of each key's range: [rows] int64; all ranges are equally wide."""
    leading = [int.from_bytes(key[:4], "big") for key in requests.column(REQUEST_KEY).to_pylist()]
    return np.array(leading, np.int64) * num_ranges >> 32


def distinct(batches: Iterable[pa.RecordBatch]) -> pa.RecordBatch:
    """Merge rows of the same key into one request with the positions of all of them."""
    rows = joined(batches).sort_by(POSITION)
    if ROW_KEY in rows.schema.names:
        rows = _numbered(rows)
    codes = rows.column(REQUEST_KEY).dictionary_encode().indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    offsets = np.r_[0, np.cumsum(np.bincount(codes))]
    positions = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), rows.column(POSITION).take(pa.array(order))
    )
    first = rows.take(pa.array(order[offsets[:-1]]))
    at = first.schema.get_field_index(POSITION)
    return first.set_column(at, POSITIONS, positions)


def without_files(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return requests without their files, which can then be forgotten."""
    return batch.drop_columns([FILES]) if FILES in batch.schema.names else batch


def with_their_files(
    requests: pa.RecordBatch, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Yield merged requests with their files, in batches as small as these came.

    Args:
        requests: Requests of `distinct`, of rows `without_files`.
        batches: The requests of all rows, with their files.
    """
    positions = requests.column(POSITIONS).to_pylist()
    first = {own[0]: index for index, own in enumerate(positions)}
    for batch in batches:
        found = [first.get(position, -1) for position in batch.column(POSITION).to_pylist()]
        indices = np.array(found, np.int64)
        wanted = indices >= 0
        if not wanted.any():
            continue
        some = requests.take(pa.array(indices[wanted]))
        if FILES in batch.schema.names:
            some = some.append_column(FILES, batch.column(FILES).filter(pa.array(wanted)))
        yield some


def split_durable(
    requests: pa.RecordBatch, durable: Collection[bytes]
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Return the requests whose results are durable, and the others."""
    found = np.array([key in durable for key in requests.column(REQUEST_KEY).to_pylist()], bool)
    return requests.filter(pa.array(found)), requests.filter(pa.array(~found))


def spread(requests: pa.RecordBatch, results: pa.RecordBatch) -> pa.RecordBatch:
    """Return each result once per row that shares the request, with the row's position."""
    positions = requests.column(POSITIONS)
    indices = np.repeat(np.arange(requests.num_rows), positions.value_lengths().to_numpy())
    columns = [positions.flatten(), *(results.take(pa.array(indices))).columns]
    return pa.RecordBatch.from_arrays(columns, [POSITION, *results.schema.names])


def _row_keys(rows: pa.RecordBatch, settings: Settings) -> list[str]:
    """Return the key of each row: the key column's value, or a hash of the whole row."""
    everything = rows_of(rows)
    keys = (name for name, use in settings.columns.items() if use == "key")
    column = next(keys, None)
    given = rows.column(column).to_pylist() if column else [None] * rows.num_rows
    return [
        str(key) if key is not None else _digest(repr(list(_content(row))).encode()).hex()
        for key, row in zip(given, everything, strict=True)
    ]


def _content(row: Any) -> Iterator[Any]:
    """Return the values of a row; the error text replaces one that Python cannot hold."""
    for name in row:
        try:
            yield row[name]
        except RecordError as error:
            yield str(error)


def _numbered(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Return sampled rows, with a number in the keys that tells identical rows apart."""
    seen: dict[bytes, int] = {}
    keys, row_keys = [], []
    for key, row_key in zip(
        *(rows.column(n).to_pylist() for n in (REQUEST_KEY, ROW_KEY)), strict=True
    ):
        number = seen[key] = seen.get(key, -1) + 1
        keys.append(_digest(key + number.to_bytes(8, "big")) if number else key)
        row_keys.append(f"{row_key}-{number}" if number else row_key)
    for name, values in ((REQUEST_KEY, keys), (ROW_KEY, row_keys)):
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, name, pa.array(values, rows.schema.field(name).type))
    return rows


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
