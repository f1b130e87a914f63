"""Plan a job from flags, with every setting checked before the job starts."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions

from beam_gemma.cli.estimate_flags import check_estimate, means_of
from beam_gemma.cli.flag_groups import limits_of
from beam_gemma.cli.flags import FlagParser, in_one_process, is_local, parse
from beam_gemma.cli.media_flags import media_reading
from beam_gemma.cli.output_places import is_done, make_room
from beam_gemma.cli.table_flags import refuse_streams, sink_of, source_of
from beam_gemma.dataflow.options import on_dataflow, resource_hints, worker_device, worker_options
from beam_gemma.dataflow.wheel import stage
from beam_gemma.errors import OptionsError
from beam_gemma.inference.saved_results import run_digest
from beam_gemma.inference.supervised_model import Supervision
from beam_gemma.inference.task_handler import TaskHandler
from beam_gemma.jobs.dry_run import preview
from beam_gemma.jobs.infer_table import InferTable
from beam_gemma.jobs.publish import Columns, Output, Page
from beam_gemma.jobs.run_record import facts_of, marks_of
from beam_gemma.jobs.shards import Layout
from beam_gemma.jobs.write_table import WriteOutput
from beam_gemma.model.artifact import Artifact
from beam_gemma.runtime.devices import DeviceChoice, choose_device
from beam_gemma.tables.file_sink import check_writable
from beam_gemma.tables.lease import new_job
from beam_gemma.tables.open_table import ReadTable
from beam_gemma.tables.sink import PIECES
from beam_gemma.tables.source import Source
from beam_gemma.tasks.columns import check_columns, check_media
from beam_gemma.tasks.interface import Settings

WHOLE = "the output is whole, so there is nothing to go on with"
SettingsT = TypeVar("SettingsT", bound=Settings)
HandlerT = TypeVar("HandlerT", bound=TaskHandler)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(Generic[HandlerT]):
    """A job whose settings have been checked."""

    source: Source
    handler: HandlerT
    output: Output
    options: PipelineOptions
    durable: str | None = None
    """Folder of earlier results to resume from."""
    preview: str | None = None
    """Text to show in place of a run."""

    def read(self) -> ReadTable:
        """Return the transform that reads the table."""
        return ReadTable(self.source)

    def infer(self) -> InferTable:
        """Return the transform that runs the task."""
        return InferTable(self.handler, num_rows=self.source.num_rows, durable=self.durable)

    def write(self) -> WriteOutput:
        """Return the transform that writes the rows with their results."""
        return WriteOutput(self.output)


def plan(
    argv: Sequence[str] | None,
    parser: FlagParser,
    settings_of: Callable[[argparse.Namespace], SettingsT],
    handler_of: Callable[..., HandlerT],
) -> Job[HandlerT]:
    """Return the job that the flags describe.

    Args:
        argv: The command line arguments; None for those of this process.
        parser: The parser of the task's flags.
        settings_of: Returns the task's settings for the parsed flags.
        handler_of: The task's handler class.

    Raises:
        BeamGemmaError: a setting is wrong; nothing has been written.
    """
    flags, options = parse(parser, argv)
    _set_up_logs(verbose=flags.verbose)
    refuse_streams(flags.input)
    device: DeviceChoice = worker_device(flags) if on_dataflow(options) else flags.device
    handler = handler_of(
        flags.model,
        settings_of(flags),
        device=device,
        limits=limits_of(flags),
        large_model=not in_one_process(options),
    )
    check_estimate(flags, handler.settings.max_new_tokens)
    artifact, options = _open(handler, flags, options, device)
    source = _source(handler, flags, options)
    command = [*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)]
    facts = facts_of(
        command,
        source=source.uri,
        sink=flags.output,
        tasks=[(flags.model, artifact, handler.settings)],
    )
    output = _output(flags, options, source, handler.settings, {**facts, "job": new_job()})
    job = Job(source=source, handler=handler, output=output, options=options)
    if flags.dry_run:
        means = means_of(flags, options, handler, artifact, device)
        return replace(job, preview=preview(source, handler, artifact, means, flags.dry_run))
    pieces = f"{output.sink.work}/{PIECES}/{run_digest(artifact, handler.settings, device)}"
    handler.supervise(
        Supervision(
            pieces=pieces,
            max_error_fraction=flags.max_error_fraction,
            max_cost_tokens=flags.max_cost_tokens,
        )
    )
    if output.page is not None:
        check_writable("--report", output.page.path)
    if flags.resume and is_done(output.sink, facts, source.num_rows):
        return replace(job, preview=f"{flags.output}: {WHOLE}\n")
    make_room(output, source, flags, is_remote=not is_local(options))
    if on_dataflow(options):
        _stage(output, options)
    return replace(job, durable=pieces if flags.resume else None)


def _open(
    handler: TaskHandler,
    flags: argparse.Namespace,
    options: PipelineOptions,
    device: DeviceChoice,
) -> tuple[Artifact, PipelineOptions]:
    """Open the model's description and check it against the task, device and workers."""
    artifact = handler.artifact()
    options = worker_options(flags, options, artifact)
    handler.run_on(resource_hints(flags, options))
    check_media(handler.settings, artifact, getattr(flags, "image_size", None))
    handler.check(artifact)
    if is_local(options):
        device = choose_device(artifact, handler.head, device)
    elif device != "auto":
        artifact.signature(handler.head, device)
    if device != "auto":
        if handler.settings.image_columns:
            artifact.signature("vision", device)
        if handler.settings.audio_columns:
            artifact.signature("sound", device)
    return artifact, options


def _source(handler: TaskHandler, flags: argparse.Namespace, options: PipelineOptions) -> Source:
    """Open the table and check it against the task; the task learns where its files may be."""
    source = source_of(flags, options)
    check_columns(handler.settings, source.schema)
    # A preview runs on this machine, whatever the workers may read.
    handler.reading = media_reading(
        flags, source.folder, is_local=is_local(options) or flags.dry_run is not None
    )
    return source


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
        page=_page(flags, settings),
        copies=source.copies,
    )


def _stage(output: Output, options: PipelineOptions) -> None:
    """Prepare what Dataflow's workers install; a job that is not submitted holds no lease."""
    try:
        stage(options)
    except BaseException:  # also Ctrl-C
        output.release()
        raise


def _page(flags: argparse.Namespace, settings: Settings) -> Page | None:
    if flags.report is None:
        if flags.report_rows:
            raise OptionsError(
                f"--report_rows {flags.report_rows}: expected a --report to show them in, got none"
            )
        return None
    return Page(flags.report, flags.report_rows, settings.media_columns)


def _set_up_logs(*, verbose: bool) -> None:
    root = logging.getLogger()
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    root.addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    """Drop what Beam logs at each model load without torch, which our workers do not install."""
    return not record.getMessage().startswith("Resource module is not available")
