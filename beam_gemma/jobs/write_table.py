"""Write the output: join rows with results, stage shards, and publish them together."""

import functools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import AsIter, AsSingleton, PCollection
from apache_beam.runners.direct.direct_runner import SwitchingDirectRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.transforms.window import GlobalWindows
from apache_beam.typehints.decorators import no_annotations

from beam_gemma.batches import Grouped, Located, Tagged, by_group, joined
from beam_gemma.errors import OptionsError
from beam_gemma.inference.task_handler import TaskHandler
from beam_gemma.jobs.fetch_media import described
from beam_gemma.jobs.infer_table import Answers
from beam_gemma.jobs.publish import Columns, Output, Staged, publish
from beam_gemma.jobs.run_record import facts_of
from beam_gemma.jobs.shards import Layout, assembled
from beam_gemma.monitoring.progress import METRICS_NAMESPACE
from beam_gemma.monitoring.result_summary import Summary
from beam_gemma.tables import json_lines
from beam_gemma.tables.file_sink import ShardFile, open_sink, stage
from beam_gemma.tables.lease import Lease, Standing, new_job
from beam_gemma.tables.open_table import ReadTable
from beam_gemma.tables.sink import Sink
from beam_gemma.tasks.columns import check_columns
from beam_gemma.tasks.row_keys import POSITION

HELD_RESULTS = 8192
"""Number of results to collect before sorting them by shard, so that batches are not tiny."""
TABLE, NOTHING = -1, -2
"""Tags of non-result batches: rows of the table, and an empty one so that each shard exists."""


class WriteOutput(beam.PTransform[Any, PCollection[str]]):
    """Joins rows with their results, writes them, and returns the record of the run.

    Takes the rows and the `Answers` of each task, in the order of the output's tasks. Nothing is
    published unless every row that was read is there, with one result of each task.
    """

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    @no_annotations  # type: ignore[untyped-decorator]
    def expand(self, inputs: tuple[PCollection[Located], Sequence[Answers]]) -> PCollection[str]:
        """Apply the transform."""
        rows, answers = inputs
        output = self._output
        table = rows | "ByShard" >> beam.FlatMap(_by_shard, output.layout).with_output_types(
            Grouped
        )
        # Each collection is sorted by a step of its own: one step that reads several would have
        # them buffered first.
        results = [
            found | f"Results{tag}.{part}" >> beam.ParDo(by_shard).with_output_types(Grouped)
            for tag, answer in enumerate(answers)
            for by_shard in [_ResultsByShard(output.layout, tag)]
            for part, found in enumerate(answer.results)
        ]
        shards = rows.pipeline | "Shards" >> beam.Create(
            range(output.layout.num_shards), reshuffle=False
        )
        empty = shards | "Empty" >> beam.Map(_empty).with_output_types(Grouped)
        staged = (
            (table, *results, empty)
            | "Join" >> beam.Flatten()
            | "Group" >> beam.GroupByKey()
            | "Stage" >> beam.ParDo(_Stage(output))
        )
        num_read = rows | "Sizes" >> beam.Map(_num_rows) | "Sum" >> beam.CombineGlobally(sum)
        ledger = [
            answer.ledger | f"Ledger{tag}" >> beam.Map(_entry, tag).with_output_types(str)
            for tag, answer in enumerate(answers)
        ] | "Ledger" >> beam.Flatten()
        return (
            staged
            | "One" >> beam.Map(lambda shard: (None, shard))
            | "Gather" >> beam.GroupByKey()
            | "Publish" >> beam.ParDo(_Publish(output), AsSingleton(num_read), AsIter(ledger))
        )


