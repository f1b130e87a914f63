"""Publish the output of a job, once it is complete."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from beam_gemma.errors import BalanceError, FailuresError
from beam_gemma.jobs.run_record import record_of
from beam_gemma.jobs.shards import Layout
from beam_gemma.monitoring.html_report import render
from beam_gemma.monitoring.result_summary import Summary
from beam_gemma.storage import create, delete_folder
from beam_gemma.tables.file_sink import stage
from beam_gemma.tables.sink import Sink


class Page(NamedTuple):
    """An HTML report to write."""

    path: str
    num_rows: int
    """Number of output rows to show."""
    media: tuple[str, ...] = ()
    """Columns with pictures or sounds, of which only the sizes are shown."""


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
    """Part of the run record that is known before the run, with the id of the `job`."""
    errors: Sink | None = None
    """Table that failed rows are also written to."""
    max_error_fraction: float = 1.0
    """Maximum fraction of failed rows; above it, nothing is published."""
    page: Page | None = None
    """Report on the run to write, if any."""
    copies: str | None = None
    """Folder of temporary input copies, deleted once the output is published."""

    @property
    def job(self) -> str:
        """Id of the job, which holds the leases of the sinks."""
        job: str = self.facts["job"]
        return job

    @property
    def sinks(self) -> list[Sink]:
        """The tables to write, the failed rows first."""
        return [sink for sink in (self.errors, self.sink) if sink is not None]

    def release(self) -> None:
        """Give back the leases that the job holds: it does not run."""
        for sink in self.sinks:
            sink.release(self.job)


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


def publish(
    output: Output, staged: Iterable[Staged], num_read: int, ledger: Iterable[str]
) -> dict[str, Any]:
    """Check that the output is complete, publish it, and return the record of the run.

    Args:
        output: The output.
        staged: Its staged shards.
        num_read: The number of rows that were read.
        ledger: Events of the tasks as JSON, as `record_of` takes them.

    Raises:
        BalanceError: rows or shards are missing or doubled.
        FailuresError: more rows failed than allowed.
        StorageError: another job has taken the place of this one, or a file cannot be renamed.
    """
    shards = sorted(staged)
    summaries = [sum(own, Summary()) for own in zip(*(s.summaries for s in shards), strict=True)]
    _check_balance(shards, output.layout.num_shards, num_read)
    _check_errors(summaries, output.max_error_fraction)
    for sink in output.sinks:
        sink.check_held(output.job)
    record = record_of(
        output.facts,
        num_shards=output.layout.num_shards,
        prefixes=[task.prefix for task in output.tasks],
        summaries=summaries,
        ledger=map(json.loads, ledger),
    )
    if output.errors is not None:
        output.errors.publish(_error_files(shards, output), record)
    output.sink.publish([shard.path for shard in shards], record)
    _put_in_order(output, record, shards[0].shown)
    return record


def _put_in_order(output: Output, record: Mapping[str, Any], shown: bytes) -> None:
    """Write the report and delete what is left; the leases go last."""
    if output.page is not None:
        with create(output.page.path) as stream:
            rows = [json.loads(row) for row in shown.splitlines()]
            stream.write(render(record, rows).encode())
    if output.copies is not None:
        delete_folder(output.copies)
    for sink in output.sinks:
        sink.clear()


def _in_files(field: pa.Field) -> pa.Field:
    """Return a result field as written to files: a fixed-size list becomes a plain list.

    PyArrow cannot read nulls of fixed-size lists back from files, and failed rows have them.
    """
    if pa.types.is_fixed_size_list(field.type):
        return field.with_type(pa.list_(field.type.value_type))
    return field


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
