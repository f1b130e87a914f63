"""One model for all processes of a machine.

The process that first needs the model loads it and serves the others. If it ends, the next process
that needs the model loads it anew.
"""

import functools
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pyarrow as pa

from beam_gemma.errors import EngineError
from beam_gemma.inference.carried_rows import RowCarrier
from beam_gemma.inference.model_server import ModelServer
from beam_gemma.inference.seat import Seat
from beam_gemma.inference.wire import Kind, Wire, batch_of, failure_of
from beam_gemma.inputs.row import Row
from beam_gemma.tasks.interface import Model

LOGGER = logging.getLogger(__name__)
WARNING_SECS = 30.0
"""Silence of the process that has the model after which a warning is logged."""
LIMIT_SECS = 600.0
"""Silence after which a call fails."""
RETRY_SECS = 0.05
"""Time between two attempts to connect to a process that has taken the seat."""


class SharedModel:
    """A model in this process or in another one of this machine; threads may share it."""

    def __init__(
        self,
        key: str,
        load: Callable[[], Model],
        carrier: Callable[[], RowCarrier],
        result_schema: pa.Schema,
    ) -> None:
        """Load the model, or wait until another process has loaded it.

        Args:
            key: Name of the model, the same in all processes that share it.
            load: Loads the model, if this process is the first.
            carrier: Returns what makes rows ready to cross; called when rows first do.
            result_schema: The schema of the model's results.

        Raises:
            EngineError: the process that has the model has been silent for `LIMIT_SECS`.
            StorageError: the folder of the lock and the socket is not this user's alone.
        """
        self._key = key
        self._load = load
        self._new_carrier = carrier
        self._schema = result_schema
        self._server: ModelServer | None = None
        self._idle: list[Wire] = []
        self._lock = threading.Lock()  # guards the two above
        self._of_parent: ModelServer | None = None
        """A server whose threads a fork lacks; it is kept, as to end it would need them."""
        weakref.finalize(self, _close, self._idle)
        _ALL.add(self)
        with self._connection():
            pass

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the result columns of each row, in order.

        Raises:
            EngineError: the process that has the model has died or is silent, or its engine has
                stopped.
        """
        with self._connection() as other:
            if isinstance(other, Wire):
                found = batch_of(_ask(other, Kind.ROWS, self._carrier(rows)))
                return found.to_pylist(maps_as_pydicts="strict")
            return other(rows)

    def take_counts(self) -> dict[str, int]:
        """Return the model's counts since any process last took them."""
        with self._connection() as other:
            if isinstance(other, Wire):
                return json.loads(_ask(other, Kind.COUNTS))
            return other.take_counts()

    def take_pulse(self) -> dict[str, Any]:
        """Return the model's samples since any process last took them."""
        with self._connection() as other:
            if isinstance(other, Wire):
                return json.loads(_ask(other, Kind.PULSE))
            return other.take_pulse()

    def after_fork(self) -> None:
        """Forget the connections and threads of the process that this one was forked from."""
        self._lock = threading.Lock()
        self._idle.clear()
        self._of_parent, self._server = self._server, None

    @functools.cached_property
    def _carrier(self) -> RowCarrier:
        return self._new_carrier()

    @contextmanager
    def _connection(self) -> "Iterator[Model | Wire]":
        """Yield the model if it is in this process, else a connection to the process that has it.

        A connection whose call failed is closed; the next call connects anew.
        """
        with self._lock:
            server = self._server
            wire = self._idle.pop() if self._idle else None
        if server is not None and server.model is not None:
            yield server.model
            return
        if wire is None or not wire.is_usable():
            joined = self._join()
            if not isinstance(joined, Wire):
                yield joined
                return
            wire = joined
        try:
            yield wire
        except BaseException:  # an answer may still come, which no call waits for
            wire.close()
            raise
        with self._lock:
            self._idle.append(wire)

    def _join(self) -> Model | Wire:
        """Load the model if no process has it, else connect to the one that has."""
        seat = Seat(self._key)
        on_silence = _Watch()
        began = time.monotonic()
        while True:
            if (taken := seat.take()) is not None:
                return self._own(ModelServer(taken, self._schema))
            wire = seat.connect(on_silence)
            if wire is not None:
                on_silence.pid = wire.pid
                # A process that ends before its model is loaded leaves the seat to this one.
                with suppress(EOFError, ConnectionError):
                    _answer(wire)
                    return wire
                wire.close()
                began = time.monotonic()
            time.sleep(RETRY_SECS)
            on_silence(time.monotonic() - began)

    def _own(self, server: ModelServer) -> Model:
        try:
            model = self._load()
        except BaseException:  # whatever ends the loading ends the waiting of others
            server.close()
            raise
        server.open(model)
        with self._lock:
            self._server = server
            _close(self._idle)
        return model


class _Watch:
    """Judges the silence of the process that has the model: it is noted, then an error."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self._last = 0.0

    def __call__(self, secs: float) -> None:
        if secs >= LIMIT_SECS:
            raise EngineError(
                f"engine: expected a sign of life from {self._who()} within {LIMIT_SECS:g} s, got "
                "none; continue or end that process, then run the job again"
            )
        if secs >= WARNING_SECS > self._last:
            LOGGER.warning(
                "engine: %s has given no sign of life for %.0f s; this process waits for it up to "
                "%g s",
                self._who(),
                secs,
                LIMIT_SECS,
            )
        self._last = secs

    def _who(self) -> str:
        who = "the process that runs it for this machine"
        with suppress(psutil.Error):
            if self.pid is not None:
                who += f" ({self.pid}, {psutil.Process(self.pid).status()})"
        return who


def _close(idle: list[Wire]) -> None:
    """Close connections that no call uses."""
    while idle:
        idle.pop().close()


def _ask(wire: Wire, kind: Kind, body: bytes = b"") -> bytes:
    """Return the answer to a question.

    Raises:
        BeamGemmaError: the error that the other process got.
        EngineError: the other process has died, or is silent.
    """
    try:
        wire.send(kind, body)
        return _answer(wire)
    except (ConnectionError, EOFError) as error:
        raise EngineError(
            "engine: expected an answer from the process that runs it for this machine, got "
            f"{type(error).__name__}, so it has died, for want of memory perhaps; these rows "
            "are lost unless the runner retries their bundle"
        ) from error


def _answer(wire: Wire) -> bytes:
    """Wait for an answer, through all beats, and return its body."""
    kind, body = wire.receive()
    while kind is Kind.BEAT:
        kind, body = wire.receive()
    if kind is Kind.FAILURE:
        raise failure_of(body)
    return body


_ALL: "weakref.WeakSet[SharedModel]" = weakref.WeakSet()


def _forget_all() -> None:
    for model in list(_ALL):
        model.after_fork()


os.register_at_fork(after_in_child=_forget_all)
