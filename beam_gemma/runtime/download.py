"""Opens model folders; one on Cloud Storage is copied to this machine once and verified.

A copy is named by the digest of its manifest. A file appears in it only after it was checked
against the manifest, so an interrupted copy resumes with the missing files. The workers' image may
already contain the copy under the same name.
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from google.cloud.storage import transfer_manager

from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import DESCRIPTION, MANIFEST, Artifact, FileEntry, sha256_of
from beam_gemma.monitoring.startup_log import logged
from beam_gemma.storage import CLOUD_STORAGE, blob_at

BAKED = Path("/opt/beam-gemma/models")
"""Folder of copies in the workers' image."""
DOWNLOADS = 8
"""Number of a file's parts that are downloaded at once."""
PART_BYTES = 32 << 20
ATTEMPTS = 2
"""Download attempts per file."""


def open_model(model: str) -> Artifact:
    """Open a model folder, on this machine or on Cloud Storage, with all files.

    All checksums are verified: those of a copy when it is made, those of a local folder now.

    Raises:
        ArtifactError: the folder is missing, of another format, or damaged.
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
    """
    if not model.startswith(CLOUD_STORAGE):
        return Artifact.open(model)
    return Artifact.open(_copy(model, of_weights=False), of_weights=False)


def _copy(model: str, *, of_weights: bool = True) -> Path:
    """Return a local copy of a model folder; a lock makes other processes wait meanwhile."""
    manifest = _read(model, MANIFEST)
    digest = hashlib.sha256(manifest).hexdigest()
    if (BAKED / digest).is_dir():
        return BAKED / digest
    copies = Path(tempfile.gettempdir()) / f"beam-gemma-models-{os.getuid()}"
    copies.mkdir(mode=0o700, exist_ok=True)
    folder = copies / digest
    with _locked(copies / f"{digest}.lock"):
        folder.mkdir(exist_ok=True)
        if not (folder / MANIFEST).exists():
            _place(folder / MANIFEST, manifest)
        for name, entry in Artifact.read(folder).files.items():
            if (of_weights or name in DESCRIPTION) and not _is_there(folder / name, entry):
                _fetch(model, folder, name, entry)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the operating system releases the lock if the process dies."""
    with path.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _is_there(file: Path, entry: FileEntry) -> bool:
    return file.is_file() and file.stat().st_size == entry.num_bytes


def _fetch(model: str, folder: Path, name: str, entry: FileEntry) -> None:
    """Download a file under a temporary name, check it, then rename it.

    Raises:
        ArtifactError: all attempts failed, or the file's name points outside the folder.
    """
    target = folder / name
    if not target.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{model}: expected files inside the folder, got {name!r}; export the model again"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            _download(_blob(model, name), partial)
        except Exception as error:  # the client raises many types; the last is reported
            reason = _sentence(error)
            continue
        if _is_there(partial, entry) and entry.sha256 in (None, sha256_of(partial)):
            partial.rename(target)
            return
        reason = f"other content, {partial.stat().st_size:,} bytes"
    raise ArtifactError(
        f"{model.rstrip('/')}/{name}: expected {entry.num_bytes:,} bytes with sha256 "
        f"{entry.sha256}, got {reason}; upload the folder again"
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
    partial.write_bytes(content)
    partial.rename(file)


def _blob(model: str, name: str) -> Any:
    return blob_at(f"{model.rstrip('/')}/{name}")
