"""JSON Schemas as languages and Arrow types: what is valid, what is refused and where."""

import json
import re

import pyarrow as pa
import pytest

from beam_gemma.errors import OptionsError
from beam_gemma.json_schema import compile_schema
from beam_gemma.language import to_regex

TEXT = {"type": "string"}
WHOLE = {"type": "integer"}


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


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            objects(age={"type": "integer", "minimun": 3}),
            "#/properties/age/minimun: expected a keyword that decoding can keep to, got minimun"
            "; did you mean minimum?",
        ),
        (
            {"type": "strin"},
            '#/type: expected the shape of JSON Schema 2020-12, got "strin"; did you mean string?',
        ),
    ],
)
def test_a_schema_is_refused_with_its_place(schema: dict, message: str) -> None:
    with pytest.raises(OptionsError) as error:
        compile_schema(schema)
    assert str(error.value) == f"json_schema: {message}"
