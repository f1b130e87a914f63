"""Messages between the processes of a machine that share a model, over a socket of this user.

A message is its kind, the length of its body, and the body: an Arrow stream of rows or results, or
JSON. Nothing that is received is unpickled, so no message can make a process run code.
"""

import json
import os
import select
import socket
import struct
import time
import weakref
from collections.abc import Callable
from enum import IntEnum, auto
from typing import Any

import pyarrow as pa

from beam_gemma import errors
from beam_gemma.errors import BeamGemmaError, EngineError, one_line

HEADER = struct.Struct("!BQ")
"""Kind of a message, and the length of its body in bytes."""
TICK_SECS = 1.0
"""Time between two looks at how long the other side has been silent."""
MAX_RECEIVED = 1 << 20
"""Bytes to receive at once, so that a length that is not true takes no memory."""
ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, BeamGemmaError)
}
"""Errors that keep their type on the way to another process."""


class Kind(IntEnum):
    """What a message is; the body of a question is empty, except that of `ROWS`."""

    BEAT = auto()
    """The process that has the model is at work; sent while the other side waits."""
    READY = auto()
    """The model is loaded."""
    ROWS = auto()
    """Rows to compute."""
    RESULTS = auto()
    """Their results, in the order of the rows."""
    COUNTS = auto()
    """A question for the model's counts, or the counts as JSON."""
    PULSE = auto()
    """A question for the model's samples, or the samples as JSON."""
    FAILURE = auto()
    """An error, in place of an answer."""


class Wire:
    """One end of a connection between two processes of this user."""

    def __init__(
        self, sock: socket.socket, on_silence: Callable[[float], None] | None = None
    ) -> None:
        """Take over a connected socket.

        Args:
            sock: The socket, which the wire closes.
            on_silence: Called with the seconds since the other side last took or sent a byte, every
                `TICK_SECS` while this side waits; may raise. None to wait without looking.

        Raises:
            EngineError: the process at the other end belongs to another user.
        """
        self._socket = sock
        self._on_silence = on_silence
        sock.settimeout(None if on_silence is None else TICK_SECS)
        close_in_children(sock)
        pid, user = peer_of(sock)
        self.pid = pid
        """Id of the process at the other end; None where the system does not tell."""
        if user not in (None, os.geteuid()):
            sock.close()
            raise EngineError(
                f"engine: expected a process of user {os.geteuid()} at the other end of a socket, "
                f"got process {pid} of user {user}; set TMPDIR to a folder of your own"
            )

    def send(self, kind: Kind, body: bytes = b"") -> None:
        """Send a message.

        Raises:
            OSError: the other side has closed the connection.
        """
        left = memoryview(HEADER.pack(kind, len(body)) + body)
        heard = time.monotonic()
        while left:
            try:
                num_sent = self._socket.send(left)
            except TimeoutError:
                self._look(heard)
                continue
            left, heard = left[num_sent:], time.monotonic()

    def receive(self) -> tuple[Kind, bytes]:
        """Wait for a message and return its kind and its body.

        Raises:
            EOFError: the other side has closed the connection.
            EngineError: what came is no message.
            OSError: the connection is broken.
        """
        number, length = HEADER.unpack(self._bytes(HEADER.size))
        if number not in list(Kind):
            raise EngineError(
                f"engine: expected a message of a process that shares this model, got kind {number}"
            )
        return Kind(number), self._bytes(length)

    def is_usable(self) -> bool:
        """Return whether the other side has neither closed the connection nor sent anything."""
        waits = select.poll()
        try:
            waits.register(self._socket, select.POLLIN)
        except ValueError:  # closed, in a fork
            return False
        return not waits.poll(0)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _bytes(self, length: int) -> bytes:
        received = bytearray()
        heard = time.monotonic()
        while len(received) < length:
            try:
                part = self._socket.recv(min(length - len(received), MAX_RECEIVED))
            except TimeoutError:
                self._look(heard)
                continue
            if not part:
                raise EOFError("the connection was closed")
            received += part
            heard = time.monotonic()
        return bytes(received)

    def _look(self, heard: float) -> None:
        if self._on_silence is not None:
            self._on_silence(time.monotonic() - heard)


def peer_of(sock: socket.socket) -> tuple[int | None, int | None]:
    """Return the process and the user at the other end of a local socket; None where unknown."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None, None
    credentials = struct.Struct("3i")
    told = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    pid, user, _ = credentials.unpack(told)
    return pid, user


def batch_bytes(batch: pa.RecordBatch) -> bytes:
    """Return a record batch as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def batch_of(encoded: bytes) -> pa.RecordBatch:
    """Return the record batch of an Arrow stream.

    Raises:
        ArrowInvalid: the bytes are no valid batch.
    """
    batch = pa.ipc.open_stream(encoded).read_next_batch()
    batch.validate(full=True)
    return batch


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON."""
    return json.dumps(value).encode()


def failure_bytes(error: Exception) -> bytes:
    """Return an error as JSON; one that is not ours becomes an `EngineError`."""
    name = type(error).__name__
    if ERRORS.get(name) is type(error):
        return json_bytes([name, str(error)])
    sentence = (
        f"engine: expected results from process {os.getpid()}, which runs it for this machine, got "
        f"{one_line(error)}; see the log of that process"
    )
    return json_bytes([EngineError.__name__, sentence])


def failure_of(encoded: bytes) -> BeamGemmaError:
    """Return the error that `failure_bytes` encoded."""
    name, sentence = json.loads(encoded)
    return ERRORS.get(name, EngineError)(str(sentence))


_OPEN: "weakref.WeakSet[Any]" = weakref.WeakSet()


def close_in_children(closeable: Any) -> None:
    """Have a socket or file closed in processes that this one forks.

    A child that kept it open would hide the end of this process from those that wait for it.
    """
    _OPEN.add(closeable)


def _close_all() -> None:
    for closeable in list(_OPEN):
        closeable.close()


os.register_at_fork(after_in_child=_close_all)
