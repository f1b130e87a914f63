"""Run a planned job, show its progress, and check that every row came back."""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import apache_beam as beam
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.runners.runner import PipelineResult

from beam_gemma.batches import held_in
from beam_gemma.cli.failures import failure
from beam_gemma.cli.flags import in_one_process, is_local
from beam_gemma.cli.held_logs import HeldLogs, is_verbose
from beam_gemma.cli.plan import Job
from beam_gemma.cli.stop import going_on_if, interruptible, tell
from beam_gemma.dataflow.options import on_dataflow
from beam_gemma.errors import BeamGemmaError, BudgetError, OptionsError, one_line
from beam_gemma.inference.task_handler import TaskHandler
from beam_gemma.monitoring.progress import METRICS_NAMESPACE, Display
from beam_gemma.tables.sink import STAGED

SUCCESS, FAILURE, USAGE, STOPPED = 0, 1, 2, 3
"""Exit codes: row counts balance; they do not, or the job failed; a setting is wrong; the job
stopped at its token budget and can be resumed."""

HELD = "held"
"""Subfolder of what a job has staged, for rows that are held in files."""


def run(job: Job[Any], step: str) -> int:
    """Run a job and return the exit code; print a job's preview in place of a run.

    Args:
        job: The planned job.
        step: The name of the inference step in the pipeline, such as `Generate`.
    """
    if job.preview is not None:
        sys.stdout.write(job.preview)
        return SUCCESS
    going_on_if(job.output.sink.is_unfinished)
    pipeline = beam.Pipeline(options=job.options)
    rows = pipeline | "Read" >> job.read()
    answers = rows | step >> job.infer()
    _ = (rows, (answers,)) | "Write" >> job.write()
    return run_pipeline(pipeline, job)


def run_pipeline(pipeline: beam.Pipeline, job: Job[Any]) -> int:
    """Run a job, show its progress and check that no row was lost; return the exit code.

    A Dataflow job is only submitted; its state and counters are in the Dataflow console.
    """
    if on_dataflow(job.options):
        return _submit(pipeline, job)
    started = time.monotonic()
    try:
        with _rows_in_files(job), _held(job) as held, _display(job, held):
            result = pipeline.run()
            result.wait_until_finish()
    except Exception as error:  # runners and their clients raise many types
        tell(failure(error))
        return STOPPED if BudgetError.__name__ in repr(error) else FAILURE
    return report(counters(result), time.monotonic() - started)


def _submit(pipeline: beam.Pipeline, job: Job[Any]) -> int:
    try:
        result: Any = pipeline.run()
    except BaseException as error:  # also Ctrl-C: a job that is not submitted holds no lease
        job.output.release()
        if not isinstance(error, Exception):
            raise
        # Service clients raise many types, with one remedy.
        raise OptionsError(
            f"Dataflow: expected the job to be taken, got {one_line(error)}; "
            "docs/dataflow.md names the roles and settings that it takes"
        ) from error
    if result.has_job:
        sys.stdout.write(f"submitted the job {result.job_id()}\n")
    else:  # with --template_location, the job is a file for the template launcher
        sys.stdout.write("wrote the job for its launcher\n")
    return SUCCESS


def report(counts: Mapping[str, int], elapsed_secs: float) -> int:
    """Print a line with the row counts and check that they balance; return the exit code."""
    names = ("rows_read", "written_ok", "written_failed", "rows_written")
    read, ok, failed, written = (counts.get(name, 0) for name in names)
    line = (
        f"read {read:,} = ok {ok:,} + failed {failed:,} = written {written:,} rows; "
        f"{_tokens(counts, elapsed_secs)}"
    )
    if slots := counts.get("decode_slots", 0):
        line += f"; steps {100 * counts['decode_rows'] / slots:.0f} % full"
    for name, what in (("duplicate_rows", "asked what others ask"), ("resumed_rows", "resumed")):
        if number := counts.get(name, 0):
            line += f"; {number:,} rows {what}"
    sys.stdout.write(line + "\n")
    if read == ok + failed == written:
        return SUCCESS
    tell("rows: expected the counts above to be equal; rows were lost or doubled")
    return FAILURE


def _tokens(counts: Mapping[str, int], elapsed_secs: float) -> str:
    """Return tokens, seconds and rate as text; the rate is of new tokens if there are any."""
    new = {n: counts[f"{n}_tokens"] for n in ("thinking", "completion") if f"{n}_tokens" in counts}
    num_prompt = counts.get("prompt_tokens", 0)
    parts = [f"{num_prompt:,} prompt" if new else f"{num_prompt:,}"]
    parts += [f"{number:,} {name}" for name, number in new.items()]
    rate = (sum(new.values()) if new else num_prompt) / max(elapsed_secs, 1e-9)
    return f"{' + '.join(parts)} tokens in {elapsed_secs:,.1f} s ({rate:,.1f} tokens/s)"


def counters(result: PipelineResult) -> dict[str, int]:
    """Return the sums of the project's counters over all steps of a job."""
    counts: dict[str, int] = {}
    query = MetricsFilter().with_namespace(METRICS_NAMESPACE)
    for metric in result.metrics().query(query)["counters"]:
        name = metric.key.metric.name
        # Portable runners report no value for a counter at zero.
        counts[name] = counts.get(name, 0) + (metric.result or 0)
    return counts


def exit_code(main: Callable[[], int]) -> int:
    """Run a command and return its exit code; print the error that ends it in one sentence.

    An error of ours is a wrong setting, `USAGE`; any other is a `FAILURE`.
    """
    try:
        return main()
    except BeamGemmaError as error:
        tell(str(error))
        return USAGE
    except Exception as error:  # whatever it is, it ends the command in a sentence
        tell(failure(error))
        return FAILURE


def command(main: Callable[[], int]) -> int:
    """Run a command of a process and return its exit code; signals end it in one sentence too."""
    return interruptible(lambda: exit_code(main))


def _held(job: Job[Any]) -> AbstractContextManager[HeldLogs | None]:
    """Hold back what Beam tells of errors, unless all of it is to be shown."""
    return nullcontext() if is_verbose() else HeldLogs(with_workers=not in_one_process(job.options))


def _has_files(handler: TaskHandler) -> bool:
    """Return whether rows may have pictures or sounds, in columns or in conversations."""
    if handler.settings.file_columns or not handler.settings.media_columns:
        return bool(handler.settings.file_columns)
    artifact = handler.artifact()
    return artifact.vision is not None or artifact.sound is not None


def _rows_in_files(job: Job[Any]) -> AbstractContextManager[None]:
    """Hold rows with files in files, if the job runs in Beam's runner on this machine."""
    if not (is_local(job.options) and _has_files(job.handler)):
        return nullcontext()
    work = job.output.sink.work
    if "://" in work:
        return held_in(tempfile.mkdtemp(prefix="beam-gemma-"))
    # What a killed job leaves is deleted with what it has staged.
    return held_in(f"{work}/{STAGED}/{HELD}")


def _display(job: Job[Any], held: HeldLogs | None) -> AbstractContextManager[object]:
    """Return a live display if the job runs in this process, else a null context."""
    if in_one_process(job.options):
        return Display(job.source.num_rows, stream=held.stream if held else None)
    return nullcontext()
