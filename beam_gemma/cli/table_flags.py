"""Open the tables that flags name for reading and writing: files or BigQuery."""

import argparse
import re

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from beam_gemma.errors import OptionsError
from beam_gemma.storage import CLOUD_STORAGE
from beam_gemma.tables.bigquery_client import SCHEME
from beam_gemma.tables.bigquery_sink import BigQuerySink, Disposition
from beam_gemma.tables.bigquery_source import BigQuerySource
from beam_gemma.tables.file_sink import open_sink
from beam_gemma.tables.open_table import open_source
from beam_gemma.tables.sink import Sink
from beam_gemma.tables.source import Source

STREAM = re.compile(r"(pubsub|kafka|kinesis)://|projects/[^/]+/(topics|subscriptions)/")


def refuse_streams(uri: str | None) -> None:
    """Reject an unbounded input.

    Raises:
        OptionsError: the URI names a stream.
    """
    if uri is not None and STREAM.match(uri):
        raise OptionsError(
            f"--input {uri}: expected a table, which has an end, got a stream; have it written to "
            "BigQuery or files, and read those"
        )


def source_of(flags: argparse.Namespace, options: PipelineOptions) -> Source:
    """Return the table that a job reads; a query runs now, except in a dry run.

    Raises:
        OptionsError: the table does not exist or cannot be read with these flags.
    """
    cloud = options.view_as(GoogleCloudOptions)
    is_bigquery = flags.query is not None or flags.input.startswith(SCHEME)
    if not is_bigquery:
        if flags.read_method is not None:
            raise OptionsError(
                f"--read_method {flags.read_method}: expected a table of BigQuery or a --query, "
                f"got {flags.input}"
            )
        return open_source(
            flags.input, limit=flags.limit, columns=flags.columns, dry_run=flags.dry_run is not None
        )
    export_to = cloud.temp_location if flags.read_method == "EXPORT" else None
    if flags.read_method == "EXPORT" and not (export_to or "").startswith(CLOUD_STORAGE):
        raise OptionsError(
            f"--read_method EXPORT: expected a folder on {CLOUD_STORAGE} to export to, got "
            f"{export_to or 'none'}; pass --temp_location"
        )
    what = {"limit": flags.limit, "columns": flags.columns, "export_to": export_to}
    if flags.query is None:
        return BigQuerySource.of_table(flags.input, project=cloud.project, **what)
    return BigQuerySource.of_query(
        flags.query,
        project=cloud.project,
        dry_run=flags.dry_run is not None,
        kms_key=cloud.dataflow_kms_key,
        **what,
    )


def sink_of(uri: str, flags: argparse.Namespace, options: PipelineOptions) -> Sink:
    """Return the table that a job writes to a URI.

    Raises:
        OptionsError: the table cannot be written with these flags.
    """
    if not uri.startswith(SCHEME):
        if flags.append and uri == flags.output:
            raise OptionsError(
                f"--append: expected a table of BigQuery to add rows to, got {uri}; choose a new "
                "name, tables of many files are read by a pattern"
            )
        return open_sink(uri)
    cloud = options.view_as(GoogleCloudOptions)
    return BigQuerySink.open(
        uri,
        temp_location=cloud.temp_location,
        disposition=_disposition(flags),
        project=cloud.project,
        kms_key=cloud.dataflow_kms_key,
    )


def _disposition(flags: argparse.Namespace) -> Disposition:
    if flags.append and flags.overwrite:
        raise OptionsError("--append: expected no --overwrite beside it; pass one of them")
    if flags.append:
        return "append"
    return "replace" if flags.overwrite else "create"
