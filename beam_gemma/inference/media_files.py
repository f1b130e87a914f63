"""Files of pictures and sounds that rows name by path or URI, read within limits.

A file that cannot be read is an error of its row, which `inputs/images.py` and `inputs/sounds.py`
give the column's name. Only the file that the row names is read: on a file system that Beam knows,
never from a web server, which could be any machine of a network.
"""

import errno
import io
import os
import posixpath
import re
import shutil
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems

from beam_gemma.errors import OptionsError, RecordError, one_line
from beam_gemma.inputs.images import image_value
from beam_gemma.inputs.row import MediaKind
from beam_gemma.inputs.sounds import sound_value
from beam_gemma.storage import CLOUD_STORAGE, blob_at, open_file

MAX_IMAGE_BYTES = 20_000_000
MAX_AUDIO_BYTES = 100_000_000
MAX_SECS = 60.0
NUM_READ_AT_ONCE = 8
"""Most files that a process reads at the same time; the client of Cloud Storage keeps 10
connections."""
CHUNK_BYTES = 1 << 20
TRIES = 3
"""Attempts to read a file that is not on this machine, unless it is missing or forbidden."""
PAUSE_SECS = 0.5
"""Pause before the second attempt; it doubles before each further one."""
MAX_SHOWN = 200
"""Characters of a path that an error shows."""
T = TypeVar("T")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_WEB = ("http", "https", "ftp")
_SLOTS = threading.BoundedSemaphore(NUM_READ_AT_ONCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileReading:
    """Limits of reading the files that rows name by path or URI."""

    kind: ClassVar[MediaKind]
    allowing: ClassVar[str]
    """How errors say to allow files of the machine that reads them."""

    max_bytes: int
    """Most bytes of a file."""
    max_secs: float = MAX_SECS
    """Longest time that a file may take."""
    allow_local: bool = False
    """True if rows may name files of the machine that reads them."""
    folder: str | None = None
    """Folder that relative paths start from; None if they are errors."""

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise OptionsError(f"max_{self.kind}_bytes: expected at least 1, got {self.max_bytes}")
        if not self.max_secs > 0:
            raise OptionsError(f"max_secs: expected more than 0, got {self.max_secs}")

    def place_of(self, name: str) -> str:
        """Return where the file is that a row names by a path or URI.

        Raises:
            RecordError: no file at that place may be read.
        """
        scheme = _SCHEME.match(name)
        if scheme is None:
            place = name if name.startswith("/") else self._within_folder(name)
        elif scheme[1].lower() in _WEB:
            _refuse(
                "a path or a URI such as gs://, as web servers are not asked",
                f"the address {_shown(name)}; copy its file to a bucket or folder",
            )
        else:
            place = _of_file_uri(name) if scheme[1].lower() == "file" else name
        if not (_SCHEME.match(place) or self.allow_local):
            _refuse(
                "a URI such as gs://, as files of a worker's own disk are read only with "
                f"{self.allowing}",
                _shown(name),
            )
        return place

    def check_size(self, num_bytes: int) -> None:
        """Check the size of a file.

        Raises:
            RecordError: it is too large.
        """
        if num_bytes > self.max_bytes:
            _refuse(
                f"at most {self.max_bytes:,} bytes",
                f"a larger file; set max_{self.kind}_bytes higher",
            )

    def _within_folder(self, name: str) -> str:
        """Return the place of a relative path in the table's folder."""
        if self.folder is None:
            _refuse("a URI such as gs://, as the table has no folder for paths", _shown(name))
        path = posixpath.normpath(name)
        if path == ".." or path.startswith("../"):
            _refuse("a path that stays in the folder of the table", _shown(name))
        return f"{self.folder.rstrip('/')}/{path}" if self.folder else path


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageReading(FileReading):
    """Limits of reading the pictures that rows name by path or URI.

    Example:
        >>> reading = ImageReading(max_bytes=5_000_000, folder="gs://shop/products")
        >>> reading.place_of("shoes/1.jpg")
        'gs://shop/products/shoes/1.jpg'
    """

    kind: ClassVar[MediaKind] = "image"
    allowing: ClassVar[str] = "--allow_local_images or ImageReading(allow_local=True)"

    max_bytes: int = MAX_IMAGE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioReading(FileReading):
    """Limits of reading the sounds that rows name by path or URI.

    Example:
        >>> reading = AudioReading(folder="gs://calls/2026")
        >>> reading.place_of("11/30.flac")
        'gs://calls/2026/11/30.flac'
    """

    kind: ClassVar[MediaKind] = "audio"
    allowing: ClassVar[str] = "--allow_local_audio or AudioReading(allow_local=True)"

    max_bytes: int = MAX_AUDIO_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaReading:
    """Limits of reading the pictures and the sounds of rows."""

    image: ImageReading = ImageReading()
    audio: AudioReading = AudioReading()

    def of(self, kind: MediaKind) -> FileReading:
        """Return the limits for files of one kind."""
        return self.image if kind == "image" else self.audio


FILE = pa.struct([("bytes", pa.large_binary()), ("error", pa.string())])
"""A picture or sound once it is fetched: the bytes of its file, or why they cannot be had."""
VALUE_OF: Mapping[MediaKind, Callable[[Any, str], bytes | str | None]] = {
    "image": image_value,
    "audio": sound_value,
}
"""Functions that return what a value stands for, by the kind of file."""


class PendingFile:
    """A file that a thread of its own reads, so that one that hangs stops nothing else."""

    def __init__(self, name: str, reading: FileReading, version: str | None = None) -> None:
        """Start to read; wait first while this process reads as many files as it may.

        Args:
            name: The path or URI of the file.
            reading: The limits.
            version: Generation of an object on Cloud Storage; None for the newest.
        """
        self._name, self._reading, self._version = name, reading, version
        self._future: Future[bytes] = Future()
        self._is_free = threading.Lock()
        _SLOTS.acquire()
        self._due = time.monotonic() + reading.max_secs
        threading.Thread(target=self._run, daemon=True).start()

    def result(self) -> bytes:
        """Wait for the file and return its bytes.

        Raises:
            RecordError: the file cannot be read, is too large, or takes too long.
        """
        try:
            return self._future.result(max(0.0, self._due - time.monotonic()))
        except TimeoutError:
            self._free()
            _too_slow(self._name, self._reading)

    def _run(self) -> None:
        try:
            content = _read(self._name, self._version, self._reading, self._due)
            self._future.set_result(content)
        except Exception as error:  # it is the waiting thread that raises it
            self._future.set_exception(error)
        finally:
            self._free()

    def _free(self) -> None:
        """Let another file be read in place of this one; only the first call has an effect."""
        if self._is_free.acquire(blocking=False):
            _SLOTS.release()


def begin_reading(item: Any, reading: FileReading) -> dict[str, Any] | PendingFile | None:
    """Return a picture or sound as the fields of `FILE`, or the reading of its file; None for none.

    Args:
        item: What a column may have for it; see `inputs/images.py` and `inputs/sounds.py`.
        reading: The limits of reading files.
    """
    try:
        source = None if item is None else VALUE_OF[reading.kind](item, "value")
        if isinstance(source, str):
            version = item.get("version") if isinstance(item, Mapping) else None
            return PendingFile(source, reading, version and str(version))
        if source is None:
            return None
        reading.check_size(len(source))
    except RecordError as error:
        return unreadable(str(error))
    return {"bytes": source, "error": None}


def unreadable(message: str) -> dict[str, Any]:
    """Return a file that cannot be had as the fields of `FILE`."""
    return {"bytes": None, "error": message}


def read_ahead(rows: Iterable[dict[T, list[Any] | None]]) -> Iterator[dict[T, list[Any] | None]]:
    """Yield the media of rows once their files are read; files of later rows are read meanwhile.

    Args:
        rows: The pictures and sounds of each row, by whatever names them, as `begin_reading`
            returns them. Rows are asked for as their files can be read.
    """
    begun: deque[dict[T, list[Any] | None]] = deque()
    num_begun = 0
    for row in rows:
        begun.append(row)
        num_begun += _num_files(row)
        while begun and (max(num_begun, len(begun)) >= NUM_READ_AT_ONCE or not num_begun):
            num_begun -= _num_files(begun[0])
            yield _waited(begun.popleft())
    yield from map(_waited, begun)


def _num_files(row: dict[Any, list[Any] | None]) -> int:
    return sum(isinstance(i, PendingFile) for items in row.values() for i in items or ())


def _waited(row: dict[T, list[Any] | None]) -> dict[T, list[Any] | None]:
    return {
        name: None if items is None else [_file(item) for item in items]
        for name, items in row.items()
    }


def _file(item: Any) -> Any:
    if not isinstance(item, PendingFile):
        return item
    try:
        return {"bytes": item.result(), "error": None}
    except RecordError as error:
        return unreadable(str(error))


class _Received(io.BytesIO):
    """The bytes of a file so far; more than the limits allow are an error."""

    def __init__(self, name: str, reading: FileReading, due: float) -> None:
        super().__init__()
        self.reading = reading
        self._name, self._due = name, due

    @property
    def secs_left(self) -> float:
        """Time until the file is due; at least a little."""
        return max(0.01, self._due - time.monotonic())

    def write(self, chunk: "bytes | memoryview") -> int:  # type: ignore[override]
        """Add bytes.

        Raises:
            RecordError: there are too many, or they come too late.
        """
        self.reading.check_size(self.tell() + len(chunk))
        if time.monotonic() > self._due:
            _too_slow(self._name, self.reading)
        return super().write(chunk)


def _read(name: str, version: str | None, reading: FileReading, due: float) -> bytes:
    place = reading.place_of(name)
    read, tries = _reader(place, version)
    for number in range(1, tries + 1):
        received = _Received(name, reading, due)
        try:
            read(place, received)
            return received.getvalue()
        except RecordError:
            raise
        except Exception as error:  # each file system has its own exceptions
            _raise_if_final(name, place, error)
            pause = PAUSE_SECS * 2 ** (number - 1)
            is_final = number == tries or isinstance(error, ValueError)
            if is_final or pause >= received.secs_left:
                raise RecordError(
                    f"expected a file that can be read, got {one_line(error)[:MAX_SHOWN]} for "
                    f"{_shown(name)}"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _reader(place: str, version: str | None) -> tuple[Callable[[str, _Received], None], int]:
    """Return the function that reads a place, and how often to try."""
    if place.startswith(CLOUD_STORAGE):
        return partial(_read_object, version), TRIES
    return (_read_elsewhere, TRIES) if _SCHEME.match(place) else (_read_local, 1)


def _read_local(place: str, received: _Received) -> None:
    # A pipe that nobody writes to would block the opening.
    number = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(number, "rb", buffering=0) as file:  # noqa: PTH123 - it is open already
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "no file", place)
        received.reading.check_size(found.st_size)
        shutil.copyfileobj(file, received, CHUNK_BYTES)


def _read_object(version: str | None, place: str, received: _Received) -> None:
    if not all(place.removeprefix(CLOUD_STORAGE).partition("/")[::2]):
        _refuse("a URI with a bucket and the name of an object in it", _shown(place))
    blob = blob_at(place)
    if version is not None:
        blob = blob.bucket.blob(blob.name, generation=version)
    # One request, whose answer is read piece by piece.
    blob.download_to_file(received, timeout=received.secs_left, retry=None)


def _read_elsewhere(place: str, received: _Received) -> None:
    with open_file(place) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            received.write(chunk)


def _raise_if_final(name: str, place: str, error: Exception) -> None:
    """Raise an error of the row if another attempt would end in the same one."""
    code = getattr(error, "code", None)  # of Google's clients
    if isinstance(error, IsADirectoryError):
        _refuse("a file", f"a folder, pipe or device at {_shown(name)}")
    if isinstance(error, PermissionError) or code in (401, 403):
        _refuse("a file that may be read", f"no permission for {_shown(name)}")
    is_missing = isinstance(error, FileNotFoundError | NotADirectoryError) or code == 404
    if is_missing or (isinstance(error, BeamIOError) and not _is_there(place)):
        _refuse("a file that is there", f"none at {_shown(name)}")
    if isinstance(error, ValueError) and _SCHEME.match(place) and not _is_known(place):
        _refuse("a path or a URI of a known file system", _shown(name))


def _is_there(place: str) -> bool:
    with suppress(Exception):  # the first error tells more
        return bool(FileSystems.exists(place))
    return True


def _is_known(place: str) -> bool:
    try:
        FileSystems.get_filesystem(place)
    except ValueError:
        return False
    return True


def _of_file_uri(name: str) -> str:
    """Return the path of a file:// URI."""
    try:
        parts = urlsplit(name)
        is_here = parts.netloc in ("", "localhost")
    except ValueError:
        is_here = False
    if not is_here:
        _refuse("a file URI of this machine, such as file:///photos/1.jpg", _shown(name))
    return str(Path("/", unquote(parts.path)))


def _too_slow(name: str, reading: FileReading) -> NoReturn:
    _refuse(f"a file that is read within {reading.max_secs:g} s", f"no end of {_shown(name)}")


def _shown(name: str) -> str:
    return repr(name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}...")


def _refuse(expected: str, got: str) -> NoReturn:
    raise RecordError(f"expected {expected}, got {got}")
