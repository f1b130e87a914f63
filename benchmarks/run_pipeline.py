"""Runs our whole pipeline, Parquet to Parquet, like `python -m pipelines.generate`.

The engine of a local job runs in the job's own process, so its steps can be recorded through the
meter of the progress display. The work time begins when the model has been loaded.
"""

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from beam_gemma.inference.handlers import GemmaGenerateModelHandler
from beam_gemma.monitoring.progress import METER, Count
from beam_gemma.monitoring.startup_log import process_age
from beam_gemma.tasks.generate import Generator
from benchmarks.runs import Job, Run, Timeline, peak_bytes, serve
from pipelines import generate


def run(job: Job) -> Run:
    """Run a job over a table of the rows' texts.

    Raises:
        ValueError: the rows differ in `max_tokens`; the command line has one value for all rows.
        RuntimeError: the job failed, or encoded the prompts to other lengths.
    """
    counts = {row.max_tokens for row in job.rows}
    if len(counts) != 1:
        raise ValueError(f"max_tokens: expected the same for all rows, got {sorted(counts)}")
    with tempfile.TemporaryDirectory() as name, _watched() as timeline:
        folder = Path(name)
        numbers, texts = pa.array(range(len(job.rows))), [row.text for row in job.rows]
        pq.write_table(pa.table({"number": numbers, "text": texts}), folder / "in.parquet")
        sys.argv[1:] = [
            "--model", job.model, "--input", f"{folder}/in.parquet",
            "--output", f"{folder}/out.parquet", "--prompt_column", "text",
            "--max_tokens", str(counts.pop()), "--ignore_eos", "--token_ids",
            "--max_num_seqs", str(job.batch_size),
        ]  # fmt: skip
        age = process_age() - time.perf_counter()
        report = io.StringIO()
        with contextlib.redirect_stdout(report):
            exit_code = generate.main()
        finished = time.perf_counter()
        if exit_code:
            raise RuntimeError(f"pipeline: {report.getvalue()}")
        written = [pq.read_table(file) for file in sorted(folder.glob("out-*.parquet"))]
    completions = pa.concat_tables(written).sort_by("number")
    if completions["num_prompt_tokens"].to_pylist() != [len(r.prompt_token_ids) for r in job.rows]:
        raise RuntimeError("pipeline: expected the workload's prompts, got others")
    return Run(
        batch_size=job.batch_size,
        token_ids=completions["completion_token_ids"].to_pylist(),
        steps=timeline.steps,
        startup_secs=timeline.started + age,
        work_secs=timeline.work_secs,
        tail_secs=finished - timeline.ended,
        peak_bytes=peak_bytes(),
    )


@contextlib.contextmanager
def _watched() -> Iterator[Timeline]:
    """Record the steps of the engine that a job in this process loads."""
    timeline = Timeline()
    load_model, add = GemmaGenerateModelHandler.load_model, METER.add

    def load_and_start(self: GemmaGenerateModelHandler) -> Generator:
        generator = load_model(self)
        timeline.restart()
        return generator

    def add_and_record(count: Count) -> None:
        timeline.add(count)
        add(count)

    METER.add = add_and_record  # type: ignore[method-assign]
    GemmaGenerateModelHandler.load_model = load_and_start  # type: ignore[method-assign]
    try:
        yield timeline
    finally:
        GemmaGenerateModelHandler.load_model = load_model  # type: ignore[method-assign]
        METER.add = add  # type: ignore[method-assign]


if __name__ == "__main__":
    serve(run)
