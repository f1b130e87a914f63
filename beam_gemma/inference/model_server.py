"""The process that has a shared model: it answers the other processes of its machine.

While another process waits, for the model to load or for results, it hears a beat every few
seconds. A process that is stopped, or hangs as a whole, falls silent.
"""

import errno
import logging
import threading
import time
import weakref
from concurrent.futures import Future, wait
from socket import socket

import pyarrow as pa

from beam_gemma.errors import EngineError
from beam_gemma.inference.carried_rows import rows_of_bytes
from beam_gemma.inference.seat import TakenSeat
from beam_gemma.inference.wire import Kind, Wire, batch_bytes, failure_bytes, json_bytes
from beam_gemma.tasks.interface import Model

LOGGER = logging.getLogger(__name__)
BEAT_SECS = 5.0
"""Time between two beats."""
Answer = tuple[Kind, bytes]


class ModelServer:
    """Serves a model from the threads of this process.

    It ends when nothing refers to it: neither a user in this process nor a connection.
    """

    def __init__(self, seat: TakenSeat, result_schema: pa.Schema) -> None:
        """Start listening; processes that connect wait until the model is there.

        Args:
            seat: The seat of the model, which this process has taken.
            result_schema: The schema of the model's results.
        """
        self._seat = seat
        self._schema = result_schema
        self.model: Model | None = None
        """The model, once it is loaded."""
        self._is_decided = threading.Event()
        arguments = seat.listener, weakref.ref(self)
        threading.Thread(target=_accept, args=arguments, daemon=True).start()

    def open(self, model: Model) -> None:
        """Start to answer with a model."""
        self.model = model
        self._is_decided.set()

    def close(self) -> None:
        """Leave the seat, because no model could be loaded."""
        self._seat.leave()
        self._is_decided.set()

    def serve(self, sock: socket) -> None:
        """Answer one connection until the other side closes it."""
        try:
            wire = Wire(sock)
            while not self._is_decided.wait(BEAT_SECS):
                wire.send(Kind.BEAT)
            if self.model is not None:
                wire.send(Kind.READY)
                while True:
                    self._answer(wire, self.model)
        except EngineError as error:
            LOGGER.warning("%s; the connection is closed", error)
        except (EOFError, OSError):
            pass  # the other process has ended, or needs the model no more
        finally:
            sock.close()

    def _answer(self, wire: Wire, model: Model) -> None:
        """Answer the next question; beat until the answer is there."""
        kind, body = wire.receive()
        answer: Future[Answer] = Future()
        arguments = answer, model, kind, body
        threading.Thread(target=self._compute, args=arguments, daemon=True).start()
        while not wait([answer], BEAT_SECS).done:
            wire.send(Kind.BEAT)
        wire.send(*answer.result())

    def _compute(self, answer: "Future[Answer]", model: Model, kind: Kind, body: bytes) -> None:
        try:
            answer.set_result(self._answer_of(model, kind, body))
        except Exception as error:  # it is the waiting process that raises it
            LOGGER.debug("engine: an error for another process", exc_info=True)
            answer.set_result((Kind.FAILURE, failure_bytes(error)))

    def _answer_of(self, model: Model, kind: Kind, body: bytes) -> Answer:
        match kind:
            case Kind.ROWS:
                results = model(rows_of_bytes(body))
                batch = pa.RecordBatch.from_pylist(results, schema=self._schema)
                return Kind.RESULTS, batch_bytes(batch)
            case Kind.COUNTS:
                return kind, json_bytes(model.take_counts())
            case Kind.PULSE:
                return kind, json_bytes(model.take_pulse())
        raise EngineError(f"engine: expected rows or a question for counts, got {kind.name}")


def _accept(listener: socket, server_of: "weakref.ref[ModelServer]") -> None:
    """Have a thread for each connection, until the seat is left."""
    while True:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EBADF):
                return
            LOGGER.warning("engine: a process could not connect: %s", error)
            time.sleep(1)
            continue
        server = server_of()
        if server is None:
            sock.close()
            return
        threading.Thread(target=server.serve, args=(sock,), daemon=True).start()
        del server
