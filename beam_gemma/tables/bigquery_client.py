"""BigQuery client that raises our errors, and the parsing of table URIs."""

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
        OptionsError: the URI does not name a table.
    """
    try:
        # A project id may contain dots, a table name may not.
        project, dataset, table = uri.removeprefix(SCHEME).rsplit(".", 2)
    except ValueError:
        project = dataset = table = ""
    if not (uri.startswith(SCHEME) and project and dataset and table):
        raise OptionsError(f"{uri}: expected {SCHEME}PROJECT.DATASET.TABLE")
    return bigquery.DatasetReference(project, dataset).table(table)


def open_client(project: str | None) -> bigquery.Client:
    """Return a BigQuery client.

    Args:
        project: Project that runs and pays for the jobs; None for the credentials' project.

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
    """Return the encryption settings for a customer's Cloud KMS key; None without a key."""
    return None if kms_key is None else bigquery.EncryptionConfiguration(kms_key)


@contextmanager
def asking(what: str, *, role: str) -> Iterator[None]:
    """Turn BigQuery's API errors into our own.

    Args:
        what: The subject of the error message, such as a table URI or a flag.
        role: IAM role that the message suggests if access is denied.

    Raises:
        OptionsError: BigQuery returned an error.
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
