"""Runs `pipelines.generate` in a process that dies at a given place, as by `kill -9`.

    python -m tests.faults.doomed PLACE REPORT FLAGS...

What had been computed by then is in the file REPORT, as JSON.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beam_gemma.cli.run import exit_code
from beam_gemma.engine.engine import Engine
from beam_gemma.inference import saved_results
from beam_gemma.monitoring.progress import METER
from beam_gemma.tables import exchange, file_sink
from beam_gemma.tables.sink import Sink
from pipelines.generate import main


def die(report: Path) -> None:
    """End this process at once, with no chance to put anything in order."""
    count = METER.read()
    report.write_text(json.dumps({"completion_tokens": count.completion_tokens}))
    os.kill(os.getpid(), signal.SIGKILL)


def doom(place: str, report: Path) -> None:
    """Arrange for the death of this process."""
    kind, _, number = place.partition(":")
    dooms[kind](report, int(number or 0))


def small_pieces() -> None:
    """Let no piece be larger than it must be, so that a slow disk does not make them few."""
    saved_results.MAX_ROWS = saved_results.MIN_ROWS


def in_step() -> None:
    """Let the engine wait for the pieces, so that a slow disk does not let it run ahead."""
    step, add, writers = Engine._step, saved_results.PieceWriter.add, []

    def is_ahead(finished: int) -> bool:
        if not writers:
            return finished > 0
        return writers[0]._num_added < finished or len(writers[0]._rows) >= saved_results.MIN_ROWS

    def waiting(self: Engine) -> None:
        while is_ahead(self.stats.num_finished):
            time.sleep(0.001)
        step(self)

    def known(self: Any, key: bytes, result: Any) -> None:
        writers[:] = [self]
        add(self, key, result)

    Engine._step = waiting
    saved_results.PieceWriter.add = known


def _at_piece(report: Path, number: int) -> None:
    """Just before a piece is written."""
    small_pieces()
    in_step()
    write, left = saved_results.write_once, [number]

    def counted(path: str, content: bytes) -> None:
        left[0] -= 1
        if not left[0]:
            die(report)
        write(path, content)

    saved_results.write_once = counted


def _at_stage(report: Path, number: int) -> None:
    """After so many batches of the output's shards."""
    write, left = file_sink._ParquetShard.write, [number]

    def counted(self: Any, batch: Any) -> None:
        left[0] -= 1
        if not left[0]:
            die(report)
        write(self, batch)

    file_sink._ParquetShard.write = counted


def _at_rename(report: Path, number: int) -> None:
    """When so many shards have been renamed."""
    move = exchange.move

    def partly(pairs: Any) -> None:
        if pairs and "/staged/" in pairs[0][0]:
            move(pairs[:number])
            die(report)
        move(pairs)

    exchange.move = partly


def _at_aside(report: Path, number: int) -> None:
    """When so many files of an earlier output are aside, its record first."""
    move, left = exchange.move, [number]

    def partly(pairs: Any) -> None:
        for pair in pairs:
            if not left[0]:
                die(report)
            move([pair])
            left[0] -= 1

    exchange.move = partly


def _stopped(report: Path, _: int) -> None:
    """Not a death: the process stands still before it publishes, until it is told to go on."""
    publish = file_sink.FileSink.publish

    def later(*args: Any) -> None:
        report.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
        publish(*args)

    file_sink.FileSink.publish = later


def _at_record(report: Path, _: int) -> None:
    """When all shards have their names and the record is not written."""
    file_sink.write_once = lambda *_: die(report)


def _at_clear(report: Path, number: int) -> None:
    """When the output is whole and so many of the pieces are gone."""
    small_pieces()

    def partly(sink: Sink) -> None:
        for path in sorted(Path(sink.work).rglob("*.arrow"))[:number]:
            path.unlink()
        die(report)

    Sink.clear = partly


def _disk_full(_: Path, num_bytes: int) -> None:
    """Not a death: no file can become larger, so that larger ones fail halfway."""
    small_pieces()
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


dooms: dict[str, Callable[[Path, int], None]] = {
    "piece": _at_piece,
    "stage": _at_stage,
    "rename": _at_rename,
    "aside": _at_aside,
    "stopped": _stopped,
    "record": _at_record,
    "clear": _at_clear,
    "disk": _disk_full,
}

if __name__ == "__main__":
    doom(sys.argv[1], Path(sys.argv[2]))
    del sys.argv[1:3]
    sys.exit(exit_code(main))