class WriteTable(beam.PTransform[Any, PCollection[str]]):
    """Writes a table with the results of one task or of several.

    Takes the rows of a `ReadTable` and the results of each task as `InferTable` returns them, under
    the names of the tasks. Result columns of a task are named `{task}_{column}`. The output appears
    when it is complete: every row that was read, in its order, with one result of each task, and a
    record of the run beside it.

    Args:
        uri: Table to write, such as `out/articles.parquet`.
        table: The table that is read.
        handlers: The handler of each task, by the task's name.
        num_shards: The number of files; 0 for as many as make none too large.

    Raises:
        OptionsError: the table lacks a column that a task uses, or the output is there already or
            cannot be written.

    Example:
        >>> articles = ReadTable("examples/articles.parquet")
        >>> gist = GemmaEmbedModelHandler(
        ...     MODEL, EmbedSettings(text_column="title"), large_model=False
        ... )
        >>> with beam.Pipeline(runner="FnApiRunner") as pipeline:
        ...     rows = pipeline | "Read" >> articles
        ...     answers = {"gist": rows | "Gist" >> InferTable(gist)}
        ...     write = WriteTable(f"{OUT}/x.parquet", articles, {"gist": gist})
        ...     record = (rows, answers) | "Write" >> write
    """

    def __init__(
        self,
        uri: str,
        table: ReadTable,
        handlers: Mapping[str, TaskHandler],
        *,
        num_shards: int = 0,
    ) -> None:
        super().__init__()
        source = table.source
        for handler in handlers.values():
            check_columns(handler.settings, source.schema)
        tasks = {n: Columns(f"{n}_", h.settings.result_schema) for n, h in handlers.items()}
        results = pa.schema([field for task in tasks.values() for field in task.in_files])
        sink = open_sink(uri)
        _check_room(sink)
        schema = pa.schema([*source.schema, *results], source.schema.metadata)
        sink.check(schema)
        self._names = tuple(handlers)
        self._output = Output(
            sink=sink,
            layout=Layout.of(source, results, num_shards=num_shards),
            schema=schema,
            tasks=tuple(tasks.values()),
            facts=facts_of(
                ["python", *sys.orig_argv[1:]],
                source=source.uri,
                sink=uri,
                tasks=[(h.facts()["model"], h.artifact(), h.settings) for h in handlers.values()],
            ),
        )

    @no_annotations  # type: ignore[untyped-decorator]
    def expand(
        self, inputs: tuple[PCollection[Located], Mapping[str, Answers]]
    ) -> PCollection[str]:
        """Apply the transform."""
        rows, answers = inputs
        if set(answers) != set(self._names):
            raise OptionsError(
                f"answers: expected those of {', '.join(self._names)}, got {', '.join(answers)}"
            )
        ordered = tuple(answers[name] for name in self._names)
        output = self._output
        job = new_job()
        lives_here = isinstance(rows.pipeline.runner, SwitchingDirectRunner | FnApiRunner)
        claim = Lease.of_this_process(job, is_remote=not lives_here)
        if other := output.sink.hold(claim, up_to=Standing.ENDED):
            raise OptionsError(
                f"{output.sink.uri}: expected no other job that writes it, got {other}; wait for "
                f"its end, or delete {output.sink.work} if it has ended"
            )
        # Another job may have published until the lease was taken.
        _check_room(output.sink)
        output = replace(output, facts={**output.facts, "job": job})
        return (rows, ordered) | "Output" >> WriteOutput(output)


def _check_room(sink: Sink) -> None:
    if earlier := sink.earlier():
        raise OptionsError(f"{sink.uri}: expected no earlier output, got {earlier[0]}; remove it")


