"""Reading BigQuery: types, positions, as little as is asked for, and what cannot be read."""

import datetime as dt
import math
import pickle
from decimal import Decimal

import pyarrow as pa
import pytest
from google.cloud import bigquery

from beam_gemma.errors import OptionsError
from beam_gemma.tables.bigquery_source import ROW_BITS, BigQuerySource, _read_stream
from beam_gemma.tables.source import BATCH_ROWS

NUM_ROWS = 250_000  # more than the emulator puts into one stream
RICH = """
CREATE TABLE dataset.rich AS SELECT
  7 AS id, 'ü' AS text, b'raw' AS raw, 1.5 AS number, CAST('nan' AS FLOAT64) AS nan,
  CAST('1.25' AS NUMERIC) AS money, CAST('2.5' AS BIGNUMERIC) AS exact, TRUE AS flag,
  DATE '2024-02-29' AS day, TIME '01:02:03.000004' AS time,
  DATETIME '2024-02-29T01:02:03.000004' AS moment,
  TIMESTAMP '2024-02-29T01:02:03.000004Z' AS at,
  [1.5, 2.5] AS vector, STRUCT('x' AS name, [STRUCT(1 AS n)] AS parts) AS nested,
  JSON '{"a":1}' AS json, ST_GEOGPOINT(1, 2) AS place, CAST(NULL AS STRING) AS nothing
"""
RICH_ROW = {
    "id": 7,
    "text": "ü",
    "raw": b"raw",
    "number": 1.5,
    "money": Decimal("1.25"),
    "exact": Decimal("2.5"),
    "flag": True,
    "day": dt.date(2024, 2, 29),
    "time": dt.time(1, 2, 3, 4),
    "moment": dt.datetime(2024, 2, 29, 1, 2, 3, 4),
    "at": dt.datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=dt.UTC),
    "vector": [1.5, 2.5],
    "nested": {"name": "x", "parts": [{"n": 1}]},
    "json": '{"a":1}',
    "place": "POINT(1 2)",
    "nothing": None,
}


@pytest.fixture(scope="module")
def tables(gcp):
    """Tables of BigQuery: one long, one of every type, one empty, and a view."""
    client = bigquery.Client()
    for statement in (
        f"CREATE TABLE dataset.long AS SELECT x AS id, CONCAT('row ', x) AS text, x / 2 AS half "
        f"FROM UNNEST(GENERATE_ARRAY(0, {NUM_ROWS - 1})) AS x",
        RICH,
        "CREATE TABLE dataset.nothing (id INT64, text STRING)",
        "CREATE VIEW dataset.view AS SELECT * FROM dataset.long",
    ):
        client.query_and_wait(statement)
    return gcp


def rows_of(source):
    """Read a table as workers do; each gets its own copy of the source."""
    source = pickle.loads(pickle.dumps(source))
    parts = [piece for part in source.parts() for piece in source.split(part)]
    return [(position, batch) for part in parts for position, batch in source.read(part)]


def table_of(source):
    return pa.Table.from_batches([batch for _, batch in rows_of(source)], source.schema)


@pytest.mark.parametrize("export", [False, True])
def test_every_row_is_read_once_at_a_position_of_its_own(tables, export):
    export_to = f"{tables.bucket}/tmp" if export else None
    source = BigQuerySource.of_table(tables.table("long"), export_to=export_to)
    assert (source.num_rows, source.is_dense, source.files) == (NUM_ROWS, False, ())
    located = rows_of(source)
    ids = sorted(i for _, batch in located for i in batch["id"].to_pylist())
    assert ids == list(range(NUM_ROWS))
    positions = [p + i for p, batch in located for i in range(batch.num_rows)]
    assert len(set(positions)) == NUM_ROWS
    assert max(batch.num_rows for _, batch in located) <= BATCH_ROWS
    streams = {position >> ROW_BITS for position in positions}
    assert streams == ({0} if export else {0, 1, 2})


def test_a_stream_is_the_same_whenever_it_is_read(tables):
    source = BigQuerySource.of_table(tables.table("long"))
    part = list(source.split(source.parts()[0]))[1]
    first, second = list(source.read(part)), list(source.read(part))
    assert [position for position, _ in first] == [position for position, _ in second]
    assert all(a.equals(b) for (_, a), (_, b) in zip(first, second, strict=True))


def test_every_type_comes_as_it_is(tables):
    source = BigQuerySource.of_table(tables.table("rich"))
    (row,) = table_of(source).to_pylist()
    assert math.isnan(row.pop("nan"))
    assert row == RICH_ROW
    (head,) = source.head(5)
    assert head.schema == source.schema
    (listed,) = head.to_pylist()
    assert math.isnan(listed.pop("nan"))
    assert listed == RICH_ROW


def test_an_export_keeps_types_too(tables):
    columns = tuple(RICH_ROW.keys() - {"json", "place"})
    source = BigQuerySource.of_table(
        tables.table("rich"), columns=columns, export_to=f"{tables.bucket}/tmp"
    )
    (row,) = table_of(source).to_pylist()
    assert row == {name: RICH_ROW[name] for name in columns}


