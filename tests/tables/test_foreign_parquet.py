"""Tables that others have written: every column comes out with its values and its type."""

import datetime as dt
import decimal
import uuid
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from beam_gemma.errors import OptionsError
from beam_gemma.tables.file_sink import open_sink, stage
from beam_gemma.tables.open_table import open_source

PANDAS = Path(__file__).parents[1] / "data" / "pandas.parquet"
SPARK_FILE = "part-{:05}-0b7c8e52-c000.snappy.parquet"


def read(uri, **options):
    """Return a table as workers read it, part by part, from any of them first."""
    source = open_source(str(uri), **options)
    parts = [part for whole in source.parts() for part in source.split(whole)]
    batches = [located for part in reversed(parts) for located in source.read(part)]
    batches.sort(key=lambda located: located[0])
    ends = [position + batch.num_rows for position, batch in batches]
    assert [0, *ends] == [*(position for position, _ in batches), source.num_rows]
    table = pa.Table.from_batches(
        [batch for _, batch in batches], source.schema.remove_metadata()
    ).replace_schema_metadata(source.schema.metadata)
    head = pa.Table.from_batches(source.head(3), table.schema)
    assert head.to_pylist() == table.slice(0, 3).to_pylist()
    return table


def written(table, folder):
    """Return a table after it has been written by our sink and read again."""
    path, file = stage(open_sink(str(folder / "out.parquet")), 0, table.schema)
    for batch in table.to_batches(max_chunksize=7):
        file.write(batch)
    file.close()
    return pq.read_table(path, partitioning=None)


def assert_kept(table, wanted, folder):
    """Compare a table that was read with what it must be; and again after it was written."""
    assert table.schema == wanted.schema
    assert table.equals(wanted)
    # Row groups may be other ones, each with a dictionary of its own.
    back = written(table, folder)
    assert back.schema == wanted.schema
    assert back.unify_dictionaries().equals(wanted.unify_dictionaries())


def test_pandas(tmp_path):
    table = read(PANDAS)
    wanted = pq.read_table(PANDAS)
    kind = wanted.schema.get_field_index("kind")
    wide = wanted.column("kind").cast(pa.dictionary(pa.int32(), pa.string()))
    assert_kept(table, wanted.set_column(kind, "kind", wide), tmp_path)
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds == {
        "text": "large_string",
        "small": "int16",
        "flag": "bool",
        "kind": "dictionary<values=string, indices=int32, ordered=0>",
        "at": "timestamp[us, tz=Asia/Tokyo]",
        "wait": "duration[us]",
        "money": "decimal128(3, 2)",
        "list": "list<element: int64>",
        "number": "float",
        "id": "int64",
    }
    assert b"pandas" in table.schema.metadata
    assert table.column("small").to_pylist() == [1, None, 3]
    assert table.column("kind").to_pylist() == ["x", "y", "x"]


@pytest.fixture
def duck():
    connection = duckdb.connect()
    connection.execute(
        """
        CREATE TABLE t AS SELECT
            i::BIGINT AS key, 'row ' || i AS text, (i % 3)::UTINYINT AS tiny,
            (i / 7)::DECIMAL(18, 3) AS money, TIMESTAMP '2024-01-01' + INTERVAL (i) HOUR AS at,
            (TIMESTAMPTZ '2024-01-01 00:00:00+00') AS zoned, DATE '2024-01-01' + i::INTEGER AS day,
            TIME '12:34:56.789' AS clock, [i, NULL, i + 1] AS list,
            {'a': i, 'b': ['x', NULL]} AS record, MAP {'k': i} AS pairs,
            (i % 2)::VARCHAR::ENUM ('0', '1') AS choice, uuid() AS id,
            encode('ü' || i) AS raw, i::HUGEINT AS huge, [[i], []] AS nested,
            CASE WHEN i % 5 = 0 THEN NULL ELSE i END::FLOAT AS number, i % 4 AS part,
            '2024-01-0' || (i % 3 + 1) AS dt
        FROM range(300) r(i)
        """
    )
    return connection


def test_duckdb(duck, tmp_path):
    path = tmp_path / "t.parquet"
    duck.execute(f"COPY t TO '{path}' (FORMAT parquet, ROW_GROUP_SIZE 2048, COMPRESSION zstd)")
    table = read(path)
    assert_kept(table, pq.read_table(path), tmp_path)
    assert table.schema.field("money").type == pa.decimal128(18, 3)
    assert table.schema.field("zoned").type == pa.timestamp("us", "UTC")
    assert table.num_rows == 300
    duck.register("back", written(table, tmp_path))
    query = "SELECT key, record, pairs, list, choice, huge FROM {} ORDER BY key"
    assert duck.execute(query.format("back")).fetchall() == (
        duck.execute(query.format("t")).fetchall()
    )


