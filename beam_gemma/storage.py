"""File operations, including atomic and durable writes of files that never change.

Files of results are named after their content, so existing ones need not be written again.
"""

import contextlib
import functools
import os
import uuid
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems

from beam_gemma.errors import OptionsError, StorageError

CLOUD_STORAGE = "gs://"
"""Scheme of paths on Cloud Storage."""


def write_once(path: str, content: bytes) -> None:
    """Write a file atomically; all writers of a path must write the same content.

    Raises:
        StorageError: the file cannot be written; no part of it is left at `path`.
    """
    writers = {None: _write_local, "gs": _write_object}
    try:
        writers.get(FileSystems.get_scheme(path), _write_and_rename)(path, content)
    except Exception as error:  # each file system has its own exceptions
        raise StorageError(
            f"{path}: expected to write {len(content):,} bytes, got {type(error).__name__}: "
            f"{error}; once that is set right, go on with --resume"
        ) from error


def _write_local(path: str, content: bytes) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
    # The name is durable only once the folder is synced.
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_object(path: str, content: bytes) -> None:
    from google.api_core.exceptions import PreconditionFailed

    blob = blob_at(path)
    # A failed precondition means that the file already exists, which is fine.
    with contextlib.suppress(PreconditionFailed):
        blob.upload_from_string(content, if_generation_match=0)


def _write_and_rename(path: str, content: bytes) -> None:
    if FileSystems.exists(path):
        return
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    with FileSystems.create(temporary) as stream:
        stream.write(content)
    FileSystems.rename([temporary], [path])


@functools.cache
def _client() -> Any:
    """Return a Cloud Storage client, created the way Beam creates its own."""
    from apache_beam.io.gcp.gcsio import create_storage_client
    from apache_beam.options.pipeline_options import PipelineOptions

    return create_storage_client(PipelineOptions())


def blob_at(path: str) -> Any:
    """Return the object of Cloud Storage at a path."""
    bucket, _, name = path.removeprefix(CLOUD_STORAGE).partition("/")
    return _client().bucket(bucket).blob(name)


def match_files(pattern: str) -> list[str]:
    """Return the sorted paths of files that match a pattern.

    Raises:
        OptionsError: the file system is unknown or cannot be listed.
    """
    try:
        (result,) = FileSystems.match([pattern])
    except (BeamIOError, ValueError) as error:
        raise OptionsError(f"{pattern}: expected files that can be listed, got: {error}") from error
    return sorted(file.path for file in result.metadata_list)


def delete_folder(folder: str) -> None:
    """Delete a folder and its contents, if it exists."""
    if _is_there(folder):
        # Beam needs a trailing slash for an object prefix, but none for a local folder.
        FileSystems.delete([f"{folder}/" if "://" in folder else folder])


def _is_there(folder: str) -> bool:
    # In an object store, a folder exists only if it contains objects.
    (files,) = FileSystems.match([f"{folder}/**"], limits=[1])
    return FileSystems.exists(folder) or bool(files.metadata_list)


def create(path: str) -> BufferedIOBase:
    """Create a file, and its folder if necessary, and return the open stream."""
    folder = path.rpartition("/")[0]
    if folder and not FileSystems.exists(folder):
        try:
            FileSystems.mkdirs(folder)
        except OSError:
            # Another thread may have created the folder, which is fine. Beam's local file system
            # raises a bare OSError, the others its subclass BeamIOError.
            if not FileSystems.exists(folder):
                raise
    stream: Any = FileSystems.create(path)  # only Beam's annotation says BinaryIO
    return stream
