"""Strategies: JSON Schemas that can be kept to, and texts of their languages."""

import datetime as dt
import json
import random
from decimal import Decimal

from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from beam_gemma.structured.grammar import Chars, Concat, Language, Literal, OneOf, Repeat

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
COUNTS = st.integers(0, 4)
MILLION = st.integers(-(10**6), 10**6)
FORMATS = ["date", "date-time", "time", "uuid", "email", "ipv4", "duration", "uri"]
PATTERNS = ["^[A-Z]{2}-[0-9]+$", "(red|green)", '^"\\\\\n', "é[^a-z]?$"]


def sample(language: Language, rng: random.Random, most: int = 3) -> str:
    """Return a text of a language; a repetition is at most so much longer than it must be."""
    match language:
        case Literal(text):
            return text
        case Chars(ranges):
            common = [(first, last) for first, last in ranges if last < 0x7F]
            ranges = common if common and rng.random() < 0.7 else ranges
            return chr(rng.randint(*rng.choice(ranges)))
        case Concat(parts):
            return "".join(sample(part, rng, most) for part in parts)
        case OneOf(options):
            return sample(rng.choice(options), rng, most)
        case Repeat(body, least, limit):
            extra = most if limit is None else min(most, limit - least)
            return "".join(sample(body, rng, most) for _ in range(least + rng.randint(0, extra)))


def check_valid(schema: dict, text: str) -> None:
    """Check that a text is valid, its numbers taken as they are written and as floats."""
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    validator(exact).validate(json.loads(text, parse_float=Decimal))
    # jsonschema divides floats to see whether 0.29 is a multiple of 0.01.
    if "multipleOf" not in json.dumps(schema):
        validator(schema).validate(json.loads(text))


def validator(schema: dict) -> Draft202012Validator:
    return Draft202012Validator(schema, format_checker=FORMAT_CHECKER)


FORMAT_CHECKER = Draft202012Validator.FORMAT_CHECKER


@FORMAT_CHECKER.checks("date-time", ValueError)
def is_point_in_time(value: object) -> bool:
    return not isinstance(value, str) or dt.datetime.fromisoformat(value).tzinfo is not None


@FORMAT_CHECKER.checks("time", ValueError)
def is_time(value: object) -> bool:
    return not isinstance(value, str) or dt.time.fromisoformat(value).tzinfo is not None


def merged(*parts):
    """Return mappings with the keys of several."""
    return st.tuples(*parts).map(lambda found: {k: v for part in found for k, v in part.items()})


def typed(kind, *parts):
    """Return schemas of a type."""
    return merged(st.just({"type": kind}), *parts)


def ends(values, low, high):
    """Return what two keywords say of where values begin and end; either may be missing."""
    return st.builds(
        lambda pair, chosen: {key: pair[key] for key in chosen},
        st.lists(values, min_size=2, max_size=2, unique=True).map(
            lambda pair: dict(zip((low, high), sorted(pair), strict=True))
        ),
        st.sets(st.sampled_from([low, high])),
    )


def steps(places):
    """Return decimals of so many places within bounds."""
    values = MILLION.map(lambda number: number / 10**places)
    step = st.sampled_from([{}, {"multipleOf": 10**-places}])
    return typed("number", ends(values, "minimum", "maximum"), step)


def multiples(step):
    """Return multiples of a whole number within bounds."""
    bounds = ends(MILLION.map(lambda number: number * step), "minimum", "maximum")
    return typed("integer", bounds, st.just({"multipleOf": step}))


def constants(values):
    """Return `enum` or `const` of some values, with null or without."""
    return st.one_of(
        values.map(lambda value: {"const": value}),
        st.lists(values, min_size=1, max_size=4).map(lambda found: {"enum": found}),
        st.lists(values, min_size=1, max_size=4).map(lambda found: {"enum": [None, *found]}),
    )


THOUSANDTHS = MILLION.map(lambda number: number / 1000)
SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    typed("string", ends(COUNTS, "minLength", "maxLength")),
    typed("string", st.sampled_from(FORMATS).map(lambda name: {"format": name})),
    typed("string", st.sampled_from(PATTERNS).map(lambda pattern: {"pattern": pattern})),
    typed("integer", ends(MILLION, "minimum", "maximum")),
    typed("number", ends(THOUSANDTHS, "exclusiveMinimum", "exclusiveMaximum")),
    st.integers(0, 3).flatmap(steps),
    st.sampled_from([2, 5, 25, 100]).flatmap(multiples),
    constants(TEXT),
    constants(MILLION),
    constants(st.booleans()),
)


def arrays(items):
    counts = ends(COUNTS, "minItems", "maxItems")
    return typed("array", items.map(lambda schema: {"items": schema}), counts)


def maps(values):
    names = st.sampled_from([{}, {"propertyNames": {"minLength": 2}}])
    return typed("object", values.map(lambda schema: {"additionalProperties": schema}), names)


def tuples(items):
    return items.map(lambda schema: {"type": "array", "prefixItems": [schema, schema]})


@st.composite
def objects(draw, values):
    properties = draw(st.dictionaries(TEXT, values, min_size=1, max_size=4))
    required = draw(st.sets(st.sampled_from(sorted(properties))))
    closed = draw(st.sampled_from([{}, {"additionalProperties": False}]))
    return {"type": "object", "properties": properties, "required": sorted(required), **closed}


@st.composite
def tagged(draw, values):
    """Return `oneOf` of objects that a constant tells apart."""
    options = [
        {
            "type": "object",
            "properties": {"kind": {"const": f"k{i}"}, f"value{i}": draw(values)},
            "required": ["kind"],
        }
        for i in range(draw(st.integers(1, 3)))
    ]
    return {"oneOf": options}


def nullable(values):
    return values.map(lambda schema: {"anyOf": [schema, {"type": "null"}]})


@st.composite
def referred(draw, values):
    """Return a schema that takes another twice, by references."""
    joined = {"allOf": [{"$ref": "#/$defs/Value"}], "description": "Joined."}
    properties = {"one": {"$ref": "#/$defs/Value"}, "two": joined}
    return {"type": "object", "properties": properties, "$defs": {"Value": draw(values)}}


TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        objects(inner),
        objects(inner),
        arrays(inner),
        maps(inner),
        tuples(inner),
        tagged(inner),
        nullable(inner),
    ),
    max_leaves=5,
)
SCHEMAS = TREES | objects(TREES) | referred(TREES)
"""Of any value, most of them objects."""
