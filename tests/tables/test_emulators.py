"""The emulators stand in for the services well enough to test against."""

from apache_beam.io.filesystems import FileSystems
from google.cloud import bigquery


def test_a_table_can_be_asked(gcp):
    client = bigquery.Client()
    assert client.project == gcp.project
    (row,) = client.query_and_wait("SELECT 1 AS one")
    assert row.one == 1


def test_files_can_be_written_renamed_and_deleted(gcp):
    first, second = (f"{gcp.bucket}/emulators/{name}" for name in ("first", "second"))
    with FileSystems.create(first) as file:
        file.write(b"content")
    FileSystems.rename([first], [second])
    assert not FileSystems.exists(first)
    with FileSystems.open(second) as file:
        assert file.read() == b"content"
    FileSystems.delete([f"{gcp.bucket}/emulators/"])
    assert not FileSystems.exists(second)