def test_folders_by_duckdb(duck, tmp_path):
    folder = tmp_path / "t"
    duck.execute(f"COPY t TO '{folder}' (FORMAT parquet, PARTITION_BY (part, dt))")
    for uri in (folder, f"{folder}/", f"{folder}/part=*/dt=*/*.parquet"):
        table = read(uri)
        assert table.schema.names[-2:] == ["part", "dt"]
        assert table.schema.field("part").type == pa.int64()
        assert table.schema.field("dt").type == pa.date32()
        wanted = duck.execute("SELECT key, part, dt::DATE FROM t ORDER BY key").fetchall()
        found = table.select(["key", "part", "dt"]).sort_by("key").to_pylist()
        assert [tuple(row.values()) for row in found] == wanted
    assert written(table, tmp_path).equals(table)


@pytest.mark.parametrize("name", ["table", "table.parquet"])
def test_folders_by_spark(tmp_path, name):
    folder = tmp_path / name
    kinds = pa.schema([("id", pa.int64()), ("at", pa.timestamp("us"))])
    for i, day in enumerate(("2024-01-01", "2024-01-02", "__HIVE_DEFAULT_PARTITION__")):
        place = folder / f"dt={day}" / f"city=S%C3%A3o %2F {i}"
        place.mkdir(parents=True)
        rows = [{"id": 10 * i + n, "at": dt.datetime(2024, 1, 1, n)} for n in range(3)]
        file = place / SPARK_FILE.format(i)
        # As Spark does by default.
        pq.write_table(
            pa.Table.from_pylist(rows, kinds), file, use_deprecated_int96_timestamps=True
        )
        (place / f".{file.name}.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()
    (folder / "._SUCCESS.crc").write_bytes(b"crc")
    (folder / "_temporary" / "0").mkdir(parents=True)
    (folder / "_temporary" / "0" / "half.parquet").write_bytes(b"PAR1")
    table = read(folder)
    assert table.schema == pa.schema([*kinds, ("dt", pa.date32()), ("city", pa.string())])
    days = [dt.date(2024, 1, 1), dt.date(2024, 1, 2), None]
    assert table.column("id").to_pylist() == [10 * i + n for i in range(3) for n in range(3)]
    assert table.column("dt").to_pylist() == [day for day in days for _ in range(3)]
    assert table.column("city").to_pylist() == [f"São / {i}" for i in range(3) for _ in range(3)]


def test_some_columns_of_folders(tmp_path):
    ds.write_dataset(
        pa.table({"a": range(9), "b": range(9), "k": [i // 3 for i in range(9)]}),
        tmp_path / "t",
        format="parquet",
        partitioning=ds.partitioning(pa.schema([("k", pa.int64())]), flavor="hive"),
    )
    thirds = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert read(tmp_path / "t", columns=("k", "b")).to_pydict() == {"k": thirds, "b": [*range(9)]}
    assert read(tmp_path / "t", columns=("a",)).to_pydict() == {"a": [*range(9)]}
    assert read(tmp_path / "t", columns=("k",)).to_pydict() == {"k": thirds}
    assert read(tmp_path / "t", columns=("k",), limit=4).to_pydict() == {"k": thirds[:4]}


def test_a_column_twice(tmp_path):
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    pq.write_table(twice, tmp_path / "x.parquet")
    with pytest.raises(OptionsError, match="'a' once, got it twice"):
        open_source(str(tmp_path / "x.parquet"))


def test_a_folder_without_a_table(tmp_path):
    (tmp_path / "t.parquet").mkdir()
    (tmp_path / "t.parquet" / "_SUCCESS").touch()
    for uri in ("t.parquet", "t.parquet/"):
        with pytest.raises(OptionsError):
            open_source(f"{tmp_path}/{uri}")


def test_polars(tmp_path):
    frame = pl.DataFrame(
        {
            "text": ["a", None, "x" * 100],
            "kind": pl.Series(["x", "y", None], dtype=pl.Categorical),
            "list": [[1.5], [], None],
            "record": [{"a": 1, "b": "x"}, {"a": None, "b": None}, {"a": 3, "b": "z"}],
            "at": pl.Series([dt.datetime(2024, 1, 1)] * 3).dt.replace_time_zone("Europe/Berlin"),
            "raw": [b"\0\xff", b"", None],
            "wait": [dt.timedelta(hours=1), None, dt.timedelta(0)],
        }
    )
    frame.write_parquet(tmp_path / "t.parquet", row_group_size=2)
    table = read(tmp_path / "t.parquet")
    assert_kept(table, pq.read_table(tmp_path / "t.parquet"), tmp_path)
    assert table.schema.field("at").type.tz == "Europe/Berlin"
    assert pl.from_arrow(written(table, tmp_path)).equals(pl.from_arrow(table))


ODD = {
    "large string": pa.array(["a", None], pa.large_string()),
    "string view": pa.array(["a", "x" * 50], pa.string_view()),
    "binary view": pa.array([b"a", None], pa.binary_view()),
    "fixed binary": pa.array([uuid.UUID(int=1).bytes, None], pa.binary(16)),
    "dictionary": pa.DictionaryArray.from_arrays([1, None], pa.array(["a", "b"])),
    "dictionary of large": pa.DictionaryArray.from_arrays(
        pa.array([1, 0], pa.int32()), pa.array(["a", "b"], pa.large_string())
    ),
    "half": pa.array([np.float16(1.5), None], pa.float16()),
    "wide decimal": pa.array([decimal.Decimal(10**50), None], pa.decimal256(60, 2)),
    "nanoseconds": pa.array([1000, None], pa.timestamp("ns", "America/New_York")),
    "seconds": pa.array([1, None], pa.timestamp("s")),
    "time": pa.array([dt.time(1, 2, 3), None], pa.time32("ms")),
    "duration": pa.array([1, None], pa.duration("ms")),
    "date64": pa.array([dt.date(2024, 1, 1), None], pa.date64()),
    "large list": pa.array([[1], None], pa.large_list(pa.int8())),
    "nulls in lists": pa.array([[None, [None]], [[], None]], pa.list_(pa.list_(pa.int64()))),
    "fixed list": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
    "struct": pa.array([{"a": {"b": [1]}}, None]),
    "map": pa.array([[("k", [1])], None], pa.map_(pa.string(), pa.list_(pa.int32()))),
    "null": pa.nulls(2),
    "dotted.name": pa.array([1, 2]),
    "unsigned": pa.array([2**64 - 1, None], pa.uint64()),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_types(name, tmp_path):
    table = pa.table({name: ODD[name], "dotted": pa.array([{"name": 1}, None])})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1)
    # Parquet has no seconds, and PyArrow reads 64-bit dates as 32-bit ones.
    wanted = pq.read_table(tmp_path / "t.parquet")
    assert_kept(read(tmp_path / "t.parquet"), wanted, tmp_path)
    assert wanted.column(name).to_pylist() == table.column(name).to_pylist()


def test_a_column_may_be_null_where_it_may_in_any_file(tmp_path):
    kinds = [pa.int64(), pa.list_(pa.int64()), pa.struct([("x", pa.int64())])]
    nullable = pa.schema([(str(i), kind) for i, kind in enumerate(kinds)])
    strict = pa.schema(
        [
            pa.field("0", pa.int64(), nullable=False),
            pa.field("1", pa.list_(pa.field("element", pa.int64(), nullable=False))),
            pa.field("2", pa.struct([pa.field("x", pa.int64(), nullable=False)]), nullable=False),
        ]
    )
    full = [{"0": 1, "1": [2], "2": {"x": 3}}]
    empty = [{"0": None, "1": [None], "2": {"x": None}}]
    for name, rows, schema in (("a", full, strict), ("b", empty, nullable), ("c", full, strict)):
        pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / f"{name}.parquet")
    table = read(tmp_path)
    assert table.to_pylist() == full + empty + full
    assert_kept(table, pa.Table.from_pylist(full + empty + full, nullable), tmp_path)


def test_a_column_of_nulls_has_the_type_of_other_files(tmp_path):
    for i, values in enumerate(([None, None], ["x", None], [None, None])):
        kind = pa.string() if i == 1 else pa.null()
        pq.write_table(pa.table({"a": pa.array(values, kind)}), tmp_path / f"{i}.parquet")
    table = read(tmp_path)
    assert table.schema.field("a").type == pa.string()
    assert table.column("a").to_pylist() == [None, None, "x", None, None, None]


def test_many_row_groups_and_files(tmp_path):
    for i in range(5):
        keys = pa.array(range(100 * i, 100 * i + 100))
        pq.write_table(
            pa.table({"key": keys, "kind": keys.cast(pa.string()).dictionary_encode()}),
            tmp_path / f"{i}.parquet",
            row_group_size=3,
        )
    table = read(tmp_path)
    assert table.column("key").to_pylist() == [*range(500)]
    assert table.column("kind").cast(pa.string()).to_pylist() == [*map(str, range(500))]


def test_dictionaries_inside_of_other_types_of_several_row_groups(tmp_path):
    codes = pa.dictionary(pa.int32(), pa.string())
    values = {
        pa.list_(codes): [["a"], None, ["b", None]],
        pa.struct([("x", codes)]): [{"x": "a"}, None, {"x": "b"}],
        pa.map_(pa.string(), pa.list_(codes)): [[("k", ["a"])], None, [("k", [None, "b"])]],
    }
    wanted = pa.table({str(i): pa.array(values[kind], kind) for i, kind in enumerate(values)})
    pq.write_table(wanted, tmp_path / "in.parquet", row_group_size=1)
    table = read(tmp_path / "in.parquet")
    assert table.schema == wanted.schema
    assert table.to_pylist() == wanted.to_pylist()
