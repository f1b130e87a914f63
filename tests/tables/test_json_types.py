"""JSON lines: a row is read, rendered and written as it says itself, whatever is beside it."""

import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.batches import is_json_text
from beam_gemma.errors import OptionsError
from beam_gemma.inference.rows import rows_of
from beam_gemma.inputs.template import column_text
from beam_gemma.tables import json_lines
from beam_gemma.tables.json_types import MAX_KEYS, typed_form
from beam_gemma.tasks.columns import check_columns
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.text_encoder import EmbedSettings


def read(*rows):
    """Return rows as workers read them, from their lines."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    columns = json_lines.Columns()
    list(json_lines.chunks([line + b"\n" for line in lines], "x.jsonl", columns))
    return json_lines.parse_lines(lines, columns.schema)


def rendered(batch, column="a"):
    """Return what a prompt holds of each row."""
    return [column_text(row, column) for row in rows_of(batch)]


INT = pa.int64()
OWN = {
    "a key that others lack": ({"k": 1}, {"k": 1, "z": None}),
    "a whole number beside a fraction": (5, 2.5, 5.0),
    "numbers in objects": ({"k": 5}, {"k": 2.5}),
    "numbers in lists": ([1, 2.5], [1.0]),
    "the order of keys": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "no keys": ({}, {"k": 1}),
    "no keys at all": ({}, {}),
    "lists beside objects": ([], {"k": [1]}),
    "kinds inside": ({"k": 1}, {"k": "x"}),
    "beyond 63 bits": (2**63, 1),
    "beyond 64 bits": (2**64, -1),
    "beyond 63 bits and negative": (2**63, -1),
    "beyond a double": (2**53 + 1, 0.5),
    "large in objects": ({"k": 2**63}, {"k": -1}),
    "messages": ([{"role": "user", "content": "x"}], [{"role": "user", "content": "y", "name": 1}]),
    "not ASCII": ({"ü": "ü"}, {"é": "\N{GRINNING FACE}"}),
}


@pytest.mark.parametrize("name", OWN)
def test_a_row_is_the_same_alone_and_in_company(name):
    values = OWN[name]
    together = read(*({"a": value} for value in values))
    alone = [read({"a": value}) for value in values]
    assert rendered(together) == [rendered(each)[0] for each in alone]
    assert json_lines.format_rows(together) == b"".join(map(json_lines.format_rows, alone))
    written = json_lines.format_rows(together).decode().splitlines()
    assert written == [json.dumps({"a": value}, ensure_ascii=False) for value in values]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=6,
)
NESTED = st.lists(JSON, max_size=3) | st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)


@settings(max_examples=100)
@given(
    st.lists(NESTED | st.none(), min_size=1, max_size=4)
    | st.lists(st.integers(-(2**70), 2**70) | st.floats(-1e9, 1e9), min_size=1, max_size=4)
)
def test_any_values_come_back_as_they_were_written(values):
    batch = read(*({"a": value} for value in values))
    lines = [json.dumps({"a": value}, ensure_ascii=False) for value in values]
    assert json_lines.format_rows(batch).decode().splitlines() == lines
    for row, value in zip(rows_of(batch), values, strict=True):
        assert json.dumps(row["a"]) == json.dumps(value)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([5, 2.5], pa.float64()),
        ([2**53, 0.5], pa.float64()),
        ([2**53 + 1, 0.5], None),
        ([[1, 2.5]], pa.list_(pa.float64())),
        ([{"a": 1, "b": None}, {"b": "x", "a": 2}], pa.struct({"a": pa.int64(), "b": pa.string()})),
        ([{"k": 1}, {}], None),
        ([{}], None),
        ([-1, 2**63], None),
    ],
)
def test_parquet_has_the_type_that_holds_all_values(values, kind):
    batch = read(*({"a": value} for value in values))
    (field,) = batch.schema
    assert is_json_text(field)
    held = typed_form(field)
    assert held.type == (kind or pa.string())
    assert not is_json_text(held)
    typed = json_lines.with_typed_columns(batch, pa.schema([held]))
    found = typed.column(0).to_pylist()
    assert (found if kind else list(map(json.loads, found))) == values


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None], pa.int64()),
        ([2**63, 0], pa.uint64()),
        ([1.5, None], pa.float64()),
        ([True], pa.bool_()),
        (["2020-01-01"], pa.string()),
        ([[], [1]], pa.list_(pa.int64())),
        ([[], [None]], pa.list_(pa.string())),
        (
            [{"a": None}, {"a": [{"b": 1}]}],
            pa.struct({"a": pa.list_(pa.struct({"b": pa.int64()}))}),
        ),
        ([None], pa.null()),
    ],
)
def test_columns_of_one_shape_have_its_type(values, kind):
    batch = read(*({"a": value} for value in values))
    assert batch.schema == pa.schema([("a", kind)])
    assert batch.column(0).to_pylist() == values


def test_objects_with_keys_of_their_own_are_text_of_the_same_size():
    rows = [{"a": {f"key {i} {n}": n for n in range(300)}} for i in range(300)]
    batch = read(*rows)
    assert batch.schema.field("a").type == pa.string()
    size = sum(len(json.dumps(row)) for row in rows)
    assert len(json_lines.format_rows(batch)) < 1.1 * size
    many = {f"key {n}": n for n in range(MAX_KEYS + 1)}
    assert read({"a": many}, {"a": many}).schema.field("a").type == pa.string()


@pytest.mark.parametrize("depth", [5, 31, 33, 400])
def test_any_depth(depth):
    value = 1
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    batch = read({"a": value, "b": 1})
    assert is_json_text(batch.schema.field("a")) == (depth > 32)
    assert json.loads(json_lines.format_rows(batch)) == {"a": value, "b": 1}
    assert json.loads(rendered(batch)[0]) == value


def test_what_tasks_take_of_json_text():
    messages = read(*({"a": value} for value in OWN["messages"]))
    numbers = read({"a": 5}, {"a": 2.5})
    assert is_json_text(messages.schema.field("a"))
    check_columns(GenerateSettings(messages_column="a"), messages.schema)
    for batch in (messages, numbers):
        with pytest.raises(OptionsError, match="column 'a': expected string, got JSON values"):
            check_columns(EmbedSettings(text_column="a"), batch.schema)


def test_nan_which_json_lacks_is_written_as_null():
    batch = read(b'{"a": NaN, "b": {"k": NaN}}', b'{"a": 1.5, "b": {"k": "NaN", "z": -Infinity}}')
    assert [json.loads(line) for line in json_lines.format_rows(batch).splitlines()] == [
        {"a": None, "b": {"k": None}},
        {"a": 1.5, "b": {"k": "NaN", "z": None}},
    ]
