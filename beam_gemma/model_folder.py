"""Model folders on Cloud Storage: copied to this machine once, whole, and checked.

A copy is named by the digest of its manifest. Each of its files is there only when it is what the
manifest says, so a copy that was cut short is taken up where it ended.
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beam_gemma.artifact import DESCRIPTION, MANIFEST, Artifact, FileEntry, sha256_of
from beam_gemma.durable import storage_client
from beam_gemma.errors import ArtifactError

SCHEME = "gs://"
DOWNLOADS = 8
"""Files that come at once."""
ATTEMPTS = 2
"""For each file."""


def open_model(model: str) -> Artifact:
    """Open a model folder, on this machine or on Cloud Storage, with all that it takes to run.

    Raises:
        ArtifactError: the folder is missing, of another format, or damaged.
    """
    return Artifact.open(_copy(model) if model.startswith(SCHEME) else model)


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
    copies = Path(tempfile.gettempdir()) / f"beam-gemma-models-{os.getuid()}"
    copies.mkdir(mode=0o700, exist_ok=True)
    folder = copies / digest
    with _locked(copies / f"{digest}.lock"), ThreadPoolExecutor(DOWNLOADS) as pool:
        folder.mkdir(exist_ok=True)
        if not (folder / MANIFEST).exists():
            _place(folder / MANIFEST, manifest)
        files = Artifact.read(folder).files
        missing = [
            name
            for name, entry in files.items()
            if (of_weights or name in DESCRIPTION) and not _is_there(folder / name, entry)
        ]
        for _ in pool.map(lambda name: _fetch(model, folder, name, files[name]), missing):
            pass  # so that errors are raised here
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
            _blob(model, name).download_to_filename(str(partial))
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
