"""Opens model folders; one on Cloud Storage is copied to this machine once and verified.

A copy is named by the digest of its manifest and lies in a folder that only its user can enter. A
file appears in it only after it was checked against the manifest, so an interrupted copy resumes
with the missing files. A file that has changed since is checked again, and fetched again if it is
not as exported. The workers' image may already contain the copy under the same name.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.cloud.storage import transfer_manager

from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import DESCRIPTION, MANIFEST, Artifact, FileEntry, sha256_of
from beam_gemma.monitoring.startup_log import logged
from beam_gemma.storage import CLOUD_STORAGE, blob_at, owned_folder

BAKED = Path("/opt/beam-gemma/models")
"""Folder of copies in the workers' image."""
DOWNLOADS = 8
"""Number of a file's parts that are downloaded at once."""
PART_BYTES = 32 << 20
ATTEMPTS = 2
"""Download attempts per file."""


def open_model(model: str) -> Artifact:
    """Open a model folder, on this machine or on Cloud Storage, with all files.

    All checksums are verified: those of a copy when it is made or has changed, those of a local
    folder now.

    Raises:
        ArtifactError: the folder is missing, of another format, or damaged.
        StorageError: the folder of copies belongs to another user or is open to others.
    """
    if model.startswith(CLOUD_STORAGE):
        with logged(f"copied {model}"):
            return Artifact.open(_copy(model))
    artifact = Artifact.open(model)
    with logged(f"checked {model}"):
        artifact.verify()
    return artifact


def open_description(model: str) -> Artifact:
    """Open a model folder; from Cloud Storage, fetch only the manifest and `DESCRIPTION` files.

    Raises:
        ArtifactError: the folder is missing, of another format, or damaged.
        StorageError: the folder of copies belongs to another user or is open to others.
    """
    if not model.startswith(CLOUD_STORAGE):
        return Artifact.open(model)
    return Artifact.open(_copy(model, of_weights=False), of_weights=False)


def _copy(model: str, *, of_weights: bool = True) -> Path:
    """Return a verified local copy of a model folder; a lock makes other processes wait."""
    manifest = _read(model, MANIFEST)
    digest = hashlib.sha256(manifest).hexdigest()
    copies = owned_folder(Path(tempfile.gettempdir()) / f"beam-gemma-models-{os.getuid()}")
    with _locked(copies / f"{digest}.lock"):
        verified = _Verified(copies / f"{digest}.verified.json")
        if is_baked := (BAKED / digest).is_dir():
            folder = BAKED / digest
            _check_baked(folder, digest)
        else:
            folder = _folder_of_copy(copies / digest, manifest)
        for name, entry in Artifact.read(folder).files.items():
            file = folder / name
            _refuse_link(folder, file.parent)
            if not (of_weights or name in DESCRIPTION) or verified.has(file, entry):
                continue
            if is_baked:
                raise ArtifactError(
                    f"{file}: expected {_wanted(entry)}, got another file; build the image again"
                )
            _fetch(model, folder, name, entry)
            verified.add(file, entry)
    return folder


def _folder_of_copy(folder: Path, manifest: bytes) -> Path:
    """Return this user's folder of a copy, with the manifest of the copied model."""
    if folder.is_dir() and not folder.is_symlink():
        # Version 0.7.0 made it with mode 755, within a folder that nobody else can enter.
        folder.chmod(0o700)
    owned_folder(folder)
    file = folder / MANIFEST
    if file.is_symlink() or not file.is_file() or file.read_bytes() != manifest:
        _place(file, manifest)
    return folder


def _check_baked(folder: Path, digest: str) -> None:
    """Check that a folder in the image has the manifest that it is named by.

    Raises:
        ArtifactError: it has another one, or none.
    """
    file = folder / MANIFEST
    if not file.is_file() or sha256_of(file) != digest:
        raise ArtifactError(
            f"{file}: expected a manifest with the sha256 that its folder is named by, got "
            "another; build the image again"
        )