def test_only_columns_that_are_asked_for_are_read(tables, monkeypatch):
    came = []

    def read_stream(name, columns):
        for batch in _read_stream(name, columns):
            came.append(batch.schema.names)
            yield batch

    monkeypatch.setattr("beam_gemma.tables.bigquery_source._read_stream", read_stream)
    source = BigQuerySource.of_table(tables.table("long"), columns=("half", "id"))
    assert {tuple(batch.schema.names) for _, batch in rows_of(source)} == {("half", "id")}
    assert all(names == ["id", "half"] for names in came)
    assert next(source.head(1)).to_pydict() == {"half": [0.0], "id": [0]}


def test_a_limit_reads_no_more(tables):
    source = BigQuerySource.of_table(
        tables.table("long"), limit=20_000, export_to=f"{tables.bucket}/none"
    )
    assert source.num_rows == 20_000
    assert sum(batch.num_rows for _, batch in rows_of(source)) == 20_000
    assert sum(batch.num_rows for batch in source.head(3)) == 3


def test_a_sample_is_from_places_all_over(tables):
    source = BigQuerySource.of_table(tables.table("long"), columns=("id",))
    (keys,) = pa.Table.from_batches(source.sample(50)).to_pydict().values()
    place = NUM_ROWS // 10
    assert keys == [start + i for start in range(0, NUM_ROWS, place) for i in range(5)]
    limited = BigQuerySource.of_table(tables.table("long"), limit=20)
    assert sum(batch.num_rows for batch in limited.sample(10)) == 10


def test_an_empty_table_has_no_rows(tables):
    source = BigQuerySource.of_table(tables.table("nothing"))
    assert source.num_rows == 0
    assert rows_of(source) == []
    assert sum(batch.num_rows for batch in source.head(3)) == 0


@pytest.mark.usefixtures("tables")
def test_a_query_is_run_once_and_its_result_read():
    source = BigQuerySource.of_query("SELECT id, text FROM dataset.long WHERE id < 3", limit=2)
    assert table_of(source).to_pydict() == {"id": [0, 1], "text": ["row 0", "row 1"]}


@pytest.mark.usefixtures("tables")
def test_the_result_of_a_query_has_the_key_that_is_asked_for(monkeypatch):
    configs = []
    query = bigquery.Client.query

    def spy(self, sql, *, job_config):
        configs.append(job_config.destination_encryption_configuration)
        return query(self, sql, job_config=job_config)

    monkeypatch.setattr(bigquery.Client, "query", spy)
    key = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
    BigQuerySource.of_query("SELECT 1 AS id", kms_key=key)
    BigQuerySource.of_query("SELECT 1 AS id")
    assert configs[0].kms_key_name == key
    assert configs[1] is None


def test_a_dry_run_of_a_query_scans_nothing(tables):
    sql = "CREATE TABLE dataset.made AS SELECT 1 AS id"
    source = BigQuerySource.of_query("SELECT id, [1.5] AS v FROM dataset.long", dry_run=True)
    assert source.schema == pa.schema(
        [("id", pa.int64()), pa.field("v", pa.list_(pa.float64()), nullable=False)]
    )
    assert list(source.head(5)) == []
    BigQuerySource.of_query(sql, dry_run=True)
    with pytest.raises(OptionsError, match="Not found"):
        BigQuerySource.of_table(tables.table("made"))


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("bq://dataset.long", "expected bq://PROJECT.DATASET.TABLE"),
        ("bq://p..t", "expected bq://PROJECT.DATASET.TABLE"),
        ("bq://test-project.dataset.no", r"Not found: Table .*dataset\.no; check the name$"),
        (
            "bq://test-project.dataset.view",
            r"got a view; read it with --query 'SELECT \* FROM `test-project\.dataset\.view`'$",
        ),
    ],
)
@pytest.mark.usefixtures("tables")
def test_what_cannot_be_read_is_said_in_one_sentence(uri, sentence):
    with pytest.raises(OptionsError, match=sentence) as caught:
        BigQuerySource.of_table(uri)
    assert str(caught.value).startswith(uri)


def test_columns_that_cannot_be_read_are_refused_unless_left_out(tables):
    uri = tables.table("rich")
    with pytest.raises(OptionsError, match=r"column 'json': .* leave it out with --columns"):
        BigQuerySource.of_table(uri, export_to=f"{tables.bucket}/tmp")
    with pytest.raises(OptionsError, match=r"--columns: .* got 'idd'; did you mean id"):
        BigQuerySource.of_table(uri, columns=("idd",))
    bigquery.Client().query_and_wait("CREATE TABLE dataset.spans (id INT64, span INTERVAL)")
    with pytest.raises(OptionsError, match=r"column 'span': .* got INTERVAL"):
        BigQuerySource.of_table(tables.table("spans"))
    assert BigQuerySource.of_table(tables.table("spans"), columns=("id",)).schema.names == ["id"]


def test_a_wrong_query_and_a_missing_project_are_one_sentence(tables, monkeypatch):
    with pytest.raises(OptionsError, match=r"--query: BigQuery answers: Unrecognized name: foo$"):
        BigQuerySource.of_query("SELECT foo")
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT")
    with pytest.raises(OptionsError, match="got none; pass --project"):
        BigQuerySource.of_table(tables.table("long"))
