"""Where tables are: names with signs, hidden files, and folders that are tables of other kinds."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.errors import OptionsError
from beam_gemma.tables import parquet_source
from beam_gemma.tables.open_table import literal_pattern, open_source
from tests.doubles.tables import keys_of


def write(path, *keys):
    """Write a table with these keys, in the format that the name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"key": key}) + "\n" for key in keys))
    else:
        pq.write_table(pa.table({"key": pa.array(keys, pa.int64())}), path)


def keys(uri, **options):
    return keys_of(open_source(str(uri), **options).head(100))


@pytest.mark.parametrize("end", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "a]", "[ab]", "a[", "{a}", "~a", "a b%20"])
def test_names_with_signs_of_patterns(tmp_path, name, end):
    write(tmp_path / name / f"{name}.{end}", 1)
    write(tmp_path / "b" / f"a.{end}", 2)
    write(tmp_path / f"a1.{end}", 3)
    write(tmp_path / "a1" / f"a1.{end}", 4)
    assert keys(tmp_path / name / f"{name}.{end}") == [1]
    assert keys(tmp_path / name) == [1]
    assert keys(f"{tmp_path}/{name}/") == [1]


def test_signs_still_make_patterns_of_names_that_are_not_there(tmp_path):
    for i in range(3):
        write(tmp_path / f"a{i}.parquet", i)
    assert keys(tmp_path / "a[01].parquet") == [0, 1]
    assert keys(tmp_path / "a?.parquet") == [0, 1, 2]
    assert literal_pattern("a[1]*?") == r"a[\[]1][*][?]"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "t" / "x.parquet", 1)
    for uri in ("~/t/x.parquet", "~/t", "~/t/*.parquet"):
        assert keys(uri) == [1]
        assert open_source(uri).files == (f"{tmp_path}/t/x.parquet",)


@pytest.mark.parametrize("end", ["parquet", "jsonl"])
def test_patterns_pass_over_hidden_files(tmp_path, end):
    write(tmp_path / f"x.{end}", 1)
    for name in ("_y", ".y", "_work/z", "a/_b/z"):
        write(tmp_path / f"{name}.{end}", 2)
    assert keys(tmp_path / f"*.{end}") == [1]
    assert keys(tmp_path / f"**.{end}") == [1]
    assert keys(tmp_path / f"_*.{end}") == [2]
    assert keys(tmp_path / f"_y.{end}") == [2]


def test_a_folder_of_json_lines(tmp_path):
    write(tmp_path / "a.jsonl", 1)
    write(tmp_path / "b.jsonl", 2)
    (tmp_path / "_a.run.json").write_text("{}")
    assert keys(tmp_path) == [1, 2]
    write(tmp_path / "c.parquet", 3)
    assert keys(tmp_path) == [3]
    write(tmp_path / "p" / "day=1" / "a.jsonl", 1)
    with pytest.raises(OptionsError, match=r"a\.jsonl: expected JSON lines without folders"):
        open_source(f"{tmp_path}/p")


LOGS = {
    "Delta table": "_delta_log/00000000000000000000.json",
    "Hudi table": ".hoodie/hoodie.properties",
    "Iceberg table": "metadata/v1.metadata.json",
}


@pytest.mark.parametrize("kind", LOGS)
def test_folders_of_tables_that_keep_earlier_versions(tmp_path, kind):
    log = tmp_path / "t" / LOGS[kind]
    log.parent.mkdir(parents=True)
    log.write_text("{}")
    write(tmp_path / "t" / "part-0.parquet", 1)
    write(tmp_path / "t" / "day=1" / "lang=de" / "part-0.parquet", 2)
    write(tmp_path / "t" / "data" / "day=1" / "part-0.parquet", 3)
    uris = ["t", "t/", "t/*.parquet", "t/day=1", "t/day=1/lang=de/*.parquet", "t/day=*/*/*.parquet"]
    if kind == "Iceberg table":
        uris += ["t/data", "t/data/day=1", "t/data/*/*.parquet"]
    for uri in uris:
        with pytest.raises(OptionsError, match=f"got a {kind}, which keeps files of earlier"):
            open_source(f"{tmp_path}/{uri}")
    assert keys(tmp_path / "t" / "part-0.parquet") == [1]


def test_other_folders_named_metadata(tmp_path):
    write(tmp_path / "data" / "x.parquet", 1)
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "notes.json").write_text("{}")
    assert keys(tmp_path / "data") == [1]


def row_groups(path, sizes):
    """Write a file with row groups of some sizes and return its parts."""
    schema = pa.schema({"key": pa.int64()})
    with pq.ParquetWriter(path, schema) as writer:
        for i, size in enumerate(sizes):
            writer.write_table(pa.table({"key": [1000 * i + n for n in range(size)]}, schema))
    source = open_source(str(path))
    (whole,) = source.parts()
    parts = list(source.split(whole))
    rows = [n for part in parts for _, batch in source.read(part) for n in keys_of([batch])]
    assert rows == [1000 * i + n for i, size in enumerate(sizes) for n in range(size)]
    return [part.row_groups for part in parts]


def test_small_row_groups_are_read_together(tmp_path, monkeypatch):
    path: Path = tmp_path / "t.parquet"
    monkeypatch.setattr("beam_gemma.tables.source.BATCH_ROWS", 10)
    assert row_groups(path, [3, 3, 3, 3, 3]) == [range(4), range(4, 5)]
    assert row_groups(path, [12, 1, 12]) == [range(1), range(1, 3)]
    assert row_groups(path, [0, 0, 5, 0]) == [range(3)]
    monkeypatch.setattr(parquet_source, "MAX_PARTS", 3)
    assert row_groups(path, [12] * 10) == [range(4), range(4, 8), range(8, 10)]
    monkeypatch.setattr("beam_gemma.tables.source.BATCH_ROWS", 10**6)
    monkeypatch.setattr("beam_gemma.tables.source.BATCH_BYTES", 1)
    assert row_groups(path, [1] * 4) == [range(2), range(2, 4)]
