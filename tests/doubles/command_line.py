"""Jobs by the command line, run in this process."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from beam_gemma.cli import run as cli
from pipelines import classify, embed, generate

MAINS = {"generate": generate.main, "classify": classify.main, "embed": embed.main}


class CommandLine:
    """Runs jobs over a table of JSON lines.

    Args:
        folder: Folder for the tables.
        capsys: Pytest's fixture, which has what a job writes.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        self._number = 0

    def table(self, rows: Sequence[dict[str, Any]], name: str = "in") -> str:
        """Write a table; return its file."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def run(self, task: str, *flags: Any) -> tuple[int, str, str]:
        """Run a command; return its exit code, output and errors."""
        with mock.patch.object(sys, "argv", [task, *map(str, flags)]):
            code = cli.exit_code(MAINS[task])
        return code, *self._capsys.readouterr()

    def rows(self, task: str, model: Path, table: str, *flags: Any) -> dict[Any, dict[str, Any]]:
        """Run a job that succeeds; return its rows by their `id`."""
        self._number += 1
        out = self.folder / f"out{self._number}"
        code, _, err = self.run(
            task, f"--model={model}", f"--input={table}", f"--output={out}/x.jsonl", *flags
        )
        assert code == 0, err
        lines = [line for file in out.glob("*.jsonl") for line in file.read_text().splitlines()]
        return {row["id"]: row for row in map(json.loads, lines)}
