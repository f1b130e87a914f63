"""Private and undocumented parts of Beam; no other module uses them.

Each function says which part it uses, why, and what happens without it. The parts were read in the
Beam version `BEAM_VERSION`. If one is missing, an `OptionsError` names it; nothing falls back
silently. `tests/test_private_parts.py` fails when a part changes.
"""

import argparse
import importlib
import os
import re
import shutil
import tempfile
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from typing import Any, TypeVar

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import python_urns
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_gemma.errors import OptionsError, one_line

BEAM_VERSION = "2.77.0"
"""The Beam version in which the parts were read."""
NO_PRISM = "--prism_location=/nonexistent"
"""A flag that rules out Prism, Beam's engine that DirectRunner otherwise downloads."""
NO_ATTEMPT = "--allow_unsafe_triggers"
"""A flag with which DirectRunner does not try Prism. Our pipelines have no triggers."""
STEP = re.compile(r" \[while running '[^']*'\]")
"""What Beam adds to the message of an error that a step raises."""
ERROR_OF_OURS = re.compile(r"^beam_gemma\.errors\.\w+: (.*)$", re.MULTILINE)
"""The last line of a traceback, for an error of this project."""
ERROR_OF_OTHERS = re.compile(r"^[A-Za-z_][\w.]*(?:: .*)?$", re.MULTILINE)
"""The last line of a traceback, for any error."""
WRAPPED = re.compile(r"^RuntimeError: (?=[\w.]+(?:Error|Exception|Interrupt)\b)")
"""What Beam writes before the name of an error that it has turned into a RuntimeError."""
_OPTIONS = "apache_beam.options.pipeline_options"
_TRANSFORMS = "apache_beam.ml.transforms.base"
_WORKERS = "apache_beam.runners.portability.fn_api_runner.worker_handlers"
_JOB_SERVICE = "apache_beam.runners.portability.local_job_service"
_LOCAL_WORKERS = {
    python_urns.EMBEDDED_PYTHON,
    python_urns.EMBEDDED_PYTHON_GRPC,
    python_urns.SUBPROCESS_SDK,
}
_SOCKETS = "beam-gemma-workers-"
"""Beginning of the name of a folder for sockets."""
_MAX_SOCKET_PATH = 107
"""Longest path of a Unix socket, in bytes."""
ParserT = TypeVar("ParserT", bound=argparse.ArgumentParser)


def send_whole() -> None:
    """Make workers of Beam's local runner send only whole elements; call when building a pipeline.

    By default, they flush their buffers every second, even while another thread is encoding an
    element (seen in Beam 2.77, with `--direct_running_mode=multi_threading`), and data added during
    the flush is lost. Bounded jobs do not need timed flushes; other flushes send whole elements.

    Sets `worker_handlers.DATA_BUFFER_TIME_LIMIT_MS`, which each worker reads when it starts.

    Raises:
        OptionsError: Beam lacks the part, so that elements could be lost.
    """
    _part(_WORKERS, "DATA_BUFFER_TIME_LIMIT_MS")
    workers: Any = importlib.import_module(_WORKERS)
    workers.DATA_BUFFER_TIME_LIMIT_MS = 0


def without_prism(flags: Sequence[str]) -> PipelineOptions:
    """Return the options of a run on this machine that does not look for Prism.

    Without these flags, DirectRunner downloads Prism at each run, and runs the job in this process
    only if that fails. The attempt alone opens a port on all interfaces at which anybody can have a
    worker started, with code of theirs (`portable_runner.start_and_replace_loopback_environments`),
    and leaves it open. With `NO_ATTEMPT`, DirectRunner does not try. Should it try nevertheless, it
    finds no Prism at the path of `NO_PRISM` and downloads nothing.

    Uses the flags `--prism_location` of `PrismRunnerOptions`, and `--allow_unsafe_triggers` of
    `TypeOptions`, which `SwitchingDirectRunner` takes as a reason not to use Prism.

    Raises:
        OptionsError: Beam lacks a flag, which it would ignore and then try Prism.
    """
    given = PipelineOptions([NO_PRISM, NO_ATTEMPT])
    for group, name in (
        ("PrismRunnerOptions", "prism_location"),
        ("TypeOptions", "allow_unsafe_triggers"),
    ):
        if not hasattr(given.view_as(_part(_OPTIONS, group)), name):
            raise _missing(f"{_OPTIONS}.{group}.{name}", "no such flag")
    return PipelineOptions([*flags, NO_PRISM, NO_ATTEMPT])


