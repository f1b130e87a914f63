"""From flags to a finished job: every setting is checked before it starts, every row after it."""

import argparse
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.runner import PipelineResult

from beam_gemma.artifact import Artifact
from beam_gemma.columns import check_columns
from beam_gemma.errors import BeamGemmaError, OptionsError
from beam_gemma.flags import FlagParser, engine_settings, in_one_process, is_local, parse
from beam_gemma.preview import preview
from beam_gemma.progress import METRICS_NAMESPACE, Display
from beam_gemma.records import Source, open_source
from beam_gemma.sinks import Sink, open_sink
from beam_gemma.task import Settings
from beam_gemma.task_handler import TaskHandler, choose_device

SettingsT = TypeVar("SettingsT", bound=Settings)
HandlerT = TypeVar("HandlerT", bound=TaskHandler)
SUCCESS, FAILURE, USAGE = 0, 1, 2
"""Exit codes: rows balance; they do not, or the job broke; a setting is wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(Generic[HandlerT]):
    """A job whose settings have been checked."""

    source: Source
    sink: Sink
    schema: pa.Schema
    """Of the output."""
    handler: HandlerT
    options: PipelineOptions
    overwrite: bool
    """Whether an earlier output gives way to this one."""
    preview: str | None
    """The report that was asked for in place of a run."""


def plan(
    argv: Sequence[str] | None,
    parser: FlagParser,
    settings_of: Callable[[argparse.Namespace], SettingsT],
    handler_of: Callable[..., HandlerT],
) -> Job[HandlerT]:
    """Return the job that the flags describe.

    Args:
        argv: The command line's; None for this process's own.
        parser: Of the task's flags.
        settings_of: Makes the task's settings of flags.
        handler_of: The task's handler class.

    Raises:
        BeamGemmaError: a setting is wrong; nothing has been written.
    """
    flags, options = parse(parser, argv)
    _set_up_logs(verbose=flags.verbose)
    handler = handler_of(
        flags.model,
        settings_of(flags),
        large_model=not in_one_process(options),
        **engine_settings(flags),
    )
    settings: Settings = handler.settings  # as the model completes them
    artifact = Artifact.open(flags.model)
    encoder = handler.encoder(artifact)
    if is_local(options):
        choose_device(artifact, handler.head, flags.device)
    elif flags.device != "auto":
        artifact.signature(handler.head, flags.device)
    source = open_source(flags.input, limit=flags.limit)
    check_columns(settings, source.schema)
    sink = open_sink(flags.output, num_shards=flags.num_shards)
    if not flags.dry_run:
        _check_output(sink, source, overwrite=flags.overwrite)
    return Job(
        source=source,
        sink=sink,
        schema=pa.schema(
            [*source.schema, *map(_in_files, settings.result_schema)], source.schema.metadata
        ),
        handler=handler,
        options=options,
        overwrite=flags.overwrite,
        preview=preview(source, encoder) if flags.dry_run else None,
    )


def _in_files(field: pa.Field) -> pa.Field:
    """Return a result as files hold it.

    PyArrow cannot read a null back from a fixed-size list, and a row that failed has one.
    """
    if pa.types.is_fixed_size_list(field.type):
        return field.with_type(pa.list_(field.type.value_type))
    return field


def run(pipeline: beam.Pipeline, job: Job[Any]) -> int:
    """Run a job, show its progress and check that no row was lost; return the exit code.

    A Dataflow job goes on alone: its state and counters are in its own console.
    """
    if job.overwrite:
        job.sink.delete()
    started = time.monotonic()
    try:
        with _display(job):
            result: Any = pipeline.run()
            if not _goes_on_alone(job.options):
                result.wait_until_finish()
    except (BeamGemmaError, RuntimeError) as error:
        if (sentence := _sentence(error)) is None:
            raise
        sys.stderr.write(f"error: {sentence}\n")
        return FAILURE
    if _goes_on_alone(job.options):
        sys.stdout.write(f"submitted the job {result.job_id()}\n")
        return SUCCESS
    return report(counters(result), time.monotonic() - started)


def report(counts: Mapping[str, int], elapsed_secs: float) -> int:
    """Write the line that balances a job's rows; return the exit code."""
    read, ok, failed, written = (
        counts.get(f"rows_{name}", 0) for name in ("read", "ok", "failed", "written")
    )
    line = (
        f"read {read:,} = ok {ok:,} + failed {failed:,} = written {written:,} rows; "
        f"{_tokens(counts, elapsed_secs)}"
    )
    if slots := counts.get("decode_slots", 0):
        line += f"; steps {100 * counts['decode_rows'] / slots:.0f} % full"
    sys.stdout.write(line + "\n")
    if read == ok + failed == written:
        return SUCCESS
    sys.stderr.write(
        "error: rows: expected the counts above to be equal; rows were lost or doubled\n"
    )
    return FAILURE


def _tokens(counts: Mapping[str, int], elapsed_secs: float) -> str:
    """Return what was computed in which time; the rate is that of completions where there are."""
    amount = f"{counts.get('prompt_tokens', 0):,}"
    if "completion_tokens" in counts:
        amount += f" prompt + {counts['completion_tokens']:,} completion"
    rate = counts.get("completion_tokens", counts.get("prompt_tokens", 0)) / max(elapsed_secs, 1e-9)
    return f"{amount} tokens in {elapsed_secs:,.1f} s ({rate:,.1f} tokens/s)"


def counters(result: PipelineResult) -> dict[str, int]:
    """Return the sums of the project's counters over all steps of a job."""
    counts: dict[str, int] = {}
    query = MetricsFilter().with_namespace(METRICS_NAMESPACE)
    for metric in result.metrics().query(query)["counters"]:
        name = metric.key.metric.name
        counts[name] = counts.get(name, 0) + metric.result
    return counts


def exit_code(main: Callable[[], int]) -> int:
    """Run a command; an error of ours is one sentence and the exit code of a wrong setting."""
    try:
        return main()
    except BeamGemmaError as error:
        sys.stderr.write(f"error: {error}\n")
        return USAGE


def _sentence(error: Exception) -> str | None:
    """Return an error of ours in its own words; workers send theirs as the text of a traceback."""
    if isinstance(error, BeamGemmaError):
        return str(error)
    sentences = re.findall(r"^beam_gemma\.errors\.\w+: (.*)$", str(error), re.MULTILINE)
    return sentences[-1] if sentences else None


def _set_up_logs(*, verbose: bool) -> None:
    root = logging.getLogger()
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    root.addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    """Drop what Beam says at each load where torch is not installed, as on our workers."""
    return not record.getMessage().startswith("Resource module is not available")


def _check_output(sink: Sink, source: Source, *, overwrite: bool) -> None:
    existing = sink.shards()
    if existing and not overwrite:
        raise OptionsError(
            f"--output: expected no earlier output, got {existing[0]}; choose another name or "
            "pass --overwrite"
        )
    if both := sorted(set(existing) & set(source.files)):
        raise OptionsError(
            f"--output: expected other files than those of --input, got {both[0]} in both"
        )


def _display(job: Job[Any]) -> AbstractContextManager[object]:
    """Return the display of a job whose rows go through this process."""
    if in_one_process(job.options):
        return Display(job.source.num_rows)
    return nullcontext()


def _goes_on_alone(options: PipelineOptions) -> bool:
    return options.view_as(StandardOptions).runner == "DataflowRunner"
