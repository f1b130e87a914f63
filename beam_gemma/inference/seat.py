"""The seat of a shared model: a lock and a socket in a folder that only this user can enter.

One process of a machine holds the lock, loads the model and listens at the socket. The operating
system releases the lock when the process ends, however it ends.
"""

import fcntl
import io
import logging
import os
import socket
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from beam_gemma.errors import StorageError, one_line
from beam_gemma.inference.wire import Wire, close_in_children
from beam_gemma.storage import owned_folder

LOGGER = logging.getLogger(__name__)
BACKLOG = 128
"""Connections that may wait to be accepted; more try again."""


class Seat:
    """The seat of one model, which a process may take, or else connect to."""

    def __init__(self, key: str) -> None:
        """Find the seat; nothing is locked or opened yet.

        Args:
            key: Name of the model, the same in all processes that share it.

        Raises:
            StorageError: the folder is not this user's alone, or cannot be created.
        """
        folder = Path(tempfile.gettempdir()) / f"beam-gemma-engines-{os.geteuid()}"
        self._folder = owned_folder(folder)
        self._lock_path = self._folder / f"{key}.lock"
        self._socket_name = f"{key}.socket"

    def take(self) -> "TakenSeat | None":
        """Take the seat; return None if a process has it.

        If the process that had it has died, a warning says so.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with _as_storage_errors(self._lock_path):
            lock = io.FileIO(os.open(self._lock_path, flags, 0o600), "r+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        if not is_file_at(lock, self._lock_path):  # its last owner has just removed it
            lock.close()
            return None
        _announce(lock.readall().decode())
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()).encode())
        close_in_children(lock)
        return TakenSeat(lock, self._lock_path, self._listen())

    def connect(self, on_silence: Callable[[float], None]) -> Wire | None:
        """Connect to the process that has the seat; return None if it does not listen yet.

        Args:
            on_silence: See `Wire`.

        Raises:
            EngineError: the process that listens belongs to another user.
        """
        sock = socket.socket(socket.AF_UNIX)
        try:
            with _short(self._folder) as folder:
                sock.connect(str(folder / self._socket_name))
            return Wire(sock, on_silence)
        except (FileNotFoundError, ConnectionError, BlockingIOError):
            sock.close()
            return None

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        with _as_storage_errors(self._folder / self._socket_name), _short(self._folder) as folder:
            # One that died has left its socket.
            (folder / self._socket_name).unlink(missing_ok=True)
            listener.bind(str(folder / self._socket_name))
            listener.listen(BACKLOG)
        close_in_children(listener)
        return listener


class TakenSeat:
    """A seat that this process has, until it leaves it or ends."""

    def __init__(self, lock: io.FileIO, lock_path: Path, listener: socket.socket) -> None:
        """Hold the lock of a seat, and listen."""
        self.listener = listener
        # A process that exits normally leaves its seat too.
        self.leave = weakref.finalize(self, _leave, os.getpid(), lock, lock_path, listener)
        """Function that stops listening, removes the seat's files and releases the lock."""


def _leave(pid: int, lock: io.FileIO, lock_path: Path, listener: socket.socket) -> None:
    if os.getpid() != pid:
        return  # a fork does not have the seat
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts connections
    listener.close()
    if is_file_at(lock, lock_path):
        lock_path.with_suffix(".socket").unlink(missing_ok=True)
        lock_path.unlink(missing_ok=True)
    lock.close()


def is_file_at(file: io.FileIO, path: Path) -> bool:
    """Return whether an open file still lies at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _announce(former: str) -> None:
    """Warn if the last owner of a seat, by its id in the lock, did not leave it."""
    if former:
        LOGGER.warning(
            "engine: process %s, which ran it for this machine, has died; process %d loads the "
            "model anew",
            former,
            os.getpid(),
        )


@contextmanager
def _short(folder: Path) -> Iterator[Path]:
    """Yield a short path to a folder, because the address of a socket has at most 107 bytes."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        short = Path(f"/proc/self/fd/{number}")
        yield short if short.exists() else folder
    finally:
        os.close(number)


@contextmanager
def _as_storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into a `StorageError` that names the path."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: expected to create it, got {one_line(error)}; set TMPDIR to another folder"
        ) from error
