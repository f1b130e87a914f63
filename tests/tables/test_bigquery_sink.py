"""Writing BigQuery: types, what becomes of rows that are there, one load however often."""

import datetime as dt
import itertools
import json
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystems import FileSystems
from google.cloud import bigquery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beam_gemma.errors import OptionsError
from beam_gemma.tables.bigquery_schema import table_schema
from beam_gemma.tables.bigquery_sink import MAX_DESCRIPTION, BigQuerySink
from beam_gemma.tables.bigquery_source import BigQuerySource
from beam_gemma.tables.lease import is_held
from tests.doubles.leases import JOB, hold

RECORD = {
    "job": JOB,
    "input": "in.parquet",
    "rows": 3,
    "tasks": [{"task": "generate", "model_digest": "ab" * 32, "settings": {"prompt": "{text}"}}],
}
NAMES = (f"out_{i}" for i in itertools.count())
ROWS = pa.table({"id": pa.array([1, 2, 3]), "text": ["a", None, "ü"]})


@pytest.fixture
def uri(gcp):
    """The name of a table that is not there."""
    return gcp.table(next(NAMES))


@pytest.fixture
def sink_of(gcp):
    """Describe a table to write."""
    return lambda uri, disposition="create": BigQuerySink.open(
        uri, temp_location=f"{gcp.bucket}/tmp", disposition=disposition
    )


def stage(sink, table, num_shards=2):
    """Write the shards of a table as a job does, with its lease; return their names."""
    if not is_held(sink.work, JOB):
        hold(sink)
    shards = [f"{sink.work}/staged/{next(NAMES)}.parquet" for _ in range(num_shards)]
    size = -(-table.num_rows // num_shards)
    for i, shard in enumerate(shards):
        with FileSystems.create(shard) as stream:
            pq.write_table(table.slice(i * size, size), stream)
    return shards


def write(sink, table, record=RECORD):
    sink.check(table.schema)
    sink.publish(stage(sink, table), record)
    sink.clear()


def read(uri):
    source = BigQuerySource.of_table(uri)
    parts = [piece for part in source.parts() for piece in source.split(part)]
    batches = [batch for part in parts for _, batch in source.read(part)]
    return pa.Table.from_batches(batches, source.schema)


def jobs():
    return [job for job in bigquery.Client().list_jobs() if job.job_type == "load"]


def table_of(uri):
    return bigquery.Client().get_table(uri.removeprefix("bq://"))


def test_rows_arrive_with_labels_and_a_record(uri, sink_of):
    sink = sink_of(uri)
    assert sink.earlier() == []
    write(sink, ROWS)
    assert read(uri).sort_by("id").to_pydict() == ROWS.to_pydict()
    assert sink.earlier() == [uri]
    assert not FileSystems.exists(sink.work)
    table = table_of(uri)
    assert json.loads(table.description) == RECORD
    assert table.labels["beam_gemma_generate"] == "abababababababab"
    assert re.fullmatch(r"\d+-\d+-\d+", table.labels["beam_gemma_version"])


def test_a_new_table_has_the_key_that_is_asked_for(uri, gcp, monkeypatch):
    configs = []
    load = bigquery.Client.load_table_from_uri

    def spy(self, *args, job_config, **kwargs):
        configs.append(job_config.destination_encryption_configuration)
        return load(self, *args, job_config=job_config, **kwargs)

    monkeypatch.setattr(bigquery.Client, "load_table_from_uri", spy)
    for key in ("projects/p/locations/l/keyRings/r/cryptoKeys/k", None):
        sink = BigQuerySink.open(
            uri, temp_location=f"{gcp.bucket}/tmp", disposition="replace", kms_key=key
        )
        write(sink, ROWS)
    asked, default = configs
    assert asked.kms_key_name == "projects/p/locations/l/keyRings/r/cryptoKeys/k"
    assert default is None


def test_a_second_call_loads_nothing_again(uri, sink_of):
    sink = sink_of(uri, "append")
    staged = stage(sink, ROWS)
    before = len(jobs())
    sink.publish(staged, RECORD)
    sink.publish(staged, RECORD)
    # As after a kill, and with the files of a resumed job.
    sink.publish(stage(sink, ROWS), {**RECORD, "seconds": 5})
    assert read(uri).num_rows == 3
    assert len(jobs()) == before + 1


def test_another_run_over_what_was_left_is_loaded(uri, sink_of):
    sink = sink_of(uri, "append")
    sink.publish(stage(sink, ROWS), RECORD)
    sink.publish(stage(sink, ROWS), {**RECORD, "input": "other.parquet"})
    assert read(uri).num_rows == 6


def test_a_load_that_failed_is_tried_again(uri, sink_of):
    sink = sink_of(uri)
    table = ROWS.append_column("number", pa.array([1.0, 2.0, 3.0]))
    good = stage(sink, table)
    bad = f"{sink.work}/staged/bad.parquet"
    with FileSystems.create(bad) as stream:
        stream.write(b"PAR1 but nothing more")
    with pytest.raises(OptionsError, match=f"{uri}: BigQuery answers: Error while reading data"):
        sink.publish([good[0], bad], RECORD)
    sink.publish(good, RECORD)
    assert read(uri).num_rows == 3


def test_rows_that_are_there_are_refused_kept_or_replaced(uri, sink_of):
    write(sink_of(uri), ROWS)
    staged = stage(sink_of(uri), ROWS)
    with pytest.raises(OptionsError, match="Already Exists: Table"):
        sink_of(uri).publish(staged, {**RECORD, "rows": 4})
    write(sink_of(uri, "append"), ROWS, {**RECORD, "rows": 5})
    assert read(uri).num_rows == 6
    assert json.loads(table_of(uri).description)["rows"] == 3  # of those that were there
    other = pa.table({"other": [1.5]})
    write(sink_of(uri, "replace"), other, {**RECORD, "rows": 1})
    assert read(uri).to_pydict() == {"other": [1.5]}
    assert json.loads(table_of(uri).description)["rows"] == 1


@pytest.mark.parametrize(
    ("there", "sentence"),
    [
        ("id INT64", r"expected a column 'text' of type STRING, NULLABLE, got none"),
        ("id STRING, text STRING", r"column 'id' of type INTEGER, NULLABLE, got STRING, NULLABLE"),
        (
            "id INT64, text ARRAY<STRING>",
            r"'text' of type STRING, NULLABLE, got REPEATED STRING, REPEATED",
        ),
        (
            "id INT64, text STRING NOT NULL",
            r"'text' of type STRING, NULLABLE, got STRING, REQUIRED",
        ),
        ("id INT64, text STRING, need INT64 NOT NULL", r"a value for its column 'need'"),
    ],
)
def test_an_append_that_would_fail_is_refused_before_the_job(uri, sink_of, there, sentence):
    bigquery.Client().query_and_wait(f"CREATE TABLE {uri.removeprefix('bq://')} ({there})")
    with pytest.raises(OptionsError, match=sentence):
        sink_of(uri, "append").check(ROWS.schema)
    sink_of(uri, "replace").check(ROWS.schema)


def test_what_a_table_has_beside_the_columns_stays(uri, sink_of):
    there = "text STRING, more STRING, id INT64 NOT NULL"
    bigquery.Client().query_and_wait(f"CREATE TABLE {uri.removeprefix('bq://')} ({there})")
    assert sink_of(uri).earlier() == []
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False), ("text", pa.string())])
    write(sink_of(uri, "append"), ROWS.cast(schema))
    assert [field.name for field in table_of(uri).schema] == ["text", "more", "id"]
    assert table_of(uri).schema[2].mode == "REQUIRED"
    assert read(uri).select(["id", "text"]).sort_by("id").to_pydict() == ROWS.to_pydict()


