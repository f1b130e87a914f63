"""Importing this points the clients of Google Cloud at the emulators that the environment names.

Processes of workers import it too: --beam_plugins=tests.doubles.cloud_clients.
"""

import itertools
import os

import grpc
from google.cloud import bigquery_storage_v1
from google.cloud.bigquery_storage_v1.services.big_query_read.transports import (
    BigQueryReadGrpcTransport,
)
from google.cloud.storage import batch

BIGQUERY_STORAGE_GRPC = "BIGQUERY_STORAGE_GRPC"
"""Where BigQuery's Storage API answers; its client, unlike the others, knows no such variable."""
UNLIMITED = [("grpc.max_receive_message_length", -1)]


class _Reader(bigquery_storage_v1.BigQueryReadClient):
    """Reads from the emulator."""

    def __init__(self, **settings):
        channel = grpc.insecure_channel(os.environ[BIGQUERY_STORAGE_GRPC], options=UNLIMITED)
        super().__init__(transport=BigQueryReadGrpcTransport(channel=channel), **settings)


class _NamedPart(batch.MIMEApplicationHTTP):
    """A part of a batch with a name: fake-gcs-server skips those that have none."""

    _numbers = itertools.count(1)

    def __init__(self, method, uri, headers, body):
        super().__init__(method, uri, headers, body)
        self["Content-ID"] = f"<part+{next(self._numbers)}>"


bigquery_storage_v1.BigQueryReadClient = _Reader
batch.MIMEApplicationHTTP = _NamedPart
