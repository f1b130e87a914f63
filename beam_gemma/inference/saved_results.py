"""Results that outlive their job: small files of finished rows, from which a later job continues.

A piece is a file with request keys and results of some rows. Its name is the hash of its content,
and its folder is named after everything besides requests that results depend on. So pieces never
change, any number of workers may write them, and readers find only results that they could have
computed themselves. A retried row may be in two pieces, with the same result in both.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from beam_gemma.errors import StorageError
from beam_gemma.model.artifact import Artifact
from beam_gemma.runtime.devices import numerics
from beam_gemma.storage import literal_pattern, write_once
from beam_gemma.tasks.interface import Settings
from beam_gemma.tasks.row_keys import KEY_BYTES, REQUEST_KEY

SUFFIX = ".arrow"
MIN_ROWS, MAX_ROWS = 16, 256
"""Rows per piece; `flush` and `MAX_AGE_SECS` may make it smaller."""
MAX_SHARE = 0.02
"""Share of the finished rows that may be lost if a process is killed."""
MAX_AGE_SECS = 30.0
"""Longest wait of a finished row for others of its piece, in seconds."""
_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")


def run_digest(artifact: Artifact, settings: Settings, device: str) -> str:
    """Return a digest of everything that results depend on besides their rows' requests.

    Args:
        artifact: The model's artifact.
        settings: The settings of the task.
        device: The device that the job requests.
    """
    content = [
        artifact.digest,
        artifact.eos_token_ids,
        settings.parameters,
        device,
        numerics(),
    ]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def list_pieces(folder: str) -> list[str]:
    """Return the paths of the pieces in a folder, which need not exist."""
    (found,) = FileSystems.match([f"{literal_pattern(folder)}/*{SUFFIX}"])
    return sorted(file.path for file in found.metadata_list)


def write_piece(folder: str, results: pa.RecordBatch) -> None:
    """Write results durably as a piece.

    Raises:
        StorageError: the piece cannot be written.
    """
    stream = pa.BufferOutputStream()
    with pa.ipc.new_file(stream, results.schema, options=_COMPRESSED) as writer:
        writer.write_batch(results)
    content = stream.getvalue().to_pybytes()
    write_once(f"{folder}/{_name(content)}", content)


def read_piece(path: str) -> pa.RecordBatch:
    """Return the request keys and results of a piece.

    Raises:
        StorageError: the content does not match the hash in the file's name.
    """
    with FileSystems.open(path) as stream:
        content = stream.read()
    if path.rpartition("/")[2] != _name(content):
        raise StorageError(
            f"{path}: expected a piece of results whose content has the hash in its name, got "
            "another; delete this file, and its rows are computed again"
        )
    return pa.ipc.open_file(content).get_batch(0)


def merge(pieces: Iterable[pa.RecordBatch]) -> dict[bytes, dict[str, Any]]:
    """Return the result for each request key.

    Raises:
        StorageError: two pieces have different results for one key.
    """
    results: dict[bytes, dict[str, Any]] = {}
    for piece in pieces:
        for result in piece.to_pylist(maps_as_pydicts="strict"):
            key = result.pop(REQUEST_KEY)
            # The reprs of two numbers differ if their bits do.
            if repr(results.setdefault(key, result)) != repr(result):
                raise StorageError(
                    f"pieces: expected one result of the request {key.hex()}, got two that "
                    "differ, as from machines that do not compute alike; run the job without "
                    "--resume"
                )
    return results


class PieceWriter:
    """Collects results and writes them durably, on its own thread."""

    def __init__(
        self, folder: str, schema: pa.Schema, *, max_age_secs: float = MAX_AGE_SECS
    ) -> None:
        """Start the thread.

        Args:
            folder: The folder of the pieces.
            schema: The schema of the results.
            max_age_secs: The longest wait of a result for others, in seconds.
        """
        self._folder = folder
        self._schema = pa.schema([pa.field(REQUEST_KEY, pa.binary(KEY_BYTES)), *schema])
        self._max_age_secs = max_age_secs
        self._rows: list[dict[str, Any]] = []
        self._due = 0.0
        """Monotonic time at which the rows are written, however few they are."""
        self._num_added = self._num_wanted = self._num_written = 0
        self._error: StorageError | None = None
        """Error that no caller has received yet; until then, no write is retried."""
        self._condition = threading.Condition()  # guards the six above
        threading.Thread(target=self._loop, name="beam-gemma-pieces", daemon=True).start()

    def add(self, key: bytes, result: Mapping[str, Any]) -> None:
        """Add a finished row.

        Raises:
            StorageError: earlier rows could not be written so far.
        """
        with self._condition:
            self._check()
            if not self._rows:
                self._due = time.monotonic() + self._max_age_secs
            self._rows.append({REQUEST_KEY: key, **result})
            self._num_added += 1
            self._condition.notify_all()

    def flush(self) -> None:
        """Block until all added rows are durable.

        Raises:
            StorageError: a write failed; the rows are kept and tried again.
        """
        with self._condition:
            wanted = self._num_wanted = self._num_added
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._error or self._num_written >= wanted)
            self._check()

    def _check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self._condition.notify_all()
            raise error

    def _loop(self) -> None:
        while True:
            rows = self._take()
            try:
                write_piece(self._folder, pa.RecordBatch.from_pylist(rows, self._schema))
            except Exception as error:  # any failure must reach the callers that wait
                with self._condition:
                    self._rows = rows + self._rows
                    self._error = _as_storage_error(error)
                    self._condition.notify_all()
            else:
                with self._condition:
                    self._num_written += len(rows)
                    self._condition.notify_all()

    def _take(self) -> list[dict[str, Any]]:
        """Return the rows of the next piece, once it is due."""
        with self._condition:
            self._condition.wait_for(lambda: self._rows and self._error is None)
            self._condition.wait_for(self._is_due, timeout=self._due - time.monotonic())
            rows, self._rows = self._rows[:MAX_ROWS], self._rows[MAX_ROWS:]
            return rows

    def _is_due(self) -> bool:
        enough = max(MIN_ROWS, min(MAX_ROWS, int(MAX_SHARE * self._num_written)))
        return len(self._rows) >= enough or self._num_written < self._num_wanted


def _as_storage_error(error: Exception) -> StorageError:
    if isinstance(error, StorageError):
        return error
    told = StorageError(
        f"pieces: expected results that can be written, got {type(error).__name__}: {error}"
    )
    told.__cause__ = error
    return told


def _name(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest() + SUFFIX