def test_missing_places_are_said_before_the_job(gcp, uri, sink_of):
    with pytest.raises(OptionsError, match=r"Not found: Dataset .*nowhere.*; check the name"):
        sink_of(f"bq://{gcp.project}.nowhere.table").check(ROWS.schema)
    with pytest.raises(OptionsError, match="--temp_location: expected a folder on gs://"):
        BigQuerySink.open(uri, temp_location="/tmp")
    bigquery.Client().query_and_wait(f"CREATE VIEW {uri.removeprefix('bq://')} AS SELECT 1 AS id")
    with pytest.raises(OptionsError, match="expected a table, got a view"):
        sink_of(uri).check(ROWS.schema)


def test_a_record_that_is_too_long_loses_its_largest_parts(uri, sink_of):
    write(sink_of(uri), ROWS, {**RECORD, "timelines": ["x"] * MAX_DESCRIPTION})
    assert json.loads(table_of(uri).description) == RECORD


def test_numbers_that_are_none_stay_what_they_are(uri, sink_of):
    numbers = [math.nan, math.inf, -math.inf, None]
    vectors = pa.array([[math.nan, 1.0], [math.inf], [], None], pa.list_(pa.float32()))
    write(sink_of(uri), pa.table({"id": range(4), "number": numbers, "vector": vectors}))
    rows = read(uri).sort_by("id").to_pydict()
    assert list(map(repr, rows["number"])) == list(map(repr, numbers))
    # BigQuery has no missing list.
    assert list(map(repr, rows["vector"])) == ["[nan, 1.0]", "[inf]", "[]", "[]"]


