"""BigQuery's client, with errors of ours: names of tables, and who may ask."""

from collections.abc import Iterator
from contextlib import contextmanager

from google.api_core.exceptions import Forbidden, GoogleAPICallError, NotFound
from google.auth.exceptions import DefaultCredentialsError
from google.cloud import bigquery

from beam_gemma.errors import OptionsError

SCHEME = "bq://"


def table_of(uri: str) -> bigquery.TableReference:
    """Return the table that a URI names.

    Raises:
        OptionsError: it is no name of a table.
    """
    try:
        # A project may have a dot in its name, a table has none.
        project, dataset, table = uri.removeprefix(SCHEME).rsplit(".", 2)
    except ValueError:
        project = dataset = table = ""
    if not (uri.startswith(SCHEME) and project and dataset and table):
        raise OptionsError(f"{uri}: expected {SCHEME}PROJECT.DATASET.TABLE")
    return bigquery.DatasetReference(project, dataset).table(table)


def open_client(project: str | None) -> bigquery.Client:
    """Return a client.

    Args:
        project: Which one runs its jobs and pays for them; None for that of the credentials.

    Raises:
        OptionsError: there are no credentials, or no project.
    """
    try:
        return bigquery.Client(project=project)
    except DefaultCredentialsError as error:
        raise OptionsError(
            "BigQuery: expected credentials, got none; run gcloud auth application-default login"
        ) from error
    except OSError as error:
        raise OptionsError(
            "BigQuery: expected a project to run jobs in, got none; pass --project"
        ) from error


def encryption(kms_key: str | None) -> bigquery.EncryptionConfiguration | None:
    """Return what has a job's result encrypted with a key of the customer's, if there is one."""
    return None if kms_key is None else bigquery.EncryptionConfiguration(kms_key)


@contextmanager
def asking(what: str, *, role: str) -> Iterator[None]:
    """Give errors of BigQuery our words.

    Args:
        what: The thing at fault if there is an error.
        role: What one must be to be answered.

    Raises:
        OptionsError: BigQuery refused.
    """
    try:
        yield
    except GoogleAPICallError as error:
        message = error.errors[0]["message"] if error.errors else error.message
        remedy = ""
        if isinstance(error, NotFound):
            remedy = "; check the name"
        elif isinstance(error, Forbidden):
            remedy = f"; ask for the role {role}"
        raise OptionsError(f"{what}: BigQuery answers: {message.rstrip('.')}{remedy}") from error
