"""JSON lines: types are found over all lines, values come back as they went in."""

import datetime as dt
import decimal
import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.errors import OptionsError
from beam_gemma.tables import json_lines


def lines_of(*rows):
    return [json.dumps(row).encode() + b"\n" for row in rows]


def schema_of(lines):
    """Return the types of all lines, and how many there are."""
    schema, num_rows = pa.schema([]), 0
    for chunk in json_lines.chunks(lines, "x.jsonl"):
        schema = json_lines.unify_schemas(schema, chunk.schema, "x.jsonl")
        num_rows += chunk.num_rows
    return schema, num_rows


def test_text_that_looks_like_a_time_stays_text():
    lines = lines_of({"day": "2020-01-01", "nested": [{"at": "2020-01-01 00:00:00"}]})
    (chunk,) = json_lines.chunks(lines, "x.jsonl")
    schema = chunk.schema
    assert chunk.num_rows == 1
    assert schema.field("day").type == pa.string()
    batch = json_lines.parse_lines(lines, schema)
    assert batch.to_pylist() == [{"day": "2020-01-01", "nested": [{"at": "2020-01-01 00:00:00"}]}]


def test_types_hold_for_all_chunks(monkeypatch):
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", 1)
    rows = [{"a": 1}, {"a": 2.5, "b": None}, {"b": "2020-01-01"}, {"b": "x", "c": {"d": [1]}}]
    schema, num_rows = schema_of(lines_of(*rows))
    assert num_rows == 4
    assert schema.field("a").type == pa.float64()
    assert schema.field("b").type == pa.string()
    assert json_lines.parse_lines(lines_of(*rows), schema).column("a").to_pylist() == [
        1,
        2.5,
        None,
        None,
    ]


@pytest.mark.parametrize(
    "line", [b'{"a":}\n', b"[1]\n", b"3\n", b'{"a": 1} {"a": 2}\n', b'{"a": "\xff"}\n']
)
def test_malformed_line_is_named(line):
    lines = [b'{"a": 1}\n', b"\n", line]
    with pytest.raises(OptionsError, match=r"x\.jsonl, line 3: expected a JSON object"):
        list(json_lines.chunks(lines, "x.jsonl"))


@pytest.mark.parametrize("chunk_bytes", [1, 1000])
def test_mixed_types_name_the_file(monkeypatch, chunk_bytes):
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", chunk_bytes)
    with pytest.raises(OptionsError, match=r"x\.jsonl: expected"):
        schema_of(lines_of({"a": 1}, {"a": "x"}))


def test_line_longer_than_a_block_of_the_reader():
    lines = lines_of({"a": "x" * (3 << 20)}, {"a": "y"})
    schema, _ = schema_of(lines)
    assert json_lines.parse_lines(lines, schema).num_rows == 2


def test_values_that_json_does_not_have():
    batch = pa.RecordBatch.from_pylist(
        [
            {
                "nan": float("nan"),
                "inf": [float("inf"), 1.0],
                "money": decimal.Decimal("1.50"),
                "day": dt.date(2020, 1, 2),
                "at": 1,
                "raw": b"\x00\xff",
                "text": "ü",
                "map": [("k", 1)],
            }
        ],
        schema=pa.schema(
            [
                ("nan", pa.float64()),
                ("inf", pa.list_(pa.float32())),
                ("money", pa.decimal128(10, 2)),
                ("day", pa.date32()),
                ("at", pa.timestamp("ns", "UTC")),
                ("raw", pa.binary()),
                ("text", pa.large_string()),
                ("map", pa.map_(pa.string(), pa.int8())),
            ]
        ),
    )
    line = json_lines.format_rows(batch)
    assert "ü".encode() in line
    assert json.loads(line) == {
        "nan": None,
        "inf": [None, 1.0],
        "money": "1.50",
        "day": "2020-01-02",
        "at": "1970-01-01T00:00:00+00:00",
        "raw": "AP8=",
        "text": "ü",
        "map": {"k": 1},
    }


text = st.text(st.characters(exclude_categories=["Cs"]))
records = st.fixed_dictionaries(
    {
        "text": text,
        "count": st.integers(-(2**63), 2**63 - 1),
        "share": st.floats(allow_nan=False, allow_infinity=False, width=32),
        "tags": st.lists(text, min_size=1),
        "deep": st.fixed_dictionaries({"flag": st.booleans()}),
    }
)


@given(st.lists(records, min_size=1, max_size=5))
def test_round_trip(rows):
    lines = lines_of(*rows)
    schema, num_rows = schema_of(lines)
    assert num_rows == len(rows)
    written = json_lines.format_rows(json_lines.parse_lines(lines, schema))
    assert [json.loads(line) for line in written.splitlines()] == rows