def _refuse_link(folder: Path, parent: Path) -> None:
    """Check that no part of the path from a copy's folder to a folder within it is a link."""
    if parent.resolve() != folder.resolve() / parent.relative_to(folder):
        raise ArtifactError(
            f"{parent}: expected a folder of a model's copy, got a link; remove {folder}"
        )


class _Verified:
    """The files whose checksums were right, each by a stamp that changes when the file does."""

    def __init__(self, record: Path) -> None:
        """Read the stamps of earlier processes; without them, files are verified again."""
        self._record = record
        self._stamps: dict[str, Any] = {}
        if _stamp(record) is not None:
            with contextlib.suppress(ValueError, TypeError):
                self._stamps = dict(json.loads(record.read_bytes()))

    def has(self, file: Path, entry: FileEntry) -> bool:
        """Return whether a file is there as exported; it is read only if its stamp is new."""
        stamp = _stamp(file)
        if stamp is None:
            return False
        if self._stamps.get(str(file)) == [entry.sha256, *stamp]:
            return True
        if not _is_whole(file, entry):
            return False
        self._keep(file, [entry.sha256, *stamp])
        return True

    def add(self, file: Path, entry: FileEntry) -> None:
        """Remember a file that was verified under another name."""
        self._keep(file, [entry.sha256, *(_stamp(file) or ())])

    def _keep(self, file: Path, stamp: list[Any]) -> None:
        self._stamps[str(file)] = stamp
        _place(self._record, json.dumps(self._stamps).encode())


def _stamp(file: Path) -> tuple[int, ...] | None:
    """Return numbers that change when a file does; None if it is missing, a link or not ours.

    A file is ours if it belongs to the owner of its folder, which is root in an image.
    """
    try:
        found, folder = file.lstat(), file.parent.lstat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_uid != folder.st_uid:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the operating system releases the lock if the process dies."""
    with path.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _is_whole(file: Path, entry: FileEntry) -> bool:
    return file.stat().st_size == entry.num_bytes and entry.sha256 in (None, sha256_of(file))


def _wanted(entry: FileEntry) -> str:
    return f"{entry.num_bytes:,} bytes with sha256 {entry.sha256}"


def _fetch(model: str, folder: Path, name: str, entry: FileEntry) -> None:
    """Download a file under a temporary name, check it, then rename it.

    Raises:
        ArtifactError: all attempts failed.
    """
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    reason = ""
    for _ in range(ATTEMPTS):
        partial.unlink(missing_ok=True)
        try:
            _download(_blob(model, name), partial)
        except Exception as error:  # the client raises many types; the last is reported
            reason = _sentence(error)
            continue
        if _is_whole(partial, entry):
            partial.rename(target)
            return
        reason = f"other content, {partial.stat().st_size:,} bytes"
    raise ArtifactError(
        f"{model.rstrip('/')}/{name}: expected {_wanted(entry)}, got {reason}; upload the folder "
        "again"
    )


def _download(blob: Any, file: Path) -> None:
    """Download a file in parts, several at once."""
    transfer_manager.download_chunks_concurrently(
        blob,
        str(file),
        chunk_size=PART_BYTES,
        worker_type=transfer_manager.THREAD,
        max_workers=DOWNLOADS,
    )


def _read(model: str, name: str) -> bytes:
    try:
        return _blob(model, name).download_as_bytes()
    except Exception as error:  # the client raises many types, with one remedy
        raise ArtifactError(
            f"{model}: expected a model folder with {name}, got {_sentence(error)}; check the "
            "name and who may read it"
        ) from error


def _sentence(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first}"


def _place(file: Path, content: bytes) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)
    partial.write_bytes(content)
    partial.rename(file)


def _blob(model: str, name: str) -> Any:
    return blob_at(f"{model.rstrip('/')}/{name}")
