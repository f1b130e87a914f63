"""File operations, including atomic and durable writes of files that never change.

Files of results are named after their content, so existing ones need not be written again.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems

from beam_gemma.errors import OptionsError, StorageError

CLOUD_STORAGE = "gs://"
"""Scheme of paths on Cloud Storage."""
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""What a file system without hard links answers."""


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


def create_once(path: str, content: bytes) -> bool:
    """Create a file that nobody has created yet; return False if there is one.

    Of several writers, one gets True: on local file systems (NFS too) and on
    `gs://` (by a condition). Elsewhere, two writers that come within a moment may both get True.
    """
    writers = {None: _create_local, "gs": _create_object}
    return writers.get(FileSystems.get_scheme(path), _create_if_missing)(path, content)


def _create_local(path: str, content: bytes) -> bool:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.link(temporary, file)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _create_local_without_link(file, content)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_local_without_link(file: Path, content: bytes) -> bool:
    try:
        with file.open("xb") as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True


def _create_object(path: str, content: bytes) -> bool:
    from google.api_core.exceptions import PreconditionFailed

    blob = blob_at(path)
    try:
        blob.upload_from_string(content, if_generation_match=0)
    except PreconditionFailed:
        # The client may have tried twice: the object may be ours.
        return bool(blob.download_as_bytes() == content)
    return True


def _create_if_missing(path: str, content: bytes) -> bool:
    if FileSystems.exists(path):
        return False
    _write_and_rename(path, content)
    return True


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


def literal_pattern(path: str) -> str:
    """Return the pattern of Beam's file systems that one path alone matches."""
    signs = {"*": "[*]", "?": "[?]", "[": r"[\[]"}
    return re.sub(r"[*?\[]", lambda sign: signs[sign[0]], path)


def match_files(pattern: str) -> list[str]:
    """Return the sorted paths of files that match a pattern.

    Raises:
        OptionsError: the file system is unknown or cannot be listed.
    """
    # Beam's local file system finds nothing by a pattern without a folder.
    is_bare = "/" not in pattern
    try:
        (result,) = FileSystems.match([f"./{pattern}" if is_bare else pattern])
    except (BeamIOError, ValueError) as error:
        raise OptionsError(f"{pattern}: expected files that can be listed, got: {error}") from error
    paths = (file.path for file in result.metadata_list)
    return sorted(path.removeprefix("./") if is_bare else path for path in paths)


def read_file(path: str) -> bytes | None:
    """Return the content of a file, or None if there is none."""
    if not FileSystems.exists(path):
        return None
    with open_file(path) as stream:
        return stream.read()


def is_file(path: str) -> bool:
    """Return whether there is a file at a path."""
    return bool(FileSystems.exists(path))


def move(pairs: Sequence[tuple[str, str]]) -> None:
    """Rename files, each from the first path of a pair to the second, in order.

    Local files are renamed one by one up to the first that fails. On `gs://`, up to 100 files at
    once are copied and then deleted.
    """
    if not pairs:
        return
    if FileSystems.get_scheme(pairs[0][0]) is not None:
        FileSystems.rename(*map(list, zip(*pairs, strict=True)))
        return
    for source, target in pairs:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(source).rename(target)


def remove(paths: Sequence[str]) -> None:
    """Delete files."""
    removers: dict[str | None, Callable[[str], Any]] = {
        None: lambda path: Path(path).unlink(),
        "gs": lambda path: blob_at(path).delete(),
    }
    for path in paths:
        remove_one = removers.get(FileSystems.get_scheme(path), _remove_elsewhere)
        remove_one(path)


def _remove_elsewhere(path: str) -> None:
    FileSystems.delete([literal_pattern(path)])


def make_private(folder: str) -> None:
    """Make a local folder one that only its owner can enter; create it if it is missing.

    A folder of another user stays as it is. Elsewhere than on a local file system, the access to
    the bucket or server decides.
    """
    if FileSystems.get_scheme(folder) is not None:
        return
    path = Path(folder)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)


def has_files(folder: str, *, besides: str) -> bool:
    """Return whether a folder holds files that are not in one of its subfolders.

    Args:
        folder: The folder, which need not exist.
        besides: The name of the subfolder, which holds few files.
    """
    passed = set(match_files(f"{literal_pattern(folder)}/{besides}/*"))
    (found,) = FileSystems.match([f"{literal_pattern(folder)}/**"], limits=[len(passed) + 1])
    return any(file.path not in passed for file in found.metadata_list)


def delete_folder(folder: str) -> None:
    """Delete a folder and its contents, if it exists."""
    if FileSystems.get_scheme(folder) is None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        return
    # In an object store, a folder exists only if it contains objects, and Beam needs a slash.
    pattern = literal_pattern(folder)
    (files,) = FileSystems.match([f"{pattern}/**"], limits=[1])
    if FileSystems.exists(folder) or files.metadata_list:
        FileSystems.delete([f"{pattern}/"])


def open_file(path: str) -> BufferedIOBase:
    """Open a file to read its bytes."""
    stream: Any = FileSystems.open(path)  # only Beam's annotation says BinaryIO
    return stream


def create(path: str) -> BufferedIOBase:
    """Create a file, and its folder if necessary, and return the open stream.

    Raises:
        ValueError: the path has a scheme that Beam does not know.
    """
    FileSystems.get_filesystem(path)  # raises before the scheme could become a local folder
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


def owned_folder(path: str | Path) -> Path:
    """Return a folder that only this user can enter; create it with mode 0700 if it is missing.

    Raises:
        StorageError: the path is a link or no folder, belongs to another user, is open to others,
            or cannot be created.
    """
    folder = Path(path)
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        raise StorageError(
            f"{folder}: expected to create a folder, got {type(error).__name__}: {error}; set "
            "TMPDIR to a folder that can be written"
        ) from error
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_own or stat.S_IMODE(found.st_mode) & 0o077:
        raise StorageError(
            f"{folder}: expected a folder of user {os.geteuid()} with mode 700, got "
            f"{stat.filemode(found.st_mode)} of user {found.st_uid}; remove it, or set TMPDIR to "
            "another folder"
        )
    return folder
