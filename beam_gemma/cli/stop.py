"""A command that Ctrl-C or SIGTERM ends: in one sentence, with the command that goes on with it.

Beam wraps an exception that a signal raises in errors of its own, and ONNX Runtime holds a signal
back while it loads a model. So the command runs on a thread, and the main thread waits for its end
or for a signal.
"""

import atexit
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import NoReturn

import psutil

from beam_gemma.errors import BeamGemmaError
from beam_gemma.inference.supervised_model import save_finished
from beam_gemma.jobs.redaction import without_secrets

NAMES = {signal.SIGINT: "Ctrl-C (SIGINT)", signal.SIGTERM: "SIGTERM"}
"""The signals that end a command, and what they are called."""
QUICK_SECS = 5.0
"""Longest time after a signal for each thing that is still to be done."""

_ENDING = threading.Event()
"""Set once a signal has come."""


def _never() -> bool:
    return False


_is_unfinished: list[Callable[[], bool]] = [_never]
"""Says whether there is something to go on with; the last one counts."""


def going_on_if(is_unfinished: Callable[[], bool]) -> None:
    """Set the function that says whether `--resume` can go on with the command once it ends."""
    _is_unfinished.append(is_unfinished)


def interruptible(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; a signal ends this process and its workers.

    The exit code is 128 and the signal's number then, and the last line on standard error says how
    to go on. Finished rows are saved before, as far as that is quick. A second signal ends the
    process at once. Call this on the main thread.
    """
    events: SimpleQueue[Callable[[], int]] = SimpleQueue()
    stderr = os.dup(2)
    heard = [number for number in NAMES if signal.getsignal(number) is not signal.SIG_IGN]

    def on_signal(number: int, _: FrameType | None) -> None:
        _ENDING.set()
        events.put(partial(_end, number, stderr))

    def run() -> None:
        outcome: Future[int] = Future()
        try:
            outcome.set_result(command())
        except BaseException as error:  # the main thread raises it, as if it ran the command
            outcome.set_exception(error)
        events.put(outcome.result)

    for number in heard:
        signal.signal(number, on_signal)
    threading.Thread(target=run, name="command", daemon=True).start()
    action = events.get()
    for number in heard:
        signal.signal(number, _end_at_once)
    return action()


def resuming(command: list[str]) -> str:
    """Return the line to type that goes on with a command, without the values of secret flags."""
    is_resuming = any(word.partition("=")[0] == "--resume" for word in command)
    return shlex.join(without_secrets([*command, *([] if is_resuming else ["--resume"])]))


def tell(sentence: str) -> None:
    """Write the error that a command ends with to standard error.

    After a signal, whatever fails does so because of it; then this waits for the process to end.
    """
    if _ENDING.is_set():
        threading.Event().wait()
    sys.stderr.write(f"error: {sentence}\n")


def _end(number: int, stderr: int) -> NoReturn:
    """End this process and its workers, with one sentence on a copy of standard error."""
    logging.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _quickly(save_finished)
    is_unfinished = _quickly(_is_unfinished[-1])
    _kill_workers()
    # What Python runs at a normal exit, which would wait for Beam's threads: temporary folders, as
    # of sockets, are removed. Without this private part they stay.
    _quickly(lambda: atexit._run_exitfuncs())
    sentence = f"error: job: stopped by {NAMES[signal.Signals(number)]}"
    if is_unfinished is not False:
        sentence += f"; go on with: {resuming(sys.orig_argv)}"
    # A terminal has echoed ^C, and perhaps a line of progress that is still open.
    newline = "\n" if os.isatty(stderr) else ""
    with suppress(OSError):
        os.write(stderr, f"{newline}{sentence}\n".encode())
    os._exit(128 + number)


def _end_at_once(number: int, _: FrameType | None) -> NoReturn:
    _kill_workers()
    os._exit(128 + number)


def _quickly(action: Callable[[], bool | None]) -> bool | None:
    """Return what an action returns, or None if it fails or takes too long."""
    results: list[bool | None] = [None]

    def act() -> None:
        with suppress(BeamGemmaError, OSError):
            results.append(action())

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(QUICK_SECS)
    return results[-1]


def _kill_workers() -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()
