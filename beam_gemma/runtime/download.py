"""Model folders on Cloud Storage: copied to this machine once, whole, and checked.

A copy is named by the digest of its manifest. Each of its files is there only when it is what the
manifest says, so a copy that was cut short is taken up where it ended. An image of workers may
bring the copy along, under the same name.
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
from beam_gemma.storage import storage_client

SCHEME = "gs://"
BAKED = Path("/opt/beam-gemma/models")
"""Copies that the image of workers brings along."""
DOWNLOADS = 8
"""Parts of a file that come at once."""
PART_BYTES = 32 << 20
ATTEMPTS = 2
"""For each file."""


def open_model(model: str) -> Artifact:
    """Open a model folder, on this machine or on Cloud Storage, with all that it takes to run.

    Every checksum has been compared then: of a copy when it was made, of another folder now.

    Raises:
        ArtifactError: the folder is missing, of another format, or damaged.
    """
    if model.startswith(SCHEME):
        with logged(f"copied {model}"):
            return Artifact.open(_copy(model))
    artifact = Artifact.open(model)
    with logged(f"checked {model}"):
        artifact.verify()
    return artifact


def open_description(model: str) -> Artifact:
    """Open what says of a model what it is; of a folder on Cloud Storage nothing else is read.

    Raises:
        ArtifactError: the folder is missing, of another format, or damaged.
    """
    if not model.startswith(SCHEME):
        return Artifact.open(model)
    return Artifact.open(_copy(model, of_weights=False), of_weights=False)


def _copy(model: str, *, of_weights: bool = True) -> Path:
    """Return a folder of this machine that holds the files of a model; others wait meanwhile."""
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
    """Hold a lock of this machine; the system releases it where its holder dies."""
    with path.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _is_there(file: Path, entry: FileEntry) -> bool:
    return file.is_file() and file.stat().st_size == entry.num_bytes


def _fetch(model: str, folder: Path, name: str, entry: FileEntry) -> None:
    """Copy a file, check it, and only then give it its name."""
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
        except Exception as error:  # the client has many; the second is reported
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
    """Copy a file in parts, several at once."""
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
    except Exception as error:  # the client has many, and one remedy
        raise ArtifactError(
            f"{model}: expected a model folder with {name}, got {_sentence(error)}; check the "
            "name and who may read it"
        ) from error


def _sentence(error: Exception) -> str:
    """Return what an error of the client says in its first line."""
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first}"


def _place(file: Path, content: bytes) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(content)
    partial.rename(file)


def _blob(model: str, name: str) -> Any:
    bucket, _, folder = model.removeprefix(SCHEME).rstrip("/").partition("/")
    return storage_client().bucket(bucket).blob(f"{folder}/{name}" if folder else name)
