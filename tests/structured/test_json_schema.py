"""JSON Schemas as languages and Arrow types: what is valid, what is refused and where."""

import json
import pickle
import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.errors import OptionsError
from beam_gemma.structured.automaton import Automaton, Vocabulary
from beam_gemma.structured.grammar import to_regex
from beam_gemma.structured.json_schema import compile_schema
from beam_gemma.structured.json_values import json_text
from tests.doubles.schemas import SCHEMAS, check_valid, sample, validator

TEXT = {"type": "string"}
WHOLE = {"type": "integer"}
BYTES = Vocabulary([*(bytes([byte]) for byte in range(256)), b'","', b'":"', b"},{"])


def objects(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


def accepts(schema, text):
    return bool(re.fullmatch(to_regex(compile_schema(schema).language), text))


def test_an_object_has_its_properties_in_order() -> None:
    schema = objects(["b", "d"], a=TEXT, b=WHOLE, c=TEXT, d=WHOLE)
    for text in ('{"b":1,"d":2}', '{"a":"x","b":1,"c":"y","d":2}'):
        assert accepts(schema, text)
    for text in ('{"d":2,"b":1}', '{"b":1}', '{"b":1,,"d":2}', '{"b":1,"d":2,"e":3}', '{"b": 1}'):
        assert not accepts(schema, text)


@pytest.mark.parametrize(
    ("schema", "is_left_out"),
    [
        (WHOLE, True),
        ({"type": ["integer", "null"]}, True),
        ({"type": ["integer", "null"], "default": None}, True),
        ({"type": ["integer", "null"], "default": 3}, False),
        ({"type": "integer", "default": 3}, False),
        ({"type": "integer", "default": None}, False),
        ({"type": "integer", "nullable": True, "default": None}, True),
        ({"anyOf": [WHOLE, {"type": "null"}], "default": None}, True),
        ({"$ref": "#/$defs/Count"}, False),
        ({"$ref": "#/$defs/Count", "default": None}, False),
        ({"allOf": [{"$ref": "#/$defs/Maybe"}], "default": None}, True),
    ],
)
def test_a_property_is_left_out_only_where_null_stands_for_it(schema, is_left_out) -> None:
    """A column has null there, which is no default but null itself."""
    root = objects(a=schema) | {
        "$defs": {"Count": {**WHOLE, "default": 1}, "Maybe": {"enum": [1, None]}}
    }
    assert accepts(root, '{"a":1}')
    assert accepts(root, "{}") == is_left_out


def test_a_tag_with_a_default_tells_options_apart() -> None:
    options = [objects(tag={"const": tag, "default": tag}, **{tag: WHOLE}) for tag in "ab"]
    schema = {"oneOf": options}
    assert accepts(schema, '{"tag":"a","a":1}')
    assert accepts(schema, '{"tag":"b"}')
    assert not accepts(schema, "{}")
    assert not accepts(schema, '{"tag":"a","b":1}')


def test_annotations_that_nobody_knows_say_nothing() -> None:
    notes = {
        "x-order": 1, "x-minimum": 3, "id": "a", "example": 5, "examples": [5], "order": 3,
        "propertyOrdering": ["b", "a"], "deprecated": True, "readOnly": True, "widget": "slider",
        "xml": {}, "externalDocs": {}, "units": "kg", "note": "!", "prompt": "?",
        "markdownDescription": "*",
    }  # fmt: skip
    plain = compile_schema(objects(a=WHOLE))
    assert compile_schema({**objects(a={**WHOLE, **notes}), **notes}) == plain


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"type": "string", "enum": ["a"], "nullable": True}, ['"a"', "null"]),
        ({"const": "a", "nullable": False}, ['"a"']),
        ({"$ref": "#/$defs/A", "nullable": True}, ['"a"', "null"]),
        ({"$ref": "#/$defs/B"}, ['"b"', "null"]),
        ({"allOf": [{"$ref": "#/$defs/B"}]}, ['"b"', "null"]),
        ({"oneOf": [{"const": "a"}, {"const": "b"}], "nullable": True}, ['"a"', '"b"', "null"]),
    ],
)
def test_nullable_is_null_too(schema, values) -> None:
    """As in OpenAPI 3.0."""
    root = {**schema, "$defs": {"A": {"const": "a"}, "B": {"const": "b", "nullable": True}}}
    assert [text for text in ('"a"', '"b"', "null") if accepts(root, text)] == values


def test_whole_numbers_or_others_are_floats_without_a_loss() -> None:
    for schema in ({"anyOf": [WHOLE, {"type": "number"}]}, {"type": ["number", "integer"]}):
        found = compile_schema(schema)
        assert found.type == pa.float64()
        assert accepts(schema, "999999999999999")
        assert not accepts(schema, "9007199254740993")
    mixed = {"anyOf": [{"type": "integer", "minimum": 10}, {"type": "number", "maximum": 1}]}
    texts = ["10", "0.5", "1", "9", "10.5"]
    assert [text for text in texts if accepts(mixed, text)] == ["10", "0.5", "1"]


