"""Tables of BigQuery as outputs: shards are staged on Cloud Storage and loaded by one job.

A load job makes all of its rows visible at once, or none, and BigQuery runs each job id only once.
"""

import hashlib
import itertools
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystems import FileSystems
from google.api_core.exceptions import Conflict, NotFound
from google.cloud import bigquery

import beam_gemma
from beam_gemma.errors import OptionsError
from beam_gemma.storage import write_once
from beam_gemma.tables.bigquery_client import asking, encryption, open_client, table_of
from beam_gemma.tables.bigquery_schema import conformed, table_schema
from beam_gemma.tables.sink import Format, Sink

Disposition = Literal["create", "append", "replace"]
WRITE_DISPOSITIONS: dict[Disposition, str] = {
    "create": bigquery.WriteDisposition.WRITE_EMPTY,
    "append": bigquery.WriteDisposition.WRITE_APPEND,
    "replace": bigquery.WriteDisposition.WRITE_TRUNCATE,
}
EDITOR = "BigQuery Data Editor"
MAX_DESCRIPTION = 16_384
"""Characters that BigQuery keeps of a table's description."""


@dataclass(frozen=True, kw_only=True)
class BigQuerySink(Sink):
    """A table of BigQuery to write."""

    uri: str
    work: str
    disposition: Disposition
    project: str
    """Which one runs the load job."""
    kms_key: str | None = None
    """Cloud KMS key of the customer's that a new table is encrypted with."""
    format: Format = "parquet"
    can_append: ClassVar[bool] = True

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        temp_location: str | None,
        disposition: Disposition = "create",
        project: str | None = None,
        kms_key: str | None = None,
    ) -> "BigQuerySink":
        """Describe a table.

        Args:
            uri: bq://PROJECT.DATASET.TABLE.
            temp_location: Folder on Cloud Storage, for what is not finished.
            disposition: What becomes of rows that are there: `create` allows none.
            project: Which one runs the load job; None for that of the credentials.
            kms_key: What a new table is encrypted with; None for Google's own key.

        Raises:
            OptionsError: it is no table's name, or there is no such folder.
        """
        table = table_of(uri)
        if temp_location is None or not temp_location.startswith("gs://"):
            raise OptionsError(
                f"--temp_location: expected a folder on gs:// to load {uri} from, got "
                f"{temp_location or 'none'}"
            )
        name = f"{table.project}.{table.dataset_id}.{table.table_id}"
        return cls(
            uri=uri,
            work=f"{temp_location.rstrip('/')}/beam-gemma/{name}.work",
            disposition=disposition,
            project=open_client(project).project,
            kms_key=kms_key,
        )

    def earlier(self) -> list[str]:
        """Return the name of the table if it has rows."""
        table = self._existing(open_client(self.project))
        if table is None or not (table.num_rows or table.streaming_buffer):
            return []
        return [self.uri]

    def check(self, schema: pa.Schema) -> None:
        """Refuse a schema that BigQuery, or the table that is there, does not take.

        Raises:
            OptionsError: a column cannot be written, or there is no such dataset.
        """
        fields = table_schema(schema)
        client = open_client(self.project)
        with asking(self.uri, role=EDITOR):
            client.get_dataset(self._dataset)
        table = self._existing(client)
        if table is None:
            return
        if table.table_type != "TABLE":
            raise OptionsError(
                f"{self.uri}: expected a table, got a {table.table_type.lower()}; choose another "
                "name"
            )
        if self.disposition != "replace":
            conformed(fields, table.schema, self.uri)

    def publish(self, staged: Sequence[str], record: Mapping[str, Any]) -> None:
        """Load all shards at once and describe the table."""
        client = open_client(self.project)
        with asking(self.uri, role=EDITOR):
            self._load(client, staged, record)
            self._describe(client, record)

    @property
    def _dataset(self) -> bigquery.DatasetReference:
        table = table_of(self.uri)
        return bigquery.DatasetReference(table.project, table.dataset_id)

    def _existing(self, client: bigquery.Client) -> bigquery.Table | None:
        try:
            with asking(self.uri, role=EDITOR):
                return client.get_table(table_of(self.uri))
        except OptionsError as error:
            if isinstance(error.__cause__, NotFound):
                return None
            raise

    def _load(
        self, client: bigquery.Client, staged: Sequence[str], record: Mapping[str, Any]
    ) -> None:
        """Run the load job, unless an earlier call has."""
        location = client.get_dataset(self._dataset).location
        config = self._config(client, staged[0], record)
        job_id = self._job_id(record)
        for attempt in itertools.count():
            name = f"{job_id}-{attempt}"
            try:
                job = client.load_table_from_uri(
                    staged, table_of(self.uri), name, location=location, job_config=config
                )
            except Conflict:
                # An earlier call has begun this one; if that came to nothing, the next is ours.
                earlier: Any = client.get_job(name, location=location)
                if earlier.exception() is None:
                    return
            else:
                job.result()
                return

    def _config(
        self, client: bigquery.Client, shard: str, record: Mapping[str, Any]
    ) -> bigquery.LoadJobConfig:
        with FileSystems.open(shard) as stream:
            fields = table_schema(pq.read_schema(stream))
        table = None if self.disposition == "replace" else self._existing(client)
        parquet = bigquery.ParquetOptions()
        parquet.enable_list_inference = True  # else a list is a record of a record
        config = bigquery.LoadJobConfig(
            source_format=bigquery.SourceFormat.PARQUET,
            schema=fields if table is None else conformed(fields, table.schema, self.uri),
            write_disposition=WRITE_DISPOSITIONS[self.disposition],
            labels=_labels(record),
        )
        config.parquet_options = parquet
        config.destination_encryption_configuration = encryption(self.kms_key)
        return config

    def _job_id(self, record: Mapping[str, Any]) -> str:
        """Return a name that is the same whenever this output of this run is published.

        A job that was killed goes on with the note that it finds; a later job makes its own.
        """
        note = f"{self.work}/load.txt"
        if not FileSystems.exists(note):
            write_once(note, uuid.uuid4().hex.encode())
        with FileSystems.open(note) as stream:
            output = stream.read()
        tasks = [(task["model_digest"], task["settings"]) for task in record["tasks"]]
        run = json.dumps([record["input"], record["rows"], tasks], sort_keys=True)
        return f"beam-gemma-{hashlib.blake2b(output + run.encode(), digest_size=16).hexdigest()}"

    def _describe(self, client: bigquery.Client, record: Mapping[str, Any]) -> None:
        """Write the record of the run to the table; rows that were there keep their description."""
        table = client.get_table(table_of(self.uri))
        if self.disposition == "append" and table.description:
            return
        table.labels = {**table.labels, **_labels(record)}
        table.description = _description(record)
        client.update_table(table, ["labels", "description"])


def _labels(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what tables and jobs can be found by."""
    labels = {"version": beam_gemma.__version__}
    for task in record["tasks"]:
        labels[task["task"]] = task["model_digest"][:16]
    return {
        f"beam_gemma_{name}": re.sub(r"[^a-z0-9_-]", "-", value) for name, value in labels.items()
    }


def _description(record: Mapping[str, Any]) -> str:
    """Return as much of a record as fits, as JSON: the largest parts go first."""
    fields = dict(record)
    while len(text := json.dumps(fields, ensure_ascii=False)) > MAX_DESCRIPTION:
        del fields[max(fields, key=lambda name: len(json.dumps(fields[name])))]
    return text
