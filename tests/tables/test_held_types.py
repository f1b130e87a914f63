"""What each format holds: one table of types and formats, each pair of which is tried."""

import datetime as dt
import decimal
import io
import json
import uuid

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.batches import python_value
from beam_gemma.errors import OptionsError
from beam_gemma.tables import json_lines
from beam_gemma.tables.held_types import held_schema
from tests.doubles.tables import RICH, rich_table

FAR = 2**60
"""Microseconds from 1970 to the year 38505."""
TENSOR = pa.fixed_shape_tensor(pa.int32(), [2])
VALUES = {
    "null": (pa.nulls(1), None),
    "boolean": (pa.array([True]), True),
    "byte": (pa.array([-1], pa.int8()), -1),
    "unsigned": (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    "half": (pa.array([1.5], pa.float16()), 1.5),
    "infinity": (pa.array([float("inf")]), None),
    "nan": (pa.array([float("nan")], pa.float32()), None),
    "string": (pa.array(["ü"]), "ü"),
    "large string": (pa.array(["ü"], pa.large_string()), "ü"),
    "string view": (pa.array(["ü"], pa.string_view()), "ü"),
    "string of bytes that are no text": (pa.array([b"a\xff"]).view(pa.string()), "a\ufffd"),
    "dictionary": (pa.array(["x"]).dictionary_encode(), "x"),
    "dictionary of numbers": (pa.array([7]).dictionary_encode(), 7),
    "binary": (pa.array([b"\0\xff"]), "AP8="),
    "large binary": (pa.array([b"\0\xff"], pa.large_binary()), "AP8="),
    "binary view": (pa.array([b"\0\xff"], pa.binary_view()), "AP8="),
    "fixed binary": (pa.array([b"\0\xff"], pa.binary(2)), "AP8="),
    "decimal": (pa.array([decimal.Decimal("1.50")]), "1.50"),
    "short decimal": (pa.array([decimal.Decimal("1.50")], pa.decimal32(5, 2)), "1.50"),
    "wide decimal": (pa.array([decimal.Decimal("1.50")], pa.decimal256(60, 2)), "1.50"),
    "negative scale": (pa.array([decimal.Decimal("1E2")], pa.decimal128(5, -2)), "1E+2"),
    "date": (pa.array([dt.date(2024, 2, 29)]), "2024-02-29"),
    "last date": (pa.array([2**31 - 1], pa.date32()), "5881580-07-11"),
    "date before Christ": (pa.array([-800_000], pa.date32()), "-221-09-04"),
    "date64": (pa.array([dt.date(2024, 2, 29)], pa.date64()), "2024-02-29"),
    "time": (pa.array([1500], pa.time32("ms")), "00:00:01.500000"),
    "time in nanoseconds": (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
    "timestamp": (pa.array([1500], pa.timestamp("ms")), "1970-01-01T00:00:01.500000"),
    "nanoseconds": (pa.array([1], pa.timestamp("ns")), "1970-01-01T00:00:00.000000001"),
    "far time": (pa.array([FAR], pa.timestamp("us")), "38504-08-17T21:30:06.846976"),
    "far time in a zone": (
        pa.array([FAR], pa.timestamp("us", "Asia/Tokyo")), "38504-08-17T21:30:06.846976+00:00"
    ),
    "zone": (pa.array([0], pa.timestamp("us", "Asia/Tokyo")), "1970-01-01T09:00:00+09:00"),
    "nanoseconds in a zone": (
        pa.array([1], pa.timestamp("ns", "Asia/Tokyo")), "1970-01-01T09:00:00.000000001+09:00"
    ),
    "unknown zone": (pa.array([0], pa.timestamp("us", "Mars/Base")), "1970-01-01T00:00:00+00:00"),
    "offset": (pa.array([0], pa.timestamp("us", "+05:30")), "1970-01-01T05:30:00+05:30"),
    "duration": (pa.array([1500], pa.duration("ms")), 1.5),
    "long duration": (pa.array([2**62], pa.duration("s")), 2.0**62),
    "list": (pa.array([[1, None]]), [1, None]),
    "large list": (pa.array([[1]], pa.large_list(pa.int8())), [1]),
    "list view": (pa.array([[1]], pa.list_view(pa.int8())), [1]),
    "large list view": (pa.array([[1]], pa.large_list_view(pa.int8())), [1]),
    "fixed list": (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), [1, 2]),
    "nulls in a list": (pa.array([[None]]), [None]),
    "views in a list": (pa.array([["x"]], pa.list_(pa.string_view())), ["x"]),
    "dates in a list": (pa.array([[2**31 - 1]], pa.list_(pa.date32())), ["5881580-07-11"]),
    "struct": (pa.array([{"a": {"b": [b"x"]}}]), {"a": {"b": ["eA=="]}}),
    "empty struct": (pa.array([{}], pa.struct([])), {}),
    "empty structs in a list": (pa.array([[{}]], pa.list_(pa.struct([]))), [{}]),
    "map": (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())), {"k": 1}),
    "map of numbers": (pa.array([[(1, [b"x"])]], pa.map_(pa.int8(), pa.list_(pa.binary()))),
                       {"1": ["eA=="]}),
    "uuid": (pa.array([uuid.UUID(int=1).bytes], pa.uuid()), str(uuid.UUID(int=1))),
    "JSON": (pa.array(['{"k": 1}'], pa.json_()), '{"k": 1}'),
    "tensor": (pa.ExtensionArray.from_storage(TENSOR, pa.array([[1, 2]], pa.list_(pa.int32(), 2))),
               [1, 2]),
    "run ends": (pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["x"])),
                 "x"),
    "interval": (pa.array([(1, 2, 3)], pa.month_day_nano_interval()), ...),
    "union": (pa.UnionArray.from_dense(
        pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])]), ...),
}  # fmt: skip
"""Arrow values, and what they are in JSON; `...` where there is no form for them."""
NOT_IN_PARQUET = {
    "negative scale", "empty struct", "empty structs in a list", "run ends", "interval", "union"
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_json_lines(name):
    array, wanted = VALUES[name]
    schema = pa.schema([("c", array.type)])
    if wanted is ...:
        with pytest.raises(OptionsError, match=r"column 'c': expected a type that \.jsonl files"):
            held_schema(schema, "jsonl")
        return
    # In company with a null, and as a slice of a longer column.
    column = pa.chunked_array([array, pa.nulls(1, array.type), array]).combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    batch = pa.record_batch([column], schema=held_schema(schema, "jsonl"))
    for rows, values in ((batch, [wanted, None, wanted]), (batch.slice(1), [None, wanted])):
        lines = json_lines.format_rows(rows).splitlines()
        assert [json.loads(line) for line in lines] == [{"c": value} for value in values]


@pytest.mark.parametrize("name", VALUES)
def test_parquet(name):
    array, _ = VALUES[name]
    schema = pa.schema([("c", array.type)])
    if name in NOT_IN_PARQUET:
        with pytest.raises(OptionsError, match=r"column 'c': expected a type that \.parquet files"):
            held_schema(schema, "parquet")
        return
    assert held_schema(schema, "parquet") == schema
    file = io.BytesIO()
    pq.write_table(pa.table([array], schema=schema), file)
    back = pq.read_table(file).combine_chunks().to_batches()[0]
    assert json_lines.format_rows(back) == json_lines.format_rows(
        pa.record_batch([array], schema=schema)
    )


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (pa.array([1], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
        (pa.array([1000], pa.timestamp("ns")), "1970-01-01 00:00:00.000001"),
        (pa.array([2**31 - 1], pa.date32()), "5881580-07-11"),
        (pa.array([FAR], pa.timestamp("us")), "38504-08-17 21:30:06.846976"),
        (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
        (pa.array([1], pa.duration("ns")), "1e-09"),
        (pa.array([0], pa.timestamp("us", "Mars/Base")), "1970-01-01 00:00:00+00:00"),
    ],
)
def test_times_that_python_cannot_hold_are_text_in_a_prompt(array, text):
    assert str(python_value(pa.field("c", array.type), array[0])) == text
    assert python_value(pa.field("c", array.type), pa.scalar(None, array.type)) is None


def test_tables_of_every_type_can_be_read_by_others(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(rich_table(range(20)).cast(held_schema(RICH, "parquet")), path)
    columns = ["key", "text", "label", "large", "money", "day", "unsigned"]
    wanted = pq.read_table(path).select(columns).to_pylist()
    assert pl.read_parquet(path, columns=columns).to_dicts() == wanted
    found = duckdb.execute(f"SELECT {', '.join(columns)} FROM '{path}' ORDER BY key").fetchall()
    assert found == [tuple(row.values()) for row in wanted]