def test_an_object_of_any_names_is_a_map() -> None:
    schema = objects(["a"], a={"additionalProperties": {"type": ["integer", "null"]}})
    found = compile_schema(schema)
    assert found.type == pa.struct([("a", pa.map_(pa.string(), pa.int64()))])
    for text in ('{"a":{}}', '{"a":{"x":1,"\\u00e9\\"":null,"":3}}'.replace("\\u00e9", "é")):
        assert accepts(schema, text)
        (row,) = pa.array([found.parse(text)], found.type).to_pylist(maps_as_pydicts="strict")
        assert row == json.loads(text)
    for text in ('{"a":{"x":"1"}}', '{"a":{"x":1,}}', '{"a":{x:1}}', '{"a":{"x":1"y":2}}'):
        assert not accepts(schema, text)
    named = {"additionalProperties": WHOLE, "propertyNames": {"enum": ["x", "y"]}}
    assert accepts(named, '{"y":1}')
    assert not accepts(named, '{"z":1}')


def test_a_length_that_all_texts_of_a_format_have_may_stand_beside_it() -> None:
    assert accepts({"format": "date", "minLength": 10, "maxLength": 10}, '"2024-02-29"')
    web = {"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083}
    assert accepts(web, '"https://www.example.com:8080/a/b.html?c=%20d&e#f"')
    assert not accepts(web, '"example.com"')


@pytest.mark.parametrize("num_properties", range(1, 6))
def test_properties_that_are_not_required_may_be_missing_in_any_way(num_properties: int) -> None:
    names = "abcde"[:num_properties]
    schema = objects(**{name: {"const": 0} for name in names})
    found = compile_schema(schema).language
    for chosen in range(2**num_properties):
        given = {name: 0 for i, name in enumerate(names) if chosen >> i & 1}
        text = json.dumps(given, separators=(",", ":"))
        assert re.fullmatch(to_regex(found), text)
        for broken in (text.replace("{", "{,"), text.replace("}", ",}"), text.replace(",", "")):
            assert broken == text or not re.fullmatch(to_regex(found), broken)


def test_values_become_arrow_columns() -> None:
    schema = compile_schema(
        objects(
            ["name", "tags"],
            name={"type": ["string", "null"]},
            age=WHOLE,
            score={"type": "number"},
            tags={"type": "array", "items": {"enum": ["a", "b"]}},
            inner=objects(x={"type": "boolean"}),
        )
    )
    texts = [
        '{"name":null,"tags":[]}',
        '{"name":"é\\n","age":3,"score":2,"tags":["b","a"],"inner":{"x":true}}',
    ]
    assert all(re.fullmatch(to_regex(schema.language), text) for text in texts)
    array = pa.array([schema.parse(text) for text in texts], schema.type)
    assert str(array.type) == (
        "struct<name: string, age: int64, score: double, tags: list<item: string>, "
        "inner: struct<x: bool>>"
    )
    assert array.to_pylist() == [
        {"name": None, "age": None, "score": None, "tags": [], "inner": None},
        {"name": "é\n", "age": 3, "score": 2.0, "tags": ["b", "a"], "inner": {"x": True}},
    ]


CONSTANTS = [None, True, False, *range(-2, 14), "", "a", "ab", "abc", '"\\\n', "é", "🙂🙂"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "boolean"},
        {"type": ["boolean", "null"]},
        {"type": "integer", "minimum": 0, "exclusiveMaximum": 12},
        {"type": "integer", "exclusiveMinimum": -1.5, "maximum": 12.5},
        {"type": "number", "exclusiveMinimum": 1, "maximum": 12},
        {"type": "string", "minLength": 1, "maxLength": 2},
        {"type": ["string", "null"], "minLength": 3},
        {"type": "string", "maxLength": 0},
        {"enum": ["a", "é", None]},
        {"type": "string", "minLength": 2, "enum": ["a", "ab", None, 3]},
        {"const": 3},
        {"anyOf": [{"const": "a"}, {"type": "string", "minLength": 3}, {"type": "null"}]},
        {"oneOf": [{"enum": [1, 2]}, {"const": 3}, {"type": "null"}]},
    ],
)
def test_a_value_has_a_text_exactly_when_it_is_valid(schema: dict) -> None:
    regex = re.compile(to_regex(compile_schema(schema).language))
    found = [value for value in CONSTANTS if regex.fullmatch(json_text(value))]
    assert found == [value for value in CONSTANTS if validator(schema).is_valid(value)]


