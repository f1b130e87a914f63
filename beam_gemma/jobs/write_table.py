"""Write the output: join rows with results, stage shards, and publish them together."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import AsIter, AsSingleton, PCollection
from apache_beam.typehints.decorators import no_annotations

from beam_gemma.batches import Grouped, Located, Tagged
from beam_gemma.errors import BalanceError, FailuresError
from beam_gemma.jobs.run_record import record_of
from beam_gemma.jobs.shards import Layout, assembled
from beam_gemma.monitoring.html_report import render
from beam_gemma.monitoring.progress import METRICS_NAMESPACE
from beam_gemma.monitoring.result_summary import Summary
from beam_gemma.storage import create, delete_folder
from beam_gemma.tables import json_lines
from beam_gemma.tables.file_sink import ShardFile, stage
from beam_gemma.tables.sink import Sink

TABLE, NOTHING = -1, -2
"""Tags of non-result batches: rows of the table, and an empty one so that each shard exists."""


class Page(NamedTuple):
    """An HTML report to write."""

    path: str
    num_rows: int
    """Number of output rows to show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """Outputs of a job and their destinations."""

    sink: Sink
    layout: Layout
    schema: pa.Schema
    """All columns, and the metadata of the table."""
    tasks: tuple["Columns", ...]
    """Result columns of each task, in the order of the tags."""
    facts: Mapping[str, Any]
    """Part of the run record that is known before the run."""
    errors: Sink | None = None
    """Table that failed rows are also written to."""
    max_error_fraction: float = 1.0
    """Maximum fraction of failed rows; above it, nothing is published."""
    page: Page | None = None
    """Report on the run to write, if any."""
    copies: str | None = None
    """Folder of temporary input copies, deleted once the output is published."""


class Columns(NamedTuple):
    """The result columns of one task."""

    prefix: str
    """Prefix of each column name in the output."""
    schema: pa.Schema
    """Columns under their names without the prefix."""

    @property
    def in_files(self) -> pa.Schema:
        """Schema of the columns as written to files."""
        return pa.schema(
            [_in_files(field.with_name(self.prefix + field.name)) for field in self.schema]
        )


class Staged(NamedTuple):
    """A complete staged shard."""

    shard: int
    path: str
    errors_path: str | None
    summaries: list[Summary]
    """Result summary of each task."""
    shown: bytes
    """Rows for the report, as JSON lines."""


class WriteTable(beam.PTransform[Any, PCollection[str]]):
    """Writes rows with their results; takes rows, results and the ledger, and returns the record.

    Nothing is published unless every row that was read is there, with one result of each task.
    """

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    @no_annotations  # type: ignore[untyped-decorator]
    def expand(
        self, inputs: tuple[PCollection[Located], PCollection[Grouped], PCollection[str]]
    ) -> PCollection[str]:
        """Apply the transform."""
        rows, results, ledger = inputs
        output = self._output
        table = rows | "ByShard" >> beam.FlatMap(_by_shard, output.layout).with_output_types(
            Grouped
        )
        shards = rows.pipeline | "Shards" >> beam.Create(
            range(output.layout.num_shards), reshuffle=False
        )
        empty = shards | "Empty" >> beam.Map(_empty).with_output_types(Grouped)
        staged = (
            (table, results, empty)
            | "Join" >> beam.Flatten()
            | "Group" >> beam.GroupByKey()
            | "Stage" >> beam.ParDo(_Stage(output))
        )
        num_read = rows | "Sizes" >> beam.Map(_num_rows) | "Sum" >> beam.CombineGlobally(sum)
        return (
            staged
            | "One" >> beam.Map(lambda shard: (None, shard))
            | "Gather" >> beam.GroupByKey()
            | "Publish" >> beam.ParDo(_Publish(output), AsSingleton(num_read), AsIter(ledger))
        )


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
            shown = shown or json_lines.format_rows(written.slice(0, num_shown))
            _count(written, output.tasks)
            summaries = [total + Summary.of(a) for total, a in zip(summaries, answers, strict=True)]
        file.close()
        yield Staged(shard, path, failures.close(), summaries, shown)


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
    """Checks that the output is complete and publishes it."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def process(
        self, gathered: tuple[None, Iterable[Staged]], num_read: int, ledger: Iterable[str]
    ) -> Iterator[str]:
        output = self._output
        shards = sorted(gathered[1])
        summaries = [
            sum(own, Summary()) for own in zip(*(s.summaries for s in shards), strict=True)
        ]
        _check_balance(shards, output.layout.num_shards, num_read)
        _check_errors(summaries, output.max_error_fraction)
        record = record_of(
            output.facts,
            num_shards=output.layout.num_shards,
            prefixes=[task.prefix for task in output.tasks],
            summaries=summaries,
            ledger=map(json.loads, ledger),
        )
        if output.errors is not None:
            output.errors.publish(_error_files(shards, output), record)
            output.errors.clear()
        output.sink.publish([shard.path for shard in shards], record)
        output.sink.clear()
        if output.copies is not None:
            delete_folder(output.copies)
        if output.page is not None:
            with create(output.page.path) as stream:
                rows = [json.loads(row) for row in shards[0].shown.splitlines()]
                stream.write(render(record, rows).encode())
        yield json.dumps(record)


def _by_shard(located: Located, layout: Layout) -> Iterator[Grouped]:
    for shard, position, batch in layout.split(*located):
        yield shard, (TABLE, position, batch)


def _empty(shard: int) -> Grouped:
    return shard, (NOTHING, 0, pa.RecordBatch.from_pylist([], schema=pa.schema([])))


def _num_rows(located: Located) -> int:
    return located[1].num_rows


def _in_files(field: pa.Field) -> pa.Field:
    """Return a result field as written to files: a fixed-size list becomes a plain list.

    PyArrow cannot read nulls of fixed-size lists back from files, and failed rows have them.
    """
    if pa.types.is_fixed_size_list(field.type):
        return field.with_type(pa.list_(field.type.value_type))
    return field


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


def _check_balance(shards: list[Staged], num_shards: int, num_read: int) -> None:
    if [staged.shard for staged in shards] != list(range(num_shards)):
        raise BalanceError(
            f"shards: expected {num_shards:,}, one each, got {len(shards):,}; run the job again"
        )
    num_staged = sum(staged.summaries[0].rows for staged in shards)
    if num_staged != num_read:
        raise BalanceError(
            f"rows: expected all {num_read:,} that were read, got {num_staged:,}; run the job again"
        )


def _check_errors(summaries: list[Summary], max_error_fraction: float) -> None:
    for summary in summaries:
        if summary.failed > max_error_fraction * summary.rows:
            reasons = "; ".join(f"{n:,} x {why}" for why, n in summary.reasons.most_common(3))
            raise FailuresError(
                f"rows: expected at most {max_error_fraction:g} of them to fail, got "
                f"{summary.failed:,} of {summary.rows:,}: {reasons}"
            )


def _error_files(shards: list[Staged], output: Output) -> list[str]:
    """Return the files of failed rows, or one empty file if no row failed."""
    assert output.errors is not None
    if paths := [staged.errors_path for staged in shards if staged.errors_path is not None]:
        return paths
    path, file = stage(output.errors, 0, output.schema)
    file.close()
    return [path]
