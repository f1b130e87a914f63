"""From flags to a finished job: every setting is checked before it starts, every row after it."""

import argparse
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult

from beam_gemma.cli.estimate_flags import check_estimate, means_of
from beam_gemma.cli.flags import FlagParser, engine_settings, in_one_process, is_local, parse
from beam_gemma.cli.table_flags import refuse_streams, sink_of, source_of
from beam_gemma.dataflow.options import on_dataflow, resource_hints, worker_device, worker_options
from beam_gemma.dataflow.wheel import stage
from beam_gemma.errors import BeamGemmaError, BudgetError, OptionsError
from beam_gemma.inference.saved_results import run_digest
from beam_gemma.inference.supervised_model import Supervision
from beam_gemma.inference.task_handler import TaskHandler, choose_device
from beam_gemma.jobs.dry_run import preview
from beam_gemma.jobs.infer_table import Ask
from beam_gemma.jobs.run_record import facts_of, marks_of
from beam_gemma.jobs.shards import Layout
from beam_gemma.jobs.write_table import Columns, Output, Page, WriteTable
from beam_gemma.model.artifact import Artifact
from beam_gemma.monitoring.progress import METRICS_NAMESPACE, Display
from beam_gemma.tables.file_sink import check_writable
from beam_gemma.tables.open_table import ReadTable
from beam_gemma.tables.sink import Sink
from beam_gemma.tables.source import Source
from beam_gemma.tasks.columns import check_columns
from beam_gemma.tasks.interface import Settings