@pytest.mark.parametrize(
    ("least", "most"), [(0, None), (0, 0), (0, 1), (0, 3), (1, 2), (2, 2), (3, None)]
)
def test_an_array_has_as_many_items_as_it_may(least: int, most: int | None) -> None:
    schema = {"type": "array", "items": {"const": 7}, "minItems": least}
    schema |= {} if most is None else {"maxItems": most}
    regex = re.compile(to_regex(compile_schema(schema).language))
    for number in range(6):
        text = json_text([7] * number)
        assert bool(regex.fullmatch(text)) == (
            least <= number <= (number if most is None else most)
        )
        assert not regex.fullmatch(text.replace("]", ",]"))


def test_a_tuple_has_all_its_items() -> None:
    schema = {"type": "array", "prefixItems": [{"const": 1}, {"enum": [2, 3]}], "items": False}
    assert compile_schema(schema).type == pa.list_(pa.int64())
    texts = ["[]", "[1]", "[1,2]", "[1,3]", "[2,1]", "[1,2,3]"]
    assert [text for text in texts if accepts(schema, text)] == ["[1,2]", "[1,3]"]


def test_options_that_are_objects_become_one_struct() -> None:
    lists = ({"type": "array", "items": objects(**inner)} for inner in ({"p": TEXT}, {"q": WHOLE}))
    first, second = (
        objects(["kind", "y"], kind={"const": kind}, x=WHOLE, y=items)
        for kind, items in zip("ab", lists, strict=True)
    )
    schema = compile_schema({"oneOf": [first, second, {"type": "null"}]})
    assert str(schema.type) == (
        "struct<kind: string, x: int64, y: list<item: struct<p: string, q: int64>>>"
    )
    assert schema.parse('{"kind":"b","y":[{"q":3}]}') == {
        "kind": "b", "x": None, "y": [{"p": None, "q": 3}]
    }  # fmt: skip


def test_properties_of_joined_schemas_follow_each_other() -> None:
    schema = {
        "allOf": [{"$ref": "#/$defs/a~1b"}, {"required": ["y"]}],
        "properties": {"y": WHOLE},
        "$defs": {"a/b": objects(["x"], x=TEXT)},
    }
    assert accepts(schema, '{"x":"a","y":1}')
    assert not accepts(schema, '{"x":"a"}')
    assert not accepts(schema, '{"y":1}')


def test_whole_numbers_are_floats_where_numbers_are_asked_for() -> None:
    for schema in ({"type": "number"}, {"type": "number", "enum": [1, 2]}, {"enum": [1, 2.5]}):
        found = compile_schema(schema)
        assert found.type == pa.float64()
        assert isinstance(found.parse("1"), float)


def test_many_properties_that_may_be_missing_are_not_squared() -> None:
    """With 128 in any order after one another there would be 8,256 of them."""
    schema = objects(**{f"x{i}": {"const": i} for i in range(128)})
    assert to_regex(compile_schema(schema).language).count("x") < 128 * 8


def test_a_class_with_a_schema_is_one() -> None:
    class Person:
        @staticmethod
        def model_json_schema() -> dict:
            return objects(["age"], age=WHOLE)

    assert compile_schema(Person) == compile_schema(objects(["age"], age=WHOLE))
    with pytest.raises(OptionsError, match=r"expected a mapping or a class with model_json_schema"):
        compile_schema(int)


def test_it_pickles() -> None:
    schema = compile_schema(objects(a={"type": "number"}, b={"format": "date"}))
    assert pickle.loads(pickle.dumps(schema)) == schema


@settings(deadline=None)
@given(SCHEMAS, st.randoms(use_true_random=False))
def test_each_text_of_a_schema_is_valid_and_becomes_a_value_in_arrow(schema, rng) -> None:
    found = compile_schema(schema)
    texts = [sample(found.language, rng) for _ in range(5)]
    regex = re.compile(to_regex(found.language))
    for text in texts:
        assert regex.fullmatch(text)
        check_valid(schema, text)
    array = pa.array([found.parse(text) for text in texts], found.type)
    values = array.to_pylist(maps_as_pydicts="strict")
    assert values == [found.parse(text) for text in texts]
    array.validate(full=True)


@settings(deadline=None, max_examples=30)
@given(SCHEMAS, st.randoms(use_true_random=False))
def test_from_within_any_text_a_shortest_way_leads_to_one_that_is_valid(schema, rng) -> None:
    language = compile_schema(schema).language
    automaton = Automaton(language, BYTES)
    text = sample(language, rng).encode()
    done = text[: rng.randint(0, len(text))]
    state = automaton.advance(automaton.start, done)
    for _ in range(automaton.distance(state)):
        token_id = automaton.next_token(state)
        done += BYTES.tokens[token_id]
        state = automaton.step(state, token_id)
    assert automaton.is_accepting(state)
    check_valid(schema, done.decode())
