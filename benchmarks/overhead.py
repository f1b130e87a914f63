"""Measures the cost of a row beside the model: time and memory of jobs with an echo engine.

    python -m benchmarks.overhead --model models/gemma-3-270m

Tables of small rows go through the command line's own job, from Parquet to Parquet: they are read,
encoded by the model's tokenizer, grouped by request, made durable, joined and written. Only the
model is replaced, by one that answers each row at once with its last tokens. Each job has its own
process; its memory is the process's peak.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beam_gemma.cli import run as cli
from beam_gemma.cli.generate_flags import generate_parser, generate_settings
from beam_gemma.cli.plan import plan
from beam_gemma.inference.handlers import GemmaGenerateModelHandler
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.row import Prompt, Row
from beam_gemma.monitoring.timeline import Pulse
from beam_gemma.tasks.encoded_rows import request_in
from beam_gemma.tasks.interface import in_order
from benchmarks.table import table

WORDS = ("river", "market", "window", "paper", "engine", "garden", "winter", "doctor")
WORDS_PER_TEXT = 8
ECHOED_TOKENS = 3
ROWS_PER_GROUP = 100_000
MIB = 1 << 20


class Echo:
    """A model that answers each row with its last tokens at once."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self._num_tokens = 0
        self._pulse = Pulse("cpu")

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the result columns of each row."""
        return in_order(self.stream(rows))

    def stream(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row's index and result columns, in order."""
        for index, row in enumerate(rows):
            ids = request_in(row, self._encoder, Prompt.of_identity).token_ids
            last = ids[-ECHOED_TOKENS:]
            self._num_tokens += len(ids) + len(last)
            yield (
                index,
                {
                    "completion": self._encoder.tokenizer.decode(last),
                    "finish_reason": "stop",
                    "num_prompt_tokens": len(ids),
                    "num_completion_tokens": len(last),
                    "error": None,
                },
            )

    def drain(self) -> None:
        """Do nothing: no results are pending."""

    def num_tokens(self) -> int:
        """Return the number of tokens read and written."""
        return self._num_tokens

    def take_counts(self) -> dict[str, int]:
        """Return an empty dictionary: there are no counts."""
        return {}

    def take_pulse(self) -> dict[str, Any]:
        """Return the samples of an idle pulse."""
        return self._pulse.take()


class EchoHandler(GemmaGenerateModelHandler):
    """Model handler that loads `Echo` in place of a model."""

    def _start(self) -> Echo:
        return Echo(self.encoder(self.artifact()))


def write_rows(path: Path, num_rows: int) -> None:
    """Write a table with a number and a short text in each row, all different."""
    draw = np.random.default_rng(0)
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, ROWS_PER_GROUP):
            ids = range(start, min(start + ROWS_PER_GROUP, num_rows))
            words = np.array(WORDS)[draw.integers(0, len(WORDS), (len(ids), WORDS_PER_TEXT - 1))]
            texts = [f"{i} {' '.join(own)}" for i, own in zip(ids, words, strict=True)]
            writer.write_table(pa.table({"id": list(ids), "text": texts}, schema=schema))


def run(model: str, folder: Path) -> None:
    """Run one job and print its time and peak memory as JSON."""
    started = time.monotonic()
    flags = [f"--model={model}", f"--input={folder}/in.parquet", f"--output={folder}/out.parquet"]
    flags += ["--prompt=Echo: {text}", "--max_tokens=8"]
    job = plan(flags, generate_parser(), generate_settings, EchoHandler)
    if cli.run(job, "Generate") != cli.SUCCESS:
        sys.exit(cli.FAILURE)
    secs = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    sys.stdout.write(json.dumps({"secs": secs, "peak": peak}) + "\n")


def main() -> None:
    """Run the jobs and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model folder, for its tokenizer")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        run(args.model, args.run)
        return
    lines = []
    least: tuple[int, int] | None = None
    for num_rows in args.rows:
        with tempfile.TemporaryDirectory() as name:
            write_rows(Path(name) / "in.parquet", num_rows)
            command = [sys.executable, "-m", "benchmarks.overhead", "--model", args.model]
            out = subprocess.run([*command, "--run", name], check=True, stdout=subprocess.PIPE)
        taken = json.loads(out.stdout.splitlines()[-1])
        least = least or (num_rows, taken["peak"])
        more_rows, more_bytes = num_rows - least[0], taken["peak"] - least[1]
        lines.append(
            [
                f"{num_rows:,}",
                f"{taken['secs']:,.1f}",
                f"{num_rows / taken['secs']:,.0f}",
                f"{taken['peak'] / MIB:,.0f}",
                f"{more_bytes / MIB:+,.0f}" if more_rows else "",
                f"{more_bytes / more_rows:,.0f}" if more_rows else "",
            ]
        )
    header = ["rows", "s", "rows/s", "most MiB", "MiB more", "bytes/row more"]
    print(table(header, lines))


if __name__ == "__main__":
    main()
