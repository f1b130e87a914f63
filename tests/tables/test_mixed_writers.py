"""Folders of files by several writers: one table, where nothing is lost by making it one."""

import datetime as dt
import decimal
import itertools
import json
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.batches import joined
from beam_gemma.errors import OptionsError
from beam_gemma.tables.open_table import open_source
from beam_gemma.tables.parquet_schema import unified
from tests.tables.test_foreign_parquet import read, written

SPARK = Path(__file__).parents[1] / "data" / "spark.parquet"
SPARK_KEY = b"org.apache.spark.sql.parquet.row.metadata"


LISTS = (pa.list_(pa.int32()), pa.large_list(pa.int64()))
UNIFIED = [
    (pa.string(), pa.large_string(), pa.large_string()),
    (pa.string(), pa.string_view(), pa.string()),
    (pa.binary(), pa.binary(2), pa.binary()),
    (pa.binary_view(), pa.large_binary(), pa.large_binary()),
    (pa.int32(), pa.int64(), pa.int64()),
    (pa.uint32(), pa.int16(), pa.int64()),
    (pa.uint8(), pa.uint64(), pa.uint64()),
    (pa.float32(), pa.float64(), pa.float64()),
    (pa.int32(), pa.float64(), pa.float64()),
    (pa.timestamp("us"), pa.timestamp("ns"), pa.timestamp("ns")),
    (pa.timestamp("ms", "UTC"), pa.timestamp("us", "UTC"), pa.timestamp("us", "UTC")),
    (pa.time32("ms"), pa.time64("us"), pa.time64("us")),
    (pa.decimal128(10, 2), pa.decimal128(20, 1), pa.decimal128(21, 2)),
    (pa.dictionary(pa.int8(), pa.string()), pa.string(), pa.string()),
    (*LISTS, pa.large_list(pa.int64())),
    (pa.list_(pa.int8(), 2), pa.list_(pa.int16()), pa.list_(pa.int16())),
    (pa.struct({"a": pa.int8()}), pa.struct({"a": pa.int16()}), pa.struct({"a": pa.int16()})),
    (
        pa.map_(pa.string(), pa.int8()),
        pa.map_(pa.large_string(), pa.int8()),
        pa.map_(pa.large_string(), pa.int8()),
    ),
    (pa.null(), pa.list_(pa.int8()), pa.list_(pa.int8())),
]
APART = [
    (pa.int64(), pa.string()),
    (pa.int64(), pa.uint64()),
    (pa.int64(), pa.float64()),
    (pa.date32(), pa.timestamp("us")),
    (pa.timestamp("us"), pa.timestamp("us", "UTC")),
    (pa.decimal128(38, 0), pa.decimal256(76, 70)),
    (pa.struct({"a": pa.int8()}), pa.struct({"b": pa.int8()})),
    (pa.list_(pa.int8()), pa.int8()),
]
VALUES = {
    "string": "x",
    "binary": b"xy",
    "int": 1,
    "float": 1.0,
    "double": 1.0,
    "timestamp": dt.datetime(2024, 1, 1),
    "time": dt.time(1, 2, 3),
    "decimal": decimal.Decimal(1),
    "list": [1, 2],
    "struct": {"a": 1},
    "map": [("k", 1)],
}


def value_of(kind):
    """Return a value of a type, the same for all types that unify."""
    if pa.types.is_null(kind):
        return None
    if pa.types.is_timestamp(kind) and kind.tz:
        return VALUES["timestamp"].replace(tzinfo=dt.UTC)
    name = str(kind).replace("dictionary<values=", "").replace("large_", "")
    name = name.replace("fixed_size_", "").removeprefix("u")
    return next(value for start, value in VALUES.items() if name.startswith(start))


@pytest.mark.parametrize(("one", "other", "wanted"), UNIFIED)
def test_types_that_unify(one, other, wanted, tmp_path):
    values = [value_of(one), value_of(other)]
    for (first, a), (second, b) in itertools.permutations(zip((one, other), values, strict=True)):
        pq.write_table(pa.table({"c": pa.array([a], first)}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"c": pa.array([b], second)}), tmp_path / "b.parquet")
        table = read(tmp_path)
        assert table.schema.field("c").type == wanted
        assert table.column("c").to_pylist() == [a, b]
        assert written(table, tmp_path / f"_{first}").equals(table)


