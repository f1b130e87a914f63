"""Read BigQuery tables and query results as Arrow.

The parts of a table are streams of the Storage Read API, which sends only the selected columns.
Alternatively, the table is exported to Parquet files and those are read.
"""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystems import FileSystems
from google.cloud import bigquery, bigquery_storage_v1

from beam_gemma.batches import Located, with_schema
from beam_gemma.errors import OptionsError
from beam_gemma.storage import match_files
from beam_gemma.tables.bigquery_client import asking, encryption, open_client, table_of
from beam_gemma.tables.bigquery_schema import EXTENSION, arrow_schema
from beam_gemma.tables.source import (
    BATCH_ROWS,
    SAMPLE_PLACES,
    Source,
    batch_rows,
    sample_places,
    selected,
)

ROW_BITS = 40
"""Low bits of a position, which count rows; the bits above hold the stream or file number."""
TABLE_TYPES = ("TABLE", "SNAPSHOT", "CLONE")
VIEWER, SESSION_USER, JOB_USER = (
    f"BigQuery {role}" for role in ("Data Viewer", "Read Session User", "Job User")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A stream of a read session, or a file of an export."""

    name: str
    number: int


@dataclass(frozen=True, kw_only=True)
class BigQuerySource(Source):
    """A BigQuery table or the result of a query."""

    uri: str
    """URI of the table, or the text of the query."""
    schema: pa.Schema
    num_rows: int | None
    num_bytes: int
    table: bigquery.TableReference | None
    """Table to read; None for a query that has not been run."""
    project: str
    """Project that pays for reading."""
    limit: int | None = None
    copies: str | None = None
    """Cloud Storage folder to export to; None reads from BigQuery's storage."""
    is_dense: bool = False

    @classmethod
    def of_table(
        cls,
        uri: str,
        *,
        project: str | None = None,
        columns: tuple[str, ...] | None = None,
        limit: int | None = None,
        export_to: str | None = None,
    ) -> "BigQuerySource":
        """Return a source for a BigQuery table.

        Args:
            uri: bq://PROJECT.DATASET.TABLE.
            project: Project that pays for reading; None for the credentials' project.
            columns: The columns to read; None for all.
            limit: Number of rows to read, chosen by BigQuery; None for all.
            export_to: Cloud Storage folder to export the table to. With None or with a limit, rows
                are read from BigQuery's storage, because an export writes all rows.

        Raises:
            OptionsError: the table or a column does not exist or cannot be read.
        """
        client = open_client(project)
        with asking(uri, role=VIEWER):
            table = client.get_table(table_of(uri))
        _check_type(table, uri)
        return cls._of(table, uri, client.project, columns, limit, export_to)

    @classmethod
    def of_query(
        cls,
        sql: str,
        *,
        project: str | None = None,
        columns: tuple[str, ...] | None = None,
        limit: int | None = None,
        export_to: str | None = None,
        dry_run: bool = False,
        kms_key: str | None = None,
    ) -> "BigQuerySource":
        """Run a query and return a source for its result.

        Args:
            sql: The query, in GoogleSQL.
            project: As in `of_table`; also pays for the query.
            columns: As in `of_table`.
            limit: As in `of_table`; the query itself runs in full.
            export_to: As in `of_table`.
            dry_run: Only ask for the result's columns and the bytes that the query would scan. Such
                a source has no rows.
            kms_key: Cloud KMS key that encrypts the result; None for Google's own key.

        Raises:
            OptionsError: BigQuery rejects the query, or its result cannot be read.
        """
        client = open_client(project)
        with asking("--query", role=JOB_USER):
            config = bigquery.QueryJobConfig(dry_run=dry_run)
            config.destination_encryption_configuration = encryption(kms_key)
            job = client.query(sql, job_config=config)
            if not dry_run:
                job.result()
                table = client.get_table(job.destination)
                return cls._of(table, sql, client.project, columns, limit, export_to)
        return cls(
            uri=sql,
            schema=_selected(job.schema or (), columns, sql),
            num_rows=None,
            num_bytes=job.total_bytes_processed or 0,
            table=None,
            project=client.project,
        )

    @classmethod
    def _of(
        cls,
        table: bigquery.Table,
        uri: str,
        project: str,
        columns: tuple[str, ...] | None,
        limit: int | None,
        export_to: str | None,
    ) -> "BigQuerySource":
        schema = _selected(table.schema, columns, uri)
        if limit is not None:
            export_to = None
        copies = None
        if export_to is not None:
            _check_export(schema, uri)
            copies = FileSystems.join(export_to, f"beam-gemma-export-{uuid.uuid4().hex}")
        # Rows in the streaming buffer are read but not counted yet.
        num_rows = None if table.streaming_buffer else table.num_rows
        if limit is not None and num_rows is not None:
            num_rows = min(limit, num_rows)
        return cls(
            uri=uri,
            schema=schema,
            num_rows=num_rows,
            num_bytes=table.num_bytes or 0,
            table=table.reference,
            project=project,
            limit=limit,
            copies=copies,
        )

    def parts(self) -> list[Part]:
        """Return the whole table as one part, which workers split."""
        return [Part(name=self.uri, number=0)]

    def split(self, part: Part) -> Iterator[Part]:
        """Return the streams of a new read session, or the files of a new export."""
        del part  # the whole table
        names = self._streams() if self.copies is None else self._export(self.copies)
        for number, name in enumerate(names):
            yield Part(name=name, number=number)

    def read(self, part: Part) -> Iterator[Located]:
        """Return the rows of a stream or a file."""
        read = _read_stream if self.copies is None else _read_file
        schema = self.schema.remove_metadata()
        position = part.number << ROW_BITS
        end = None if self.limit is None else position + self.limit
        for batch in read(part.name, schema.names):
            rows = batch if end is None else batch.slice(0, end - position)
            for piece in _pieces(with_schema(rows.select(schema.names), schema)):
                yield position, piece
                position += piece.num_rows
            if position == end:
                return

    def head(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return the first rows through the row listing API, which scans nothing."""
        return self._list([0], num_rows)

    def sample(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return rows from several places through the row listing API, which scans nothing."""
        if self.num_rows is None or self.limit is not None or self.num_rows <= num_rows:
            return self.head(num_rows)
        return self._list(sample_places(self.num_rows), num_rows // SAMPLE_PLACES)

    def _list(self, places: Sequence[int], num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return `num_rows` rows starting at each place."""
        if self.table is None:
            return
        schema = self.schema.remove_metadata()
        client = open_client(self.project)
        with asking(self.uri, role=VIEWER):
            table = client.get_table(self.table)
            fields = [field for field in table.schema if field.name in schema.names]
            for place in places:
                rows = client.list_rows(table, fields, start_index=place, max_results=num_rows)
                for batch in rows.to_arrow_iterable():
                    yield with_schema(batch.select(schema.names), schema)

    def _streams(self) -> list[str]:
        assert self.table is not None  # a dry run reads no part
        client = bigquery_storage_v1.BigQueryReadClient()
        session = bigquery_storage_v1.types.ReadSession(
            table=self.table.path.removeprefix("/"),
            data_format=bigquery_storage_v1.types.DataFormat.ARROW,
            read_options={"selected_fields": self.schema.names},
        )
        with asking(self.uri, role=SESSION_USER):
            session = client.create_read_session(
                parent=f"projects/{self.project}",
                read_session=session,
                # A limit takes its rows from one stream; with 0, BigQuery decides.
                max_stream_count=0 if self.limit is None else 1,
            )
        return [stream.name for stream in session.streams]

    def _export(self, folder: str) -> list[str]:
        assert self.table is not None
        # A retry exports into a new folder.
        pattern = FileSystems.join(folder, uuid.uuid4().hex, "*.parquet")
        config = bigquery.ExtractJobConfig(
            destination_format=bigquery.DestinationFormat.PARQUET,
            compression=bigquery.Compression.ZSTD,
        )
        with asking(self.uri, role=JOB_USER):
            client = open_client(self.project)
            client.extract_table(self.table, pattern, job_config=config).result()
        return match_files(pattern)


def _check_type(table: bigquery.Table, uri: str) -> None:
    if table.table_type not in TABLE_TYPES:
        raise OptionsError(
            f"{uri}: expected a table, got a {table.table_type.lower().replace('_', ' ')}; "
            f"read it with --query 'SELECT * FROM `{table.reference}`'"
        )


def _check_export(schema: pa.Schema, uri: str) -> None:
    for field in schema:
        if EXTENSION in (field.metadata or {}):
            raise OptionsError(
                f"{uri}: column {field.name!r}: expected a type that is exported as it is, got "
                "JSON or GEOGRAPHY; leave it out with --columns or pass --read_method DIRECT_READ"
            )


def _selected(
    fields: Sequence[bigquery.SchemaField], columns: tuple[str, ...] | None, uri: str
) -> pa.Schema:
    """Return the schema of the columns to read; the others may have any type."""
    by_name = {field.name: field for field in fields}
    names = selected(pa.schema([(name, pa.null()) for name in by_name]), columns, uri).names
    return arrow_schema([by_name[name] for name in names], uri)


def _read_stream(name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Return the rows of a stream; the client resumes after a broken connection."""
    del columns  # already selected by the session
    client = bigquery_storage_v1.BigQueryReadClient()
    schema = None
    for response in client.read_rows(name):
        if schema is None:  # only the first response has a schema
            schema = pa.ipc.read_schema(pa.py_buffer(response.arrow_schema.serialized_schema))
        rows = response.arrow_record_batch.serialized_record_batch
        yield pa.ipc.read_record_batch(pa.py_buffer(rows), schema)


def _read_file(path: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with FileSystems.open(path) as stream:
        yield from pq.ParquetFile(stream).iter_batches(BATCH_ROWS, columns=columns)


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slice a batch into pieces within the pipeline's batch limits."""
    size = batch_rows(batch.nbytes // max(1, batch.num_rows))
    for start in range(0, batch.num_rows, size):
        yield batch.slice(start, size)
