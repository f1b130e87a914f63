"""Structured output: what it is made of, which columns it becomes, and every way to ask wrongly."""

import datetime
import json

import pyarrow as pa
import pydantic
import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import OptionsError
from beam_gemma.structured.grammar import Literal, OneOf
from beam_gemma.structured.json_schema import json_schema_of
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.tasks.generate import GenerateSettings, constraint_of
from tests.doubles.fake_models import TOKENIZER

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "born": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
        "heights": {"type": "array", "items": {"type": "number"}},
        "home": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
    "required": ["name"],
}
FIELDS = {
    "name": pa.string(),
    "born": pa.date32(),
    "heights": pa.list_(pa.float64()),
    "home": pa.struct([("town", pa.string())]),
}
TEXT = '{"name":"Ada","born":"1815-12-10","home":{"town":"London"}}'
VALUES = {
    "name": "Ada",
    "born": datetime.date(1815, 12, 10),
    "heights": None,
    "home": {"town": "London"},
}


def fields_of(columns):
    return [pa.field(name, kind) for name, kind in columns.items()]


def settings_of(structured, max_tokens=100, **fields):
    sampling = SamplingParams(max_tokens=max_tokens, **fields.pop("sampling", {}))
    return GenerateSettings(
        **{"prompt_column": "text"} | fields, sampling=sampling, structured=structured
    )


@pytest.mark.parametrize(
    ("fields", "columns", "values"),
    [
        ({}, {"extracted": pa.struct(FIELDS.items())}, {"extracted": VALUES}),
        ({"flatten": True}, FIELDS, VALUES),
        (
            {"flatten": True, "completion": True},
            {**FIELDS, "completion": pa.string()},
            {**VALUES, "completion": TEXT},
        ),
    ],
)
def test_a_schema_makes_typed_columns(fields, columns, values):
    structured = StructuredOutput(json_schema=SCHEMA, **fields)
    assert structured.columns == fields_of(columns)
    assert structured.values_of(TEXT) == values


def test_choices_and_patterns_stay_text():
    choices = StructuredOutput(choices=("yes", "no"))
    assert choices.language == OneOf((Literal("yes"), Literal("no")))
    for structured in (choices, StructuredOutput(regex="yes|no")):
        assert structured.columns == fields_of({"completion": pa.string()})
        assert structured.values_of("no") == {"completion": "no"}


def test_a_schema_may_be_no_object():
    structured = StructuredOutput(json_schema={"type": "array", "items": {"type": "integer"}})
    assert structured.columns == fields_of({"extracted": pa.list_(pa.int64())})
    assert structured.values_of("[1,2]") == {"extracted": [1, 2]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "structured: expected one of json_schema, choices and regex, got none"),
        (
            {"json_schema": SCHEMA, "regex": "a"},
            "structured: expected one of json_schema, choices and regex, got json_schema and regex",
        ),
        (
            {"choices": ("a", "b"), "regex": ""},
            "structured: expected one of json_schema, choices and regex, got choices and regex",
        ),
        ({"regex": "a", "flatten": True}, "flatten: expected a json_schema beside it, got regex"),
        (
            {"choices": ("a",), "completion": True},
            "completion: expected a json_schema beside it, got choices",
        ),
        ({"choices": ("a", "b", "a")}, "choices: expected each text once, got 'a' twice"),
        (
            {"choices": ("a", "b\udcff")},
            "choices: expected Unicode, got half a character in 'b\\udcff'",
        ),
        ({"choices": ("a", "")}, "choices: expected texts that are not empty, got an empty one"),
        (
            {"json_schema": {"type": "integer"}, "flatten": True},
            "flatten: expected a schema of objects, whose properties become columns, got one of "
            "int64",
        ),
    ],
)
def test_what_cannot_be_asked(fields, message):
    with pytest.raises(OptionsError) as caught:
        StructuredOutput(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"json_schema": {"type": "object", "properties": {"a": {"typ": "null"}}}}, "a/typ: "),
        ({"json_schema": {"enum": [{1, 2}]}}, "json_schema: "),
        ({"json_schema": {"type": "strin"}}, "#/type: "),
        ({"regex": "a(b"}, "regex: "),
        ({"regex": "a(?=b)"}, "regex: "),
    ],
)
def test_a_bad_schema_or_pattern_is_refused_with_its_place(fields, place):
    with pytest.raises(OptionsError) as caught:
        StructuredOutput(**fields)
    assert place in str(caught.value)