@pytest.mark.parametrize(("one", "other"), APART)
def test_types_that_do_not_unify_and_columns_that_are_not_read(one, other, tmp_path):
    assert unified(one, other) is None
    assert unified(other, one) is None
    for name, kind in (("a", one), ("b", other)):
        table = pa.table({"c": pa.array([None], kind), "k": [name]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(OptionsError, match=r"b\.parquet: .*type of 'c'.*--columns"):
        open_source(str(tmp_path))
    assert read(tmp_path, columns=("k",)).to_pydict() == {"k": ["a", "b"]}


def test_columns_in_another_order(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": ["x"], "c": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"b": ["y"], "a": [2], "d": [1]}), tmp_path / "b.parquet")
    with pytest.raises(OptionsError, match=r"another set of columns: c, d; .*--columns"):
        open_source(str(tmp_path))
    table = read(tmp_path, columns=("b", "a"))
    assert table.to_pylist() == [{"b": "x", "a": 1}, {"b": "y", "a": 2}]


def test_files_of_pandas_polars_and_duckdb(tmp_path):
    rows = {"id": [1], "text": ["a"], "at": [dt.datetime(2024, 1, 1)]}
    pl.DataFrame(rows).write_parquet(tmp_path / "polars.parquet")
    schema = pa.schema({"id": pa.int64(), "text": pa.string(), "at": pa.timestamp("ns")})
    pq.write_table(pa.table(rows, schema=schema), tmp_path / "pandas.parquet")
    query = "SELECT 'a' AS text, 1::INTEGER AS id, TIMESTAMP '2024-01-01' AS at"
    duckdb.execute(f"COPY ({query}) TO '{tmp_path}/duckdb.parquet' (FORMAT parquet)")
    table = read(tmp_path)
    assert table.to_pydict() == {name: 3 * values for name, values in rows.items()}


def test_dictionaries_of_many_files_have_room_for_all_their_values(tmp_path):
    for i in range(3):
        texts = [f"value {100 * i + n}" for n in range(100)]
        column = pa.DictionaryArray.from_arrays(pa.array(range(100), pa.int8()), texts)
        nested = pa.StructArray.from_arrays([column], ["x"])
        pq.write_table(pa.table({"c": column, "n": nested}), tmp_path / f"{i}.parquet")
    table = read(tmp_path)
    wanted = [f"value {n}" for n in range(300)]
    assert joined(table.to_batches()).column("c").to_pylist() == wanted
    back = written(table, tmp_path / "out")
    assert back.column("c").to_pylist() == wanted
    assert [row["x"] for row in back.column("n").to_pylist()] == wanted
    (path,) = (tmp_path / "out").rglob("*.parquet")
    assert pl.read_parquet(path)["c"].cast(pl.String).to_list() == wanted
    assert duckdb.execute(f"SELECT c FROM '{path}'").fetchall() == [(text,) for text in wanted]


def test_what_spark_says_of_its_columns_is_not_said_of_others(tmp_path):
    assert SPARK_KEY in pq.read_metadata(SPARK).metadata
    table = read(SPARK)
    assert not table.schema.metadata
    assert written(table, tmp_path).equals(table)


def test_years_of_spark(tmp_path):
    """In timestamps of 96 bits, which Spark writes by default."""
    column = pq.ParquetFile(SPARK).schema.column(2)
    assert (column.name, column.physical_type) == ("at", "INT96")
    table = read(SPARK)
    assert table.column("at").to_pylist() == [
        dt.datetime(1, 1, 1),
        dt.datetime(1969, 12, 31, 23, 59, 59, 999999),
        dt.datetime(2024, 2, 29, 12, 34, 56, 789012),
        dt.datetime(9999, 12, 31, 23, 59, 59, 999999),
        None,
    ]
    back = written(table, tmp_path)
    assert back.column("at").equals(table.column("at"))
    (path,) = tmp_path.rglob("*.parquet")
    assert pl.read_parquet(path)["at"].to_list() == table.column("at").to_pylist()


KEYS = ["org.apache.spark.version", "parquet.avro.schema", "writer.model.name", "iceberg.schema",
        "org.apache.hudi.bloomfilter"]  # fmt: skip


def test_what_engines_say_is_dropped_and_the_rest_is_kept(tmp_path):
    told = {"columns": [{"field_name": "a"}, {"field_name": "b"}], "index_columns": ["b"]}
    metadata = {**dict.fromkeys(KEYS, "x"), "mine": "kept", "pandas": json.dumps(told)}
    table = pa.table({"a": [1], "b": [2]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "t.parquet")
    whole = open_source(str(tmp_path)).schema.metadata
    assert set(whole) == {b"mine", b"pandas"}
    assert json.loads(whole[b"pandas"]) == told
    some = open_source(str(tmp_path), columns=("a",)).schema.metadata
    wanted = {"columns": [{"field_name": "a"}], "index_columns": []}
    assert json.loads(some[b"pandas"]) == wanted


ARRAYS = {
    "null": [[1, 2], None, [3, 4]],
    "null inside": [[1, None], [3, 4]],
    "none": [[1, 2], [3, 4]],
    "only nulls": [None, None],
    "empty": [],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_polars(name, tmp_path):
    frame = pl.DataFrame(
        {
            "a": pl.Series(ARRAYS[name], dtype=pl.Array(pl.Int64, 2)),
            "wait": pl.Series([1] * len(ARRAYS[name]), dtype=pl.Duration("us")),
            "kind": pl.Series(["x"] * len(ARRAYS[name]), dtype=pl.Categorical),
        }
    )
    frame.write_parquet(tmp_path / "t.parquet")
    table = read(tmp_path / "t.parquet")
    assert table.column("a").to_pylist() == ARRAYS[name]
    has_nulls = name not in ("none", "empty")
    assert pa.types.is_list(table.schema.field("a").type) == has_nulls
    assert table.schema.field("wait").type == pa.duration("us")
    assert written(table, tmp_path).column("a").to_pylist() == ARRAYS[name]
    assert pl.from_arrow(table).select("wait", "kind").equals(frame.select("wait", "kind"))


@given(st.lists(st.none() | st.lists(st.none() | st.integers(0, 9), min_size=2, max_size=2)))
def test_arrays_of_several_files(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("arrays")
    kind = pa.list_(pa.int64(), 2)
    for name, rows in (("a", [[1, 2]]), ("b", values)):
        table = pa.table(
            {
                "a": pa.array(rows, kind),
                "s": pa.array([{"x": r} for r in rows], pa.struct({"x": kind})),
            }
        )
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=2)
    table = read(folder)
    assert table.column("a").to_pylist() == [[1, 2], *values]
    assert table.column("s").to_pylist() == [{"x": row} for row in [[1, 2], *values]]


def test_integers_of_128_bits(tmp_path):
    frame = pl.DataFrame({"a": pl.Series([2**100], dtype=pl.Int128), "b": [1], "c": ["x"]})
    frame.write_parquet(tmp_path / "t.parquet")
    with pytest.raises(OptionsError, match=r"t\.parquet: .*64 bits .*name those.*--columns"):
        open_source(str(tmp_path))
    with pytest.raises(OptionsError, match=r"column 'a': .*64 bits .*leave it out of --columns"):
        open_source(str(tmp_path), columns=("a", "b"))
    assert read(tmp_path, columns=("c", "b")).to_pylist() == [{"c": "x", "b": 1}]


def test_a_column_in_files_and_folders(tmp_path):
    """Polars and DuckDB can write it twice; the files know its type."""
    frame = pl.DataFrame({"id": [1, 2], "price": [1.5, 2.5], "day": ["x", "y"]})
    frame.write_parquet(pl.PartitionBy(tmp_path, key=["price", "day"], include_key=True))
    table = read(tmp_path)
    assert table.schema == pa.schema(
        {"id": pa.int64(), "price": pa.float64(), "day": pa.large_string()}
    )
    assert table.sort_by("id").to_pydict() == frame.to_dict(as_series=False)
    assert read(tmp_path, columns=("day",)).column_names == ["day"]