class _Stage(beam.DoFn):
    """Stages one shard, and its failed rows in a separate file."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def process(self, group: tuple[int, Iterable[Tagged]]) -> Iterator[Staged]:
        shard, batches = group
        output = self._output
        rows: list[Located] = []
        results: dict[int, list[pa.RecordBatch]] = {}
        for tag, position, batch in batches:
            if tag == TABLE:
                rows.append((position, batch))
            elif tag != NOTHING:
                results.setdefault(tag, []).append(batch)
        path, file = stage(output.sink, shard, output.schema)
        failures = _Failures(output, shard)
        summaries = [Summary() for _ in output.tasks]
        shown = b""
        num_shown = output.page.num_rows if output.page is not None and shard == 0 else 0
        wanted = output.layout.rows_of(shard)
        for batch, answers in assembled(rows, results, len(output.tasks), wanted):
            written = _with_results(batch, answers, output)
            file.write(written)
            failures.write(written)
            shown = shown or self._shown(written.slice(0, num_shown))
            _count(written, output.tasks)
            summaries = [total + Summary.of(a) for total, a in zip(summaries, answers, strict=True)]
        file.close()
        yield Staged(shard, path, failures.close(), summaries, shown)

    def _shown(self, rows: pa.RecordBatch) -> bytes:
        page = self._output.page
        return json_lines.format_rows(rows if page is None else described(rows, page.media))


class _ResultsByShard(beam.DoFn):
    """Groups results by their output shard."""

    def __init__(self, layout: Layout, tag: int) -> None:
        self._layout = layout
        self._tag = tag

    def start_bundle(self) -> None:
        self._held: list[pa.RecordBatch] = []

    def process(self, results: pa.RecordBatch) -> Iterator[Grouped]:
        self._held.append(results)
        if sum(batch.num_rows for batch in self._held) >= HELD_RESULTS:
            yield from self._sorted()

    def finish_bundle(self) -> Iterator[Any]:
        if self._held:
            yield from map(GlobalWindows.windowed_value_at_end_of_window, self._sorted())

    def _sorted(self) -> Iterator[Grouped]:
        results = joined(self._held)
        self._held = []
        shards = self._layout.shards_of(results.column(POSITION).to_numpy())
        for shard, some in by_group(shards, results):
            yield shard, (self._tag, 0, some)


class _Failures:
    """Writes the failed rows of a shard to a file, opened at the first of them."""

    def __init__(self, output: Output, shard: int) -> None:
        self._output = output
        self._shard = shard
        self._path: str | None = None
        self._file: ShardFile | None = None

    def write(self, batch: pa.RecordBatch) -> None:
        """Write the failed rows of a batch."""
        sink = self._output.errors
        if sink is None:
            return
        failed = batch.filter(_has_failed(batch, self._output.tasks))
        if not failed.num_rows:
            return
        if self._file is None:
            self._path, self._file = stage(sink, self._shard, self._output.schema)
        self._file.write(failed)

    def close(self) -> str | None:
        """Close the file and return its path; None if no row failed."""
        if self._file is not None:
            self._file.close()
        return self._path


class _Publish(beam.DoFn):
    """Publishes the output."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def process(
        self, gathered: tuple[None, Iterable[Staged]], num_read: int, ledger: Iterable[str]
    ) -> Iterator[str]:
        yield json.dumps(publish(self._output, gathered[1], num_read, ledger))


def _entry(told: dict[str, Any], tag: int) -> str:
    return json.dumps({"tag": tag, **told})


def _by_shard(located: Located, layout: Layout) -> Iterator[Grouped]:
    for shard, position, batch in layout.split(*located):
        yield shard, (TABLE, position, batch)


def _empty(shard: int) -> Grouped:
    return shard, (NOTHING, 0, pa.RecordBatch.from_pylist([], schema=pa.schema([])))


def _num_rows(located: Located) -> int:
    return located[1].num_rows


def _with_results(
    rows: pa.RecordBatch, answers: list[pa.RecordBatch], output: Output
) -> pa.RecordBatch:
    """Return the rows with the results of all tasks, in the output schema."""
    results = [column for answer in answers for column in answer.columns]
    columns = [
        column.cast(field.type)
        for column, field in zip([*rows.columns, *results], output.schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=output.schema)


def _has_failed(rows: pa.RecordBatch, tasks: tuple[Columns, ...]) -> pa.BooleanArray:
    """Return a mask of the rows that have an error in any task."""
    failed = [rows.column(f"{task.prefix}error").is_valid() for task in tasks]
    return functools.reduce(pc.or_, failed)


def _count(rows: pa.RecordBatch, tasks: tuple[Columns, ...]) -> None:
    failed = _has_failed(rows, tasks).true_count
    counts = {
        "rows_written": rows.num_rows,
        "written_ok": rows.num_rows - failed,
        "written_failed": failed,
    }
    for name, number in counts.items():
        Metrics.counter(METRICS_NAMESPACE, name).inc(number)