class Home(pydantic.BaseModel):
    town: str


class Person(pydantic.BaseModel):
    name: str
    born: datetime.date | None
    heights: list[float] = []
    home: Home


def test_a_class_has_a_schema_too():
    structured = StructuredOutput(json_schema=json_schema_of(Person), flatten=True)
    assert structured.columns == fields_of(FIELDS)
    assert json_schema_of(SCHEMA) is SCHEMA
    with pytest.raises(OptionsError, match=r"schema: expected .* model_json_schema\(\), got date"):
        json_schema_of(datetime.date)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"stop": ("\n",)}, "stop"),
        ({"sampling": {"ignore_eos": True}}, "ignore_eos"),
        ({"sampling": {"stop_token_ids": (5,)}}, "stop_token_ids"),
        ({"statistics": True}, "statistics"),
        ({"prompt_column": None, "prefix_column": "a", "suffix_column": "b"}, "prefix_column"),
    ],
)
def test_nothing_else_says_where_a_completion_ends(fields, name):
    with pytest.raises(OptionsError, match=f"^{name}: expected none beside structured output"):
        settings_of(StructuredOutput(regex="a"), **fields)


def test_properties_must_not_be_named_as_results_are():
    def schema(name):
        return {"type": "object", "properties": {name: {"type": "string"}}}

    with pytest.raises(OptionsError, match=r"^flatten: expected .*, got 'error'"):
        settings_of(StructuredOutput(json_schema=schema("error"), flatten=True))
    with pytest.raises(OptionsError, match=r"^flatten: expected .*, got 'completion'"):
        settings_of(
            StructuredOutput(json_schema=schema("completion"), flatten=True, completion=True)
        )
    settings = settings_of(StructuredOutput(json_schema=schema("completion"), flatten=True))
    assert settings.result_schema.names.count("completion") == 1
    settings = settings_of(StructuredOutput(json_schema=schema("error"), completion=True))
    assert settings.result_schema.names[:3] == ["extracted", "completion", "finish_reason"]


def test_results_depend_on_the_output_that_is_asked_for():
    """Also on the order of properties, which is that of the text."""
    backwards = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}
    asked = [
        None,
        StructuredOutput(regex="a|b"),
        StructuredOutput(choices=("a", "b")),
        StructuredOutput(json_schema=SCHEMA),
        StructuredOutput(json_schema=backwards),
        StructuredOutput(json_schema=SCHEMA, flatten=True),
    ]
    parameters = {json.dumps(settings_of(structured).parameters) for structured in asked}
    assert len(parameters) == len(asked)


def test_the_shortest_text_must_fit():
    """The tiny vocabulary has no piece with a quotation mark or a brace, so each is a token."""
    structured = StructuredOutput(json_schema=SCHEMA)
    shortest = len(TOKENIZER.encode([*TOKENIZER.split('{"name":""}')], add_bos=False))
    with pytest.raises(OptionsError) as caught:
        constraint_of(settings_of(structured, shortest - 1), TOKENIZER, (1,))
    assert str(caught.value) == (
        f"max_tokens: expected at least {shortest}, the tokens of the shortest text that is valid, "
        f"got {shortest - 1}"
    )
    assert constraint_of(settings_of(structured, shortest), TOKENIZER, (1,)) is not None
    assert constraint_of(settings_of(None, 1), TOKENIZER, (1,)) is None
