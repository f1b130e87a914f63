"""Tables for tests: one of every type that a column may have."""

import datetime as dt
import decimal
import itertools

import pyarrow as pa
import pyarrow.parquet as pq

RICH = pa.schema(
    [
        pa.field("key", pa.int64(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("label", pa.dictionary(pa.int32(), pa.string())),
        pa.field("large", pa.large_string()),
        pa.field("money", pa.decimal128(20, 4)),
        pa.field("at", pa.timestamp("us", "Europe/Berlin")),
        pa.field("nanos", pa.timestamp("ns")),
        pa.field("day", pa.date32()),
        pa.field("raw", pa.binary(), metadata={"unit": "bytes"}),
        pa.field("vector", pa.list_(pa.float32(), 2)),
        pa.field("nested", pa.list_(pa.struct([("a", pa.large_list(pa.int16()))]))),
        pa.field("pairs", pa.map_(pa.string(), pa.int32())),
        pa.field("unsigned", pa.uint64()),
        pa.field("nothing", pa.null()),
    ],
    metadata={"origin": "tests"},
)


def rich_row(key):
    """Return a row with a value, or a null, of every type."""
    if key % 5 == 4:
        # pyarrow cannot read a fixed-size list that is null.
        return {"key": key, "text": f"row {key}", "vector": [0, 0]}
    return {
        "key": key,
        "text": f"row {key}",
        "label": f"label {key % 3}",
        "large": "ü" * (key % 7),
        "money": decimal.Decimal(key) / 16,
        "at": dt.datetime(2020, 1, 1, tzinfo=dt.UTC) + dt.timedelta(hours=key),
        "nanos": key * 1000 + 1,
        "day": dt.date(2020, 1, 1) + dt.timedelta(key),
        "raw": bytes([key % 256]) * 3,
        "vector": [key, float("nan")],
        "nested": [{"a": [key % 100, None]}, None],
        "pairs": [("k", key)],
        "unsigned": 2**63 + key,
    }


def rich_table(keys):
    """Return a table of rows of every type."""
    return pa.Table.from_pylist([rich_row(key) for key in keys], schema=RICH)


def assert_same_schema(schema, wanted):
    """Compare types, and metadata of table and columns; what a job says of itself is left out."""
    assert schema.equals(wanted)
    metadata = schema.metadata or {}
    own = {key: value for key, value in metadata.items() if not key.startswith(b"beam_gemma.")}
    assert own == (wanted.metadata or {})
    assert [field.metadata for field in schema] == [field.metadata for field in wanted]


def text_of(table):
    """Return the rows in the order of their keys as text, where NaN equals NaN."""
    at = table.schema.get_field_index("nanos")
    table = table.set_column(at, "nanos", table.column(at).cast(pa.int64()))
    return [str(row) for row in sorted(table.to_pylist(), key=lambda row: row["key"])]


def write_parquet(path, table, *, rows_per_group=100):
    """Write a table as a file of several row groups."""
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def keys_of(batches):
    """Return the keys of some batches, in order."""
    return list(itertools.chain.from_iterable(b.column("key").to_pylist() for b in batches))
