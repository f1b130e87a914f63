"""Partitions: what names of folders say of their rows, with its type."""

import datetime as dt

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.errors import OptionsError
from beam_gemma.tables.hive_partitions import NULL, is_data, partitions_of


def column(*texts):
    """Return the type and the values of a column that folders hold."""
    paths = [f"gs://b/t/c={text}/part-{i}.parquet" for i, text in enumerate(texts)]
    schema, values = partitions_of("gs://b/t", paths)
    assert schema.names == ["c"]
    return schema.field("c").type, [values[path][0] for path in paths]


@pytest.mark.parametrize(
    ("texts", "kind", "values"),
    [
        (["1", "-20", NULL], pa.int64(), [1, -20, None]),
        (["1", "02"], pa.string(), ["1", "02"]),
        (["1", "1.5"], pa.string(), ["1", "1.5"]),
        (["9" * 19], pa.string(), ["9" * 19]),
        (["2024-02-29", NULL], pa.date32(), [dt.date(2024, 2, 29), None]),
        (["2023-02-29"], pa.string(), ["2023-02-29"]),
        (["a b%2Fc%3D"], pa.string(), ["a b/c="]),
        ([NULL, NULL], pa.string(), [None, None]),
        ([""], pa.string(), [""]),
    ],
)
def test_types_and_values(texts, kind, values):
    assert column(*texts) == (kind, values)


@given(st.lists(st.integers() | st.dates(dt.date(1000, 1, 1)), min_size=1, max_size=4))
def test_a_value_comes_back_as_it_was_written(values):
    assert list(map(str, column(*map(str, values))[1])) == list(map(str, values))


def test_several_columns_in_their_order():
    path = "/t/year=2024/lang=de/x.parquet"
    schema, values = partitions_of("/t", [path])
    assert schema == pa.schema([("year", pa.int64()), ("lang", pa.string())])
    assert values == {path: (2024, "de")}


def test_only_folders_below_the_root_speak():
    schema, values = partitions_of("/a=1/t", ["/a=1/t/b=2.parquet", "/a=1/t/c.parquet"])
    assert not schema.names
    assert set(values.values()) == {()}


@pytest.mark.parametrize("other", ["/t/x.parquet", "/t/b=1/x.parquet", "/t/a=1/b=1/x.parquet"])
def test_files_of_one_table_say_the_same_things(other):
    with pytest.raises(OptionsError, match="expected folders of a, as of the files before it"):
        partitions_of("/t", ["/t/a=1/x.parquet", other])


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/t/x.parquet", True),
        ("/t/a=1/b=2/x.parquet", True),
        ("/t/_x.parquet", False),
        ("/t/.x.parquet", False),
        ("/t/_temporary/x.parquet", False),
        ("/t/_a=1/x.parquet", False),
        ("/t/out.parquet.work/staged/x.parquet", False),
    ],
)
def test_what_is_of_a_table(path, wanted):
    assert is_data(path, "/t") == wanted
