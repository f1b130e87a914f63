"""Compile the schemas of scalar values: strings, numbers and constants."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import pyarrow as pa

from beam_gemma.errors import nearest
from beam_gemma.structured.grammar import Language
from beam_gemma.structured.json_formats import FORMATS
from beam_gemma.structured.json_numbers import (
    MAX_DIGITS,
    MAX_LISTED,
    Bound,
    decimals,
    is_listable,
    multiples,
)
from beam_gemma.structured.json_values import Values, arrow_value, json_text, union
from beam_gemma.structured.notation import JSON, Notation
from beam_gemma.structured.regex import parse_pattern
from beam_gemma.structured.schema_node import OF_TYPE, Subschema

KINDS = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string"}

INT64 = range(-(2**63), 2**63)
OF_FLOATS = range(1 - 10**MAX_DIGITS, 10**MAX_DIGITS)
"""Whole numbers that are taken where a column has floats."""
OF_DIGITS = f"number of at most {MAX_DIGITS} digits"


def string(schema: Subschema) -> Values:
    """Return the strings of a format, a pattern or a range of lengths."""
    keywords = schema.keywords & OF_TYPE["string"]
    if "format" in keywords:
        return _format(schema)
    if "pattern" in keywords:
        schema.alone("pattern", keywords, "; say it in the pattern, as in ^.{1,9}$")
        texts = parse_pattern(schema["pattern"], f"{schema.place}/pattern")
        notation = schema.notation
        return _strings(notation.strings(notation.contents(texts)), pa.string())
    counts = schema.counts("minLength", "maxLength")
    return _strings(schema.notation.any_string(*counts), pa.string())


def any_string(notation: Notation) -> Values:
    """Return all strings."""
    return _strings(notation.any_string(), pa.string())


def _strings(language: Language, kind: pa.DataType) -> Values:
    return Values(language=language, type=kind, kinds=frozenset({"string"}))


def _format(schema: Subschema) -> Values:
    """Return the strings of a format, beside which stand only lengths that all of them have."""
    name = schema["format"]
    if name not in FORMATS:
        raise schema.inner("format").error(
            f"one of {', '.join(FORMATS)}", name, nearest(name, FORMATS) or "; leave it out"
        )
    shortest, longest = FORMATS[name].lengths
    least, most = schema.counts("minLength", "maxLength")
    others = schema.keywords & OF_TYPE["string"]
    if least <= shortest:
        others -= {"minLength"}
    if most is not None and longest is not None and longest <= most:
        others -= {"maxLength"}
    schema.alone("format", others)
    texts = schema.notation.strings(FORMATS[name].language)
    return _strings(texts, FORMATS[name].type)


def integer(schema: Subschema) -> Values:
    """Return the whole numbers of 64 bits within the bounds."""
    found = _whole(schema, pa.int64(), INT64, "whole number of 64 bits")
    return replace(found, widened=partial(_whole, schema, pa.float64(), OF_FLOATS, OF_DIGITS))


def _whole(schema: Subschema, kind: pa.DataType, within: range, expected: str) -> Values:
    """Return the whole numbers within the bounds and a range."""
    # What is a multiple of p / q, in lowest terms, and whole, is a multiple of p.
    step = _exact(schema.get("multipleOf", 1)).numerator
    lows, highs = _bounds(schema)
    lowest = max([within[0], *(bound.lowest(1) for bound in lows)])
    highest = min([within[-1], *(bound.highest(1) for bound in highs)])
    if not is_listable(step, lowest, highest):
        raise schema.inner("multipleOf").error(
            f"at most {MAX_LISTED:,} multiples between the bounds",
            "more",
            "; set minimum and maximum, or take 2, 5, 10 or so on",
        )
    return _numbers(schema, multiples(step, lowest, highest), kind, expected)


def number(schema: Subschema) -> Values:
    """Return the decimals within the bounds, as floats in Arrow."""
    texts = decimals(*_bounds(schema), _places(schema))
    return _numbers(schema, texts, pa.float64(), OF_DIGITS)


def _numbers(
    schema: Subschema, language: Language | None, kind: pa.DataType, expected: str
) -> Values:
    if language is None:
        raise schema.error(f"bounds with a {expected} between them", "none")
    return Values(language=language, type=kind, kinds=frozenset({"number"}))


def _bounds(schema: Subschema) -> tuple[list[Bound], list[Bound]]:
    """Return the lower and the upper bounds."""

    def given(closed: str, opened: str) -> list[Bound]:
        return [
            Bound(_exact(schema[keyword]), is_open=keyword == opened)
            for keyword in (closed, opened)
            if keyword in schema.keywords
        ]

    return given("minimum", "exclusiveMinimum"), given("maximum", "exclusiveMaximum")


def _places(schema: Subschema) -> int:
    """Return the number of digits after the point that `multipleOf` allows."""
    if "multipleOf" not in schema.keywords:
        return MAX_DIGITS
    step = _exact(schema["multipleOf"])
    places = len(str(step.denominator)) - 1
    if step != Fraction(1, 10**places):
        raise schema.inner("multipleOf").error("1, 0.1, 0.01 or so on", schema["multipleOf"])
    return min(places, MAX_DIGITS)


def _exact(number: int | float) -> Fraction:
    """Return a number exactly as it is written, not as a float rounds it."""
    return Fraction(str(number))


def constants(schema: Subschema) -> list[Values]:
    """Return the values of `enum`, or that of `const`, that the other keywords accept."""
    keyword = "enum" if "enum" in schema.keywords else "const"
    place = schema.inner(keyword)
    listed = place.schema if keyword == "enum" else [place.schema]
    accepted = schema.accepted(listed)
    if not accepted:
        raise place.error("a value that the rest of the schema accepts", json_text(place.schema))
    types = schema.types() if "type" in schema.keywords else []
    is_decimal = any(isinstance(value, float) for value in accepted) or (
        "number" in types and "integer" not in types
    )
    text_format = FORMATS.get(schema.get("format"))
    arrow_types = {
        "null": pa.null(),
        "boolean": pa.bool_(),
        "number": pa.float64() if is_decimal else pa.int64(),
        "string": text_format.type if text_format else pa.string(),
    }
    return [_constant(value, place, arrow_types) for value in accepted]


def _constant(value: Any, place: Subschema, arrow_types: Mapping[str, pa.DataType]) -> Values:
    kind = KINDS.get(type(value))
    if kind is None:
        raise place.error(
            "strings, numbers, true, false or null", json_text(value), "; list what is within"
        )
    arrow_type = arrow_types[kind]
    try:
        pa.scalar(value if kind == "number" else arrow_value(value, arrow_type), arrow_type)
    except (ValueError, OverflowError) as error:
        raise place.error(f"values that {arrow_type} holds", json_text(value)) from error
    return _single(value, kind, arrow_type, place.notation)


def _single(value: Any, kind: str, arrow_type: pa.DataType, notation: Notation = JSON) -> Values:
    return Values(
        language=notation.constant(value),
        type=arrow_type,
        kinds=frozenset({kind}),
        listed=frozenset({value}),
        is_nullable=value is None,
    )


BOOLEAN = union([_single(value, "boolean", pa.bool_()) for value in (True, False)])
NULL = _single(None, "null", pa.null())
