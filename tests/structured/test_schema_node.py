"""Schemas that cannot be kept to: refused, with the place and what helps."""

import pytest

from beam_gemma.errors import OptionsError
from beam_gemma.structured.json_schema import compile_schema

TEXT = {"type": "string"}
WHOLE = {"type": "integer"}


def objects(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


SELF = {"$ref": "#/$defs/Node", "$defs": {"Node": objects(next={"$ref": "#/$defs/Node"})}}
NO_SHAPE = "expected the shape of JSON Schema 2020-12, got"
NO_KEYWORD = "expected a keyword that decoding can keep to, got"
NO_TYPE = "expected values of one Arrow type, got"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, f'#/type: {NO_SHAPE} "strin"; did you mean string?'),
        ({"minLength": -1}, f"#/minLength: {NO_SHAPE} -1; -1 is less than the minimum of 0"),
        (objects(a=1), f"#/properties/a: {NO_SHAPE} 1; 1 is not of type 'object', 'boolean'"),
        (
            objects(a={"minimun": 3}),
            f"#/properties/a/minimun: {NO_KEYWORD} minimun; did you mean minimum?",
        ),
        ({"items": {"not": {}}}, f"#/items/not: {NO_KEYWORD} not; leave it out"),
        (
            {"type": "string", "minimum": 3},
            "#/minimum: expected a keyword of string, got minimum; leave it out or change the type",
        ),
        (
            {"maxLength": 3, "minItems": 3},
            "#: expected a type, got maxLength and minItems; add one",
        ),
        (objects(**{"a/b~": {}}), "#/properties/a~1b~0: expected a type, got none; add one"),
        (objects(a=True), "#/properties/a: expected a schema that says what is valid, got true"),
        (
            {"type": "object"},
            "#: expected properties, each of which becomes a field, got none; add them",
        ),
        (
            objects(["nam"], name=TEXT),
            "#/required/0: expected the name of a property, got nam; did you mean name?",
        ),
        (
            {**objects(a=TEXT), "additionalProperties": WHOLE},
            "#/additionalProperties: expected false beside properties, since a field has one name"
            ", got a schema; make one of them an object of its own",
        ),
        ({"type": "array"}, "#: expected items, got an array of anything; add them"),
        ({"prefixItems": [TEXT, WHOLE]}, f"#: {NO_TYPE} string and int64; ask for one of them"),
        (
            {"prefixItems": [TEXT], "minItems": 2},
            "#: expected 1 items, as many as prefixItems, got 2 at least",
        ),
        (
            {"prefixItems": [TEXT], "items": TEXT},
            "#/items: expected no items beside prefixItems, got some; leave them out",
        ),
        (
            {"minItems": 3, "maxItems": 2, "items": TEXT},
            "#: expected at most maxItems 2, got minItems 3",
        ),
        ({"type": "null"}, "#: expected a type with values, got nothing but null; leave it out"),
        (
            {"anyOf": [{"type": ["integer", "null"]}, {"type": "number"}]},
            f"#: {NO_TYPE} int64 and double; ask for one of them",
        ),
        (
            {"type": "integer", "multipleOf": 7},
            "#/multipleOf: expected at most 1,000 multiples between the bounds, got more"
            "; set minimum and maximum, or take 2, 5, 10 or so on",
        ),
        (
            {"type": "integer", "multipleOf": 7, "minimum": 8, "maximum": 13},
            "#: expected bounds with a whole number of 64 bits between them, got none",
        ),
        (
            {**objects(a=TEXT), "propertyNames": TEXT},
            "#/propertyNames: expected names beside a schema in additionalProperties"
            ", got named properties; leave it out",
        ),
        (
            {"additionalProperties": WHOLE, "propertyNames": {"format": "date"}},
            "#/propertyNames: expected names that are text, got date32[day]"
            "; take names without format",
        ),
        (
            {"additionalProperties": WHOLE, "required": ["a"]},
            "#/required: expected nothing beside additionalProperties, got required"
            "; name all properties",
        ),
        (
            {"type": "array", "items": TEXT, "additionalItems": False},
            f"#/additionalItems: {NO_KEYWORD} additionalItems; leave it out",
        ),
        ({**WHOLE, "max": 3}, f"#/max: {NO_KEYWORD} max; did you mean maximum?"),
        (
            {**TEXT, "max_length": 3},
            f"#/max_length: {NO_KEYWORD} max_length; did you mean maxLength?",
        ),
        (
            {"type": "array", "items": TEXT, "uniqueItem": True},
            f"#/uniqueItem: {NO_KEYWORD} uniqueItem; did you mean uniqueItems?",
        ),
        (
            {"anyOf": [TEXT, objects(a=TEXT)]},
            f"#: {NO_TYPE} string and struct<a: string>; ask for one of them",
        ),
        (
            {"anyOf": [TEXT], "minLength": 3},
            "#/minLength: expected nothing beside anyOf, got minLength; move it into anyOf",
        ),
        (
            {"oneOf": [{"maxLength": 3}, {"type": "null"}]},
            "#/oneOf/1: expected no value of an option before it, by its type or by a required "
            "constant, got values that may be of both; take anyOf",
        ),
        (
            {"oneOf": [{"enum": ["a", "b"]}, {"const": "b"}]},
            "#/oneOf/1: expected no value of an option before it, by its type or by a required "
            "constant, got values that may be of both; take anyOf",
        ),
        (
            {"allOf": [TEXT, {"minLength": 3}]},
            "#/allOf/0: expected an object, since # joins it with others, got type",
        ),
        (
            {"allOf": [objects(a=TEXT), objects(a=WHOLE)]},
            "#/allOf/1/properties/a: expected what it is elsewhere"
            ", got another schema; write it once",
        ),
        (
            {"allOf": [{**objects(a=TEXT), "additionalProperties": False}, objects(b=TEXT)]},
            "#/allOf/0/additionalProperties: expected no false in a schema that others are joined "
            "with, got false; leave it out",
        ),
        (
            SELF,
            "#/$defs/Node/properties/next/$ref: expected a schema that does not hold itself"
            ", got a reference to #/$defs/Node within it; write its levels out",
        ),
        (
            objects(a={"$ref": "#"}),
            "#/properties/a/$ref: expected a schema that does not hold itself"
            ", got a reference to # within it; write its levels out",
        ),
        (
            {"$ref": "#/$defs/a"},
            "#/$ref: expected a reference to a part of the schema, got #/$defs/a; see its $defs",
        ),
        (
            {"$ref": "#anchor"},
            "#/$ref: expected a reference within the same schema, as #/$defs/NAME, got #anchor",
        ),
        (
            {"$ref": "a.json"},
            "#/$ref: expected a reference within the same schema, as #/$defs/NAME, got a.json",
        ),
        ({"enum": []}, "#/enum: expected a value that the rest of the schema accepts, got []"),
        (
            {"type": "string", "const": 3},
            "#/const: expected a value that the rest of the schema accepts, got 3",
        ),
        (
            {"enum": ["a", ["b"]]},
            "#/enum: expected strings, numbers, true, false or null"
            ', got ["b"]; list what is within',
        ),
        ({"enum": ["a", 1]}, f"#: {NO_TYPE} string and int64; ask for one of them"),
        ({"enum": [2**63]}, f"#/enum: expected values that int64 holds, got {2**63}"),
        ({"enum": [2**53 + 1, 0.5]}, f"#/enum: expected values that double holds, got {2**53 + 1}"),
        (
            {"type": "integer", "exclusiveMinimum": 3, "maximum": 3.5},
            "#: expected bounds with a whole number of 64 bits between them, got none",
        ),
        (
            {"minimum": 10**15},
            "#: expected bounds with a number of at most 15 digits between them, got none",
        ),
        ({"multipleOf": 0.5}, "#/multipleOf: expected 1, 0.1, 0.01 or so on, got 0.5"),
        (
            {"format": "dat"},
            "#/format: expected one of date, date-time, time, uuid, email, duration, uri, ipv4"
            ", got dat; did you mean date?",
        ),
        (
            {"format": "date", "maxLength": 3},
            "#/maxLength: expected nothing beside format, got maxLength; leave it out",
        ),
        (
            {"format": "iri", "maxLength": 2083},
            "#/format: expected one of date, date-time, time, uuid, email, duration, uri, ipv4"
            ", got iri; did you mean uri?",
        ),
        (
            {"format": "email", "maxLength": 254},
            "#/maxLength: expected nothing beside format, got maxLength; leave it out",
        ),
        (
            {"pattern": "a", "maxLength": 3},
            "#/maxLength: expected nothing beside pattern"
            ", got maxLength; say it in the pattern, as in ^.{1,9}$",
        ),
    ],
)
def test_a_schema_is_refused_with_its_place(schema: dict, message: str) -> None:
    with pytest.raises(OptionsError) as error:
        compile_schema(schema)
    assert str(error.value) == f"json_schema: {message}"


@pytest.mark.parametrize("schema", [{"const": {1}}, {"const": float("nan")}, {"const": "\ud800"}])
def test_what_json_does_not_have_is_refused(schema: dict) -> None:
    with pytest.raises(OptionsError, match="got what JSON does not have"):
        compile_schema(schema)