REFUSED = [
    (pa.field("a b", pa.int64()), "a name that BigQuery allows"),
    (pa.field("1st", pa.int64()), "a name that BigQuery allows"),
    (pa.field("größe", pa.int64()), "a name that BigQuery allows"),
    (pa.field("_PARTITIONTIME", pa.int64()), "a name that BigQuery allows"),
    (pa.field("x" * 301, pa.int64()), "a name that BigQuery allows"),
    (pa.field("ID", pa.int64()), "takes it for 'id'"),
    (pa.field("x", pa.uint64()), "got uint64"),
    (pa.field("x", pa.float16()), "got halffloat"),
    (pa.field("x", pa.timestamp("ns")), "got timestamp"),
    (pa.field("x", pa.duration("s")), "got duration"),
    (pa.field("x", pa.null()), "got null"),
    (pa.field("x", pa.map_(pa.string(), pa.int64())), "got map"),
    (pa.field("x", pa.decimal256(76, 0)), "got decimal256"),
    (pa.field("x", pa.list_(pa.list_(pa.int64()))), "no list of lists"),
    (pa.field("x", pa.string(), metadata={"ARROW:extension:name": "google:sqlType:json"}), "JSON"),
    (pa.field("x", pa.struct([("y", pa.struct([("z-z", pa.int64())]))])), r"column x\.y\.'z-z'"),
]


@pytest.mark.parametrize(("field", "sentence"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_bigquery_does_not_have_is_one_sentence(field, sentence):
    with pytest.raises(OptionsError, match=sentence) as caught:
        table_schema(pa.schema([("id", pa.int64()), field]))
    assert str(caught.value).startswith("column ")


def test_bytes_are_bytes():
    for kind in (pa.binary(), pa.large_binary(), pa.binary(3)):
        (field,) = table_schema(pa.schema([("x", kind)]))
        assert (field.field_type, field.mode) == ("BYTES", "NULLABLE")


DATES = st.dates(dt.date(1, 1, 1), dt.date(9999, 12, 31))
TIMES = st.datetimes(dt.datetime(1, 1, 2), dt.datetime(9999, 12, 30))
# Without bytes: the emulator takes those of a Parquet file for base64.
SCALARS = [
    (pa.bool_(), st.booleans()),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.int8(), st.integers(-128, 127)),
    (pa.uint32(), st.integers(0, 2**32 - 1)),
    (pa.float64(), st.floats(allow_nan=False)),
    (pa.float32(), st.floats(allow_nan=False, width=32)),
    (pa.string(), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
    (pa.large_string(), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
    (pa.dictionary(pa.int8(), pa.string()), st.sampled_from(["a", "b"])),
    (pa.decimal128(20, 4), st.decimals(-(10**9), 10**9, places=4)),
    # The emulator has 18 digits after the point of a BIGNUMERIC, BigQuery has 38.
    (pa.decimal256(38, 18), st.decimals(-(10**9), 10**9, places=18)),
    (pa.date32(), DATES),
    (pa.time64("us"), st.times()),
    (pa.timestamp("us"), TIMES),
    (pa.timestamp("us", "UTC"), TIMES.map(lambda time: time.replace(tzinfo=dt.UTC))),
    (pa.timestamp("ms", "Europe/Berlin"), st.just(dt.datetime(2024, 7, 1, 12, tzinfo=dt.UTC))),
]


@st.composite
def columns(draw, depth=2):
    """A type, and values of it."""
    kind, values = draw(st.sampled_from(SCALARS))
    if depth and draw(st.booleans()):
        inner = draw(st.lists(columns(depth=depth - 1), min_size=1, max_size=3))
        kind = pa.struct([(f"f{i}", field) for i, (field, _) in enumerate(inner)])
        values = st.fixed_dictionaries({f"f{i}": value for i, (_, value) in enumerate(inner)})
    if not pa.types.is_dictionary(kind) and not _has_list(kind) and draw(st.booleans()):
        return pa.list_(kind), st.lists(values, max_size=3)
    return kind, values | st.none()


def _has_list(kind):
    return pa.types.is_struct(kind) and any(pa.types.is_list(field.type) for field in kind)


@given(st.data())
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_rows_of_any_schema_come_back(gcp, sink_of, data):
    """Through a load job and the Storage Read API, with the types of BigQuery."""
    kinds = data.draw(st.lists(columns(), min_size=1, max_size=4))
    schema = pa.schema(
        [("id", pa.int64())] + [(f"c{i}", kind) for i, (kind, _) in enumerate(kinds)]
    )
    rows = [
        {"id": i} | {f"c{j}": data.draw(values) for j, (_, values) in enumerate(kinds)}
        for i in range(data.draw(st.integers(0, 4)))
    ]
    uri = gcp.table(next(NAMES))
    write(sink_of(uri), pa.Table.from_pylist(rows, schema))
    assert read(uri).sort_by("id").to_pylist() == pa.Table.from_pylist(rows, schema).to_pylist()