def private_ports() -> None:
    """Make servers of Beam's local runner listen where only this user can connect.

    With `--direct_running_mode=multi_processing` or `multi_threading`, the runner opens ports on
    all interfaces, without a password. Who connects can read any file that this user can, and send
    rows that are unpickled. After this call, the servers that workers of this machine use listen on
    Unix sockets in a folder of mode 0700, and the one for a worker's log on the loopback interface.
    Workers elsewhere (containers, pools) keep the ports that they need.

    Replaces `worker_handlers.GrpcServer`, `GrpcWorkerHandler.host_from_worker` and the module
    `grpc` in `local_job_service`. Reads `WorkerHandlerManager._environments`.

    Raises:
        OptionsError: Beam lacks a part, so that the ports would be open.
    """
    workers: Any = importlib.import_module(_WORKERS)
    server = _part(_WORKERS, "GrpcServer")
    if getattr(server, "is_private", False):
        return
    for name in ("grpc.server", "WorkerHandlerManager"):
        _part(_WORKERS, name)
    host = _part(_WORKERS, "GrpcWorkerHandler.host_from_worker")
    logs: Any = importlib.import_module(_JOB_SERVICE)
    _part(_JOB_SERVICE, "grpc.server")
    workers.GrpcServer = _private(server, workers)
    workers.GrpcWorkerHandler.host_from_worker = lambda handler: (
        "unix" if handler._grpc_server.is_private else host(handler)
    )
    logs.grpc = _Grpc(logs.grpc, lambda bind, _: bind("localhost:0"))


def _private(server_class: Any, workers: Any) -> type:
    """Return a class of servers that listen on Unix sockets if all workers are on this machine."""
    swap = threading.RLock()

    class PrivateServer(server_class):  # type: ignore[misc]
        is_private = True

        def __init__(self, state: Any, provision_info: Any, worker_manager: Any) -> None:
            environments = worker_manager._environments.values()
            self.is_private = {environment.urn for environment in environments} <= _LOCAL_WORKERS
            original = workers.grpc
            with swap:
                if self.is_private:
                    # Nobody else can enter the folder, which goes with the server.
                    self._folder = _socket_folder()
                    weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
                    workers.grpc = _Grpc(original, self._listen)
                try:
                    super().__init__(state, provision_info, worker_manager)
                finally:
                    workers.grpc = original

        def _listen(self, bind: Callable[[str], int], _: str) -> str:
            path = f"{self._folder}/{uuid.uuid4().hex[:8]}"
            bind(f"unix:{path}")
            return path

    return PrivateServer


def _socket_folder() -> str:
    """Return a new folder that only this user can enter, whose path is short enough for a socket.

    Raises:
        OptionsError: neither the folder for temporary files nor /tmp will do.
    """
    for parent in (tempfile.gettempdir(), "/tmp"):
        longest = f"{parent}/{_SOCKETS}XXXXXXXX/XXXXXXXX"
        if len(os.fsencode(longest)) <= _MAX_SOCKET_PATH and os.access(parent, os.W_OK):
            return tempfile.mkdtemp(prefix=_SOCKETS, dir=parent)
    raise OptionsError(
        f"TMPDIR: expected a folder whose path leaves room for a socket's, got "
        f"{tempfile.gettempdir()!r}; set it to a folder with a shorter path"
    )


