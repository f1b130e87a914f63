"""Write BigQuery tables: shards are staged on Cloud Storage and loaded by one job.

A load job makes all of its rows visible at once or none, and BigQuery runs each job id only once.
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
from beam_gemma.storage import CLOUD_STORAGE, is_file, remove, write_once
from beam_gemma.tables.bigquery_client import asking, encryption, open_client, table_of
from beam_gemma.tables.bigquery_schema import conformed, table_schema
from beam_gemma.tables.held_types import held_schema
from beam_gemma.tables.sink import Format, Sink

Disposition = Literal["create", "append", "replace"]
WRITE_DISPOSITIONS: dict[Disposition, str] = {
    "create": bigquery.WriteDisposition.WRITE_EMPTY,
    "append": bigquery.WriteDisposition.WRITE_APPEND,
    "replace": bigquery.WriteDisposition.WRITE_TRUNCATE,
}
EDITOR = "BigQuery Data Editor"
MAX_DESCRIPTION = 16_384
"""Maximum length of a BigQuery table description, in characters."""
COMPARED = {"input", "rows", "tasks"}
"""Fields of a record that another job is compared by; a long record is described without some."""


@dataclass(frozen=True, kw_only=True)
class BigQuerySink(Sink):
    """A BigQuery table to write."""

    uri: str
    work: str
    disposition: Disposition
    project: str
    """Project that runs the load job."""
    kms_key: str | None = None
    """Customer's Cloud KMS key that encrypts a new table."""
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
        """Return a sink for a BigQuery table.

        Args:
            uri: bq://PROJECT.DATASET.TABLE.
            temp_location: Cloud Storage folder for unfinished work.
            disposition: How to treat existing rows; `create` allows none.
            project: Project that runs the load job; None for the credentials' project.
            kms_key: Cloud KMS key that encrypts a new table; None for Google's own key.

        Raises:
            OptionsError: the URI does not name a table, or `temp_location` is not on gs://.
        """
        table = table_of(uri)
        if temp_location is None or not temp_location.startswith(CLOUD_STORAGE):
            raise OptionsError(
                f"--temp_location: expected a folder on {CLOUD_STORAGE} to load {uri} from, got "
                f"{temp_location or 'none'}"
            )
        return cls(
            uri=uri,
            work=f"{temp_location.rstrip('/')}/beam-gemma/{table}.work",
            disposition=disposition,
            project=open_client(project).project,
            kms_key=kms_key,
        )

    def earlier(self) -> list[str]:
        """Return the URI of the table if it has rows."""
        table = self._existing(open_client(self.project))
        if table is None or not (table.num_rows or table.streaming_buffer):
            return []
        return [self.uri]

    def check(self, schema: pa.Schema) -> None:
        """Reject a schema that BigQuery or the existing table does not accept.

        Raises:
            OptionsError: a column cannot be written, or the dataset does not exist.
        """
        fields = table_schema(held_schema(schema, self.format))
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

    def record(self) -> Mapping[str, Any] | None:
        """Return the record in the table's description; None if that is another text."""
        with asking(self.uri, role=EDITOR):
            table = self._existing(open_client(self.project))
        try:
            told = json.loads(table.description or "null") if table is not None else None
        except ValueError:
            return None
        return told if isinstance(told, dict) and told.keys() >= COMPARED else None

    def publish(self, staged: Sequence[str], record: Mapping[str, Any]) -> None:
        """Load all shards in one job and write the record into the table's description."""
        self.check_held(record["job"])
        client = open_client(self.project)
        with asking(self.uri, role=EDITOR):
            self._load(client, staged, record)
            self._describe(client, record)

    def begin_anew(self) -> None:
        """Delete the saved results of an earlier job, and the id of its load job."""
        super().begin_anew()
        if is_file(self._note):
            remove([self._note])

    @property
    def _note(self) -> str:
        """Path of the file that holds the id of this output's load job."""
        return f"{self.work}/load.txt"

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
        """Run the load job unless an earlier call has run it."""
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
                # An earlier call started this job id; if that job failed, try the next id.
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
        parquet.enable_list_inference = True  # otherwise lists load as nested records
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
        """Return a job id prefix that is the same each time this run publishes this output.

        A job resumed after a kill reuses the note in the work folder; a later job writes its own.
        """
        if not is_file(self._note):
            write_once(self._note, uuid.uuid4().hex.encode())
        with FileSystems.open(self._note) as stream:
            output = stream.read()
        tasks = [(task["model_digest"], task["settings"]) for task in record["tasks"]]
        run = json.dumps([record["input"], record["rows"], tasks], sort_keys=True)
        return f"beam-gemma-{hashlib.blake2b(output + run.encode(), digest_size=16).hexdigest()}"

    def _describe(self, client: bigquery.Client, record: Mapping[str, Any]) -> None:
        """Write the run record to the table; appending keeps an existing description."""
        table = client.get_table(table_of(self.uri))
        if self.disposition == "append" and table.description:
            return
        table.labels = {**table.labels, **_labels(record)}
        table.description = _description(record)
        client.update_table(table, ["labels", "description"])


def _labels(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the labels of the table and the load job: version and models."""
    labels = {"version": beam_gemma.__version__}
    for task in record["tasks"]:
        labels[task["task"]] = task["model_digest"][:16]
    return {
        f"beam_gemma_{name}": re.sub(r"[^a-z0-9_-]", "-", value) for name, value in labels.items()
    }


def _description(record: Mapping[str, Any]) -> str:
    """Return the record as JSON, without its largest fields if it is too long."""
    fields = dict(record)
    while len(text := json.dumps(fields, ensure_ascii=False)) > MAX_DESCRIPTION:
        del fields[max(fields, key=lambda name: len(json.dumps(fields[name])))]
    return text
