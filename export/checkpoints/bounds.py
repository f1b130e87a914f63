"""Checks of what a checkpoint says of itself, made before anything is read or allocated for it.

A checkpoint comes from elsewhere: any length, count, offset or path in it may be wrong, by damage
or on purpose.
"""

import math
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beam_gemma.errors import CheckpointError

MAX_FILE_BYTES = 16 << 20
"""Largest settings file, and header of a safetensors file; Gemma's have at most 2 MB."""
MAX_TENSORS = 16_384
"""Most tensors in one file; the largest Gemma has about 1,200."""
MAX_NAME_BYTES = 1_024
"""Longest name of a tensor, in UTF-8."""
MAX_DIMS, MAX_DIM = 8, 1 << 40


class Span(NamedTuple):
    """The bytes [start, end) of a file that a named part of it occupies."""

    start: int
    end: int
    name: str


def inside(folder: Path, name: Any) -> Path:
    """Return the path of a file or folder that belongs to a checkpoint's folder.

    Symbolic links may lead to another file of the folder, or to the `blobs` of the Hugging Face
    cache that the folder is a snapshot in.

    Raises:
        CheckpointError: the name is none, or leads out of the folder.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_BYTES:
        raise CheckpointError(
            f"{folder}: expected the name of a file in it, got {reprlib.repr(name)}"
        )
    try:
        base, target = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL, a surrogate
        raise CheckpointError(
            f"{folder}: expected the name of a file in it, got {name!r:.80}, which is no path: "
            f"{error}"
        ) from error
    caches = [parent.with_name("blobs") for parent in base.parents if parent.name == "snapshots"]
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{folder}: expected the name of a file in it, got {name!r:.80}, which leads elsewhere"
        )
    if not any(target.is_relative_to(home) for home in (base, *caches)):
        raise CheckpointError(
            f"{folder / name}: expected a file of the folder, got a symbolic link to {target}; "
            "copy the file into the folder"
        )
    return folder / name


def is_file(file: Path) -> bool:
    """Return whether there is a regular file of this name, which may be too long for one."""
    try:
        return file.is_file()
    except OSError:
        return False


def file_bytes(file: Path) -> int:
    """Return the size of a file.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
    """
    if not is_file(file):
        raise CheckpointError(f"{file}: expected a checkpoint's file, got nothing")
    return file.stat().st_size


def read_file(file: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it is larger.
    """
    size = file_bytes(file)
    if size > limit:
        raise CheckpointError(f"{file}: expected at most {limit:,} bytes, got {size:,}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: expected a file that can be read, got {error}") from error


def check_count(file: Path, count: int) -> None:
    """Check the number of tensors in a file.

    Raises:
        CheckpointError: there are more than any Gemma has.
    """
    if count > MAX_TENSORS:
        raise CheckpointError(f"{file}: expected at most {MAX_TENSORS:,} tensors, got {count:,}")


def check_name(file: Path, name: str) -> None:
    """Check a tensor's name.

    Raises:
        CheckpointError: it is empty, too long, or no Unicode.
    """
    length = len(name.encode(errors="surrogatepass"))
    if not 0 < length <= MAX_NAME_BYTES or not name.isprintable():
        raise CheckpointError(
            f"{file}: expected printable names of 1 to {MAX_NAME_BYTES:,} bytes for tensors, got "
            f"one of {length:,} bytes, {name[:40]!a}; copy the file again"
        )


def check_shape(file: Path, name: str, shape: Any) -> None:
    """Check that a shape is 1 to `MAX_DIMS` whole numbers from 1 to `MAX_DIM`.

    Raises:
        CheckpointError: it is not.
    """
    if (
        not isinstance(shape, list | tuple)
        or not 0 < len(shape) <= MAX_DIMS
        or any(type(dim) is not int or not 1 <= dim <= MAX_DIM for dim in shape)
    ):
        raise CheckpointError(
            f"{file}: expected the shape of {name} as 1 to {MAX_DIMS} numbers from 1 to "
            f"{MAX_DIM:,}, got "
            f"{reprlib.repr(shape)}; copy the file again"
        )


def check_length(file: Path, name: str, shape: Sequence[int], length: int, item: int) -> None:
    """Check that a tensor's length in bytes is that of its shape, for items of `item` bytes.

    Raises:
        CheckpointError: it is not.
    """
    expected = math.prod(shape) * item
    if length != expected:
        raise CheckpointError(
            f"{file}: expected {expected:,} bytes of {name} for its shape {list(shape)}, got "
            f"{length:,}; copy the file again"
        )


def check_spans(
    file: Path, spans: Iterable[Span], start: int, size: int, *, gaps: bool = False
) -> None:
    """Check that tensors lie in a file after its header and share no byte.

    Args:
        file: For the message.
        spans: The places of the tensors, in any order.
        start: Bytes in the header.
        size: Bytes in the file.
        gaps: Whether there may be bytes that belong to none.

    Raises:
        CheckpointError: a tensor reaches beyond the file, two overlap, or there is a gap.
    """
    last = Span(0, start, "the header")
    for span in sorted(spans):
        if span.end > size:
            raise CheckpointError(
                f"{file}: the file ends inside the tensor {span.name}; copy it again"
            )
        if span.start < last.end:
            raise CheckpointError(
                f"{file}: expected each tensor at bytes of its own, got {last.name} and "
                f"{span.name} at the same; copy the file again"
            )
        if span.start > last.end and not gaps:
            raise CheckpointError(
                f"{file}: expected {span.name} right after {last.name}, got a gap of "
                f"{span.start - last.end:,} bytes; copy the file again"
            )
        last = span
    if last.end < size and not gaps:
        raise CheckpointError(
            f"{file}: expected the end of the file after {last.name}, got {size - last.end:,} "
            "bytes more; copy the file again"
        )
