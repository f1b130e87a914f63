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


def schema_of(lines, columns=None):
    """Return the types of all lines, and how many there are."""
    found = json_lines.Columns(columns)
    num_rows = sum(chunk.num_rows for chunk in json_lines.chunks(lines, "x.jsonl", found))
    return found.schema, num_rows


def test_text_that_looks_like_a_time_stays_text():
    lines = lines_of({"day": "2020-01-01", "nested": [{"at": "2020-01-01 00:00:00"}]})
    schema, num_rows = schema_of(lines)
    assert num_rows == 1
    assert schema.field("day").type == pa.string()
    batch = json_lines.parse_lines(lines, schema)
    assert batch.to_pylist() == [{"day": "2020-01-01", "nested": [{"at": "2020-01-01 00:00:00"}]}]


def test_types_hold_for_all_chunks(monkeypatch):
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", 1)
    rows = [{"a": 1}, {"a": 2**63, "b": None}, {"b": "2020-01-01"}, {"b": "x", "c": {"d": [1]}}]
    schema, num_rows = schema_of(lines_of(*rows))
    assert num_rows == 4
    assert schema.field("a").type == pa.uint64()
    assert schema.field("b").type == pa.string()
    batch = json_lines.parse_lines(lines_of(*rows), schema)
    assert batch.column("a").to_pylist() == [1, 2**63, None, None]


@pytest.mark.parametrize(
    "line",
    [
        b'{"a":}\n',
        b"[1]\n",
        b"3\n",
        b'{"a": 1} {"a": 2}\n',
        b'{"a": "\xff"}\n',
        b'{"a": 1, "a": 2}\n',
        b'{"b": [{"c": 1, "c": 2}]}\n',
        b'{"b": 1e400}\n',
        b'{"b": ["\\ud83d"]}\n',
        b'{"b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 1000])
def test_malformed_line_is_named(monkeypatch, line, chunk_bytes):
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", chunk_bytes)
    lines = [b'{"a": 1}\n', b"\n", line]
    with pytest.raises(OptionsError, match=r"x\.jsonl, line 3: expected a JSON object"):
        schema_of(lines)


@pytest.mark.parametrize("chunk_bytes", [1, 1000])
@pytest.mark.parametrize("values", [(1, "x"), ("x", [1]), (True, 1), ({"a": 1}, 2.5)])
def test_values_of_several_kinds_name_the_line(monkeypatch, chunk_bytes, values):
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", chunk_bytes)
    first, second = values
    lines = lines_of({"a": None}, {"a": first}, {"b": 1}, {"a": second})
    with pytest.raises(OptionsError, match=r"x\.jsonl, line 4: column 'a': expected .* got"):
        schema_of(lines)
    assert schema_of(lines, ("b",)) == (pa.schema([("b", pa.int64())]), 4)


def test_a_mark_of_byte_order_is_no_part_of_the_first_line():
    lines = [b'\xef\xbb\xbf{"a": 1}\r\n', b'{"a": 2}\r\n']
    schema, _ = schema_of(lines)
    assert json_lines.parse_lines(lines, schema).to_pylist() == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("line", [b'{"a": 2.5}', b'{"a": "x"}', b'{"b": {"c": 1, "d": 2}}', b"3"])
def test_a_line_that_changed_after_the_types_were_found(line):
    schema, _ = schema_of(lines_of({"a": 1, "b": {"c": 1}}))
    with pytest.raises((ValueError, pa.ArrowException)):
        json_lines.parse_lines([line], schema)


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
        "at": "1970-01-01T00:00:00.000000001+00:00",
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