SettingsT = TypeVar("SettingsT", bound=Settings)
HandlerT = TypeVar("HandlerT", bound=TaskHandler)
SUCCESS, FAILURE, USAGE, STOPPED = 0, 1, 2, 3
"""Exit codes: rows balance; they do not, or the job broke; a setting is wrong; the job has stopped
where it was told to and can go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(Generic[HandlerT]):
    """A job whose settings have been checked."""

    source: Source
    handler: HandlerT
    output: Output
    options: PipelineOptions
    durable: str | None = None
    """Folder of results to go on from."""
    preview: str | None = None
    """What there is to say in place of a run."""

    def read(self) -> ReadTable:
        """Return what reads the table."""
        return ReadTable(self.source)

    def ask(self) -> Ask:
        """Return what runs the task."""
        layout, num_rows = self.output.layout, self.source.num_rows
        return Ask(self.handler, layout, num_rows=num_rows, durable=self.durable)

    def write(self) -> WriteTable:
        """Return what writes rows with their results."""
        return WriteTable(self.output)


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
    refuse_streams(flags.input)
    if on_dataflow(options):
        flags.device = worker_device(flags)
    handler = handler_of(
        flags.model,
        settings_of(flags),
        large_model=not in_one_process(options),
        **engine_settings(flags),
    )
    check_estimate(flags, handler.settings.max_new_tokens)
    artifact, options = _open(handler, flags, options)
    source = source_of(flags, options)
    check_columns(handler.settings, source.schema)
    command = [*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)]
    facts = facts_of(
        command,
        source=source.uri,
        sink=flags.output,
        tasks=[(flags.model, artifact, handler.settings)],
    )
    output = _output(flags, options, source, handler.settings, facts)
    job = Job(source=source, handler=handler, output=output, options=options)
    if flags.dry_run:
        means = means_of(flags, options, handler, artifact)
        return replace(job, preview=preview(source, handler, artifact, means, flags.dry_run))
    pieces = f"{output.sink.work}/pieces/{run_digest(artifact, handler.settings, flags.device)}"
    handler.supervise(
        Supervision(
            pieces=pieces,
            max_error_fraction=flags.max_error_fraction,
            max_cost_tokens=flags.max_cost_tokens,
        )
    )
    if output.page is not None:
        check_writable("--report", output.page.path)
    if output.errors is not None:
        _make_room("--errors", output.errors, source, flags)
    done = _make_room("--output", output.sink, source, flags)
    if on_dataflow(options):
        stage(options)
    return replace(job, preview=done, durable=pieces if flags.resume else None)


def _open(
    handler: TaskHandler, flags: argparse.Namespace, options: PipelineOptions
) -> tuple[Artifact, PipelineOptions]:
    """Open what says of the model what it is, and compare it with what it is to do, and where."""
    artifact = handler.artifact()
    options = worker_options(flags, options, artifact)
    handler.run_on(resource_hints(flags, options))
    handler.check(artifact)
    if is_local(options):
        choose_device(artifact, handler.head, flags.device)
    elif flags.device != "auto":
        artifact.signature(handler.head, flags.device)
    return artifact, options


def _output(
    flags: argparse.Namespace,
    options: PipelineOptions,
    source: Source,
    settings: Settings,
    facts: dict[str, Any],
) -> Output:
    results = Columns("", settings.result_schema)
    metadata = {**(source.schema.metadata or {}), **marks_of(facts)}
    schema = pa.schema([*source.schema, *results.in_files], metadata)
    sink = sink_of(flags.output, flags, options)
    errors = sink_of(flags.errors, flags, options) if flags.errors else None
    for table in filter(None, (sink, errors)):
        table.check(schema)
    return Output(
        sink=sink,
        layout=Layout.of(source, results.schema, num_shards=flags.num_shards),
        schema=schema,
        tasks=(results,),
        facts=facts,
        errors=errors,
        max_error_fraction=flags.max_error_fraction,
        page=_page(flags),
        copies=source.copies,
    )


def _page(flags: argparse.Namespace) -> Page | None:
    if flags.report is None:
        if flags.report_rows:
            raise OptionsError(
                f"--report_rows {flags.report_rows}: expected a --report to show them in, got none"
            )
        return None
    return Page(flags.report, flags.report_rows)


def _make_room(flag: str, sink: Sink, source: Source, flags: argparse.Namespace) -> str | None:
    """Make room for an output; return what there is to say where it is there already.

    Raises:
        OptionsError: something is there that the flags do not allow for.
    """
    earlier, is_unfinished = sink.earlier(), sink.is_unfinished()
    if both := [name for name in earlier if name in (*source.files, source.uri)]:
        raise OptionsError(
            f"{flag}: expected another table than that of --input, got {both[0]} in both"
        )
    if flags.resume:
        if earlier and not is_unfinished:
            return f"{sink.uri}: the output is whole, so there is nothing to go on with\n"
        return None
    if is_unfinished and not flags.overwrite:
        raise OptionsError(
            f"{flag}: expected no unfinished job, got {sink.work}; go on with it by --resume or "
            "begin anew by --overwrite"
        )
    if earlier and not (flags.overwrite or flags.append):
        remedy = "--append or --overwrite" if sink.can_append else "--overwrite"
        raise OptionsError(
            f"{flag}: expected no earlier output, got {earlier[0]}; choose another name or pass "
            f"{remedy}"
        )
    sink.clear()
    return None


def run(pipeline: beam.Pipeline, job: Job[Any]) -> int:
    """Run a job, show its progress and check that no row was lost; return the exit code.

    A Dataflow job goes on alone: its state and counters are in its own console.
    """
    if on_dataflow(job.options):
        return _submit(pipeline)
    started = time.monotonic()
    try:
        with _display(job):
            result = pipeline.run()
            result.wait_until_finish()
    except (BeamGemmaError, RuntimeError) as error:
        if (sentence := _sentence(error)) is None:
            raise
        sys.stderr.write(f"error: {sentence}\n")
        return STOPPED if BudgetError.__name__ in repr(error) else FAILURE
    return report(counters(result), time.monotonic() - started)


def _submit(pipeline: beam.Pipeline) -> int:
    try:
        result: Any = pipeline.run()
    except Exception as error:  # the clients of the services on the way have many, and one remedy
        reason = " ".join(str(error).split())
        raise OptionsError(
            f"Dataflow: expected the job to be taken, got {type(error).__name__}: {reason}; "
            "docs/dataflow.md names the roles and settings that it takes"
        ) from error
    if result.has_job:
        sys.stdout.write(f"submitted the job {result.job_id()}\n")
    else:  # --template_location, by which the launcher of a template gets it as a file
        sys.stdout.write("wrote the job for its launcher\n")
    return SUCCESS


def report(counts: Mapping[str, int], elapsed_secs: float) -> int:
    """Write the line that balances a job's rows; return the exit code."""
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
        # Of a counter at zero, portable runners say nothing.
        counts[name] = counts.get(name, 0) + (metric.result or 0)
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


def _display(job: Job[Any]) -> AbstractContextManager[object]:
    """Return the display of a job whose rows go through this process."""
    if in_one_process(job.options):
        return Display(job.source.num_rows)
    return nullcontext()