class _Grpc:
    """The module `grpc`, whose servers listen where a function says.

    The function takes a server's method that binds an address, and the address that Beam wants. It
    returns what Beam takes for the port.
    """

    def __init__(self, grpc: Any, listen: Callable[[Callable[[str], int], str], Any]) -> None:
        self._grpc = grpc
        self._listen = listen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grpc, name)

    def server(self, *arguments: Any, **options: Any) -> Any:
        server = self._grpc.server(*arguments, **options)
        server.add_insecure_port = partial(self._listen, server.add_insecure_port)
        return server


def parser_of_all_flags(parser_class: type[ParserT]) -> ParserT:
    """Return a parser with the flags of all of Beam's groups of options.

    Uses `_BeamArgumentParser`, whose `add_value_provider_argument` some groups call, and
    `PipelineOptions._add_argparse_args`, which adds a group's flags.

    Args:
        parser_class: The class whose methods the parser has besides those of Beam's parser.

    Raises:
        OptionsError: Beam lacks a part, so that its flags would be unknown.
    """
    _part(_OPTIONS, "PipelineOptions._add_argparse_args")
    both = type(parser_class.__name__, (parser_class, _part(_OPTIONS, "_BeamArgumentParser")), {})
    parser: Any = both(allow_abbrev=False, add_help=False)
    for group in {str(cls): cls for cls in PipelineOptions.__subclasses__()}.values():
        group._add_argparse_args(parser)
    return parser


def text_embedding_handler(manager: Any) -> Any:
    """Return the ModelHandler with which MLTransform embeds the text columns of dicts.

    Uses `_TextEmbeddingHandler`, which Beam's own embedding transforms pass to RunInference.

    Args:
        manager: The EmbeddingsManager whose model embeds the texts.

    Raises:
        OptionsError: Beam lacks the part, so that no text could be embedded.
    """
    return _part(_TRANSFORMS, "_TextEmbeddingHandler")(manager)


def row_fields(element_type: Any) -> tuple[tuple[str, Any], ...] | None:
    """Return the names and types of an element's fields, or None if the elements are not Rows.

    Uses `RowTypeConstraint._fields`; no public attribute has the names.

    Args:
        element_type: The element type of a PCollection.

    Raises:
        OptionsError: Beam lacks the part, so that a result could take a field's name.
    """
    row = RowTypeConstraint.from_user_type(element_type) or element_type
    if not isinstance(row, RowTypeConstraint):
        return None
    try:
        return row._fields
    except AttributeError as error:
        raise _missing("apache_beam.typehints.row_type.RowTypeConstraint._fields", error) from error


def sentence_of_worker(error: Exception) -> str | None:
    """Return the message of our error that failed a worker, or None if there is none.

    Relies on the text of the RuntimeError that Beam's runners raise for a failed worker. It holds
    the worker's traceback, which ends with the error's class, its message and the step's name. If
    it does not, this returns None, and `cli/run.py` raises the RuntimeError with its whole text.

    Args:
        error: The error that a runner raised.
    """
    sentences: list[str] = ERROR_OF_OURS.findall(str(error))
    return without_step(sentences[-1]) if sentences else None


def fault_of_worker(error: Exception) -> str:
    """Return the type and message of the error that failed a worker, in one line.

    Relies on the same text as `sentence_of_worker`. If it holds no traceback, this returns the type
    and message of the runner's own error.

    Args:
        error: The error that a runner raised.
    """
    faults: list[str] = ERROR_OF_OTHERS.findall(str(error)) if "Traceback" in str(error) else []
    return WRAPPED.sub("", without_step(faults[-1] if faults else one_line(error)))


def without_step(message: str) -> str:
    """Return the message of an error without the name of the step that Beam adds to it."""
    return STEP.sub("", message)


def _part(module: str, name: str) -> Any:
    """Return a part of one of Beam's modules.

    Raises:
        OptionsError: Beam lacks the part.
    """
    try:
        return attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise _missing(f"{module}.{name}", error) from error


def _missing(part: str, reason: object) -> OptionsError:
    return OptionsError(
        f"apache-beam {version('apache-beam')}: expected {part} as in version {BEAM_VERSION}, "
        f"got: {reason}; install apache-beam=={BEAM_VERSION}"
    )
