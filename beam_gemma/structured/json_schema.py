"""Compile a JSON Schema to the regular language of its valid texts, and to an Arrow type.

The texts of a schema are compact JSON, `{"a":1,"b":[1,2]}`, with the properties in the order of
the schema and no others. Each such text is valid, but some valid values have no such text. A schema
that decoding cannot enforce, or that has no single Arrow type, is refused with the faulty place.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import pyarrow as pa

from beam_gemma.errors import OptionsError, nearest
from beam_gemma.structured.grammar import (
    EMPTY,
    Concat,
    Language,
    Literal,
    OneOf,
    Repeat,
    is_same,
    optional,
)
from beam_gemma.structured.json_scalars import (
    BOOLEAN,
    NULL,
    any_string,
    constants,
    integer,
    number,
    string,
)
from beam_gemma.structured.json_values import Values, arrow_value, may_share, union
from beam_gemma.structured.notation import JSON, Notation
from beam_gemma.structured.schema_node import MAX_LEVELS, OF_TYPE, Subschema, checked

COMMA = Literal(",")
MAX_FIELDS = 5_000
"""Maximum fields of a schema's Arrow type, nested ones among them."""
ALL_KINDS = frozenset(OF_TYPE) - {"integer"}


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A compiled JSON Schema."""

    language: Language
    """Language of the texts."""
    type: pa.DataType
    """Arrow type of the values."""

    def parse(self, text: str) -> Any:
        """Return the value of a text of the language, in the form that `pa.array` takes."""
        return arrow_value(json.loads(text), self.type)


def compile_schema(
    schema: Mapping[str, Any] | type, *, notation: Notation = JSON, subject: str = "json_schema"
) -> JsonSchema:
    """Compile a JSON Schema, or a class with `model_json_schema()` like Pydantic's.

    Args:
        schema: The schema.
        notation: How the texts write their values; `parse` of the result reads JSON alone.
        subject: What messages call the schema.

    Raises:
        OptionsError: the schema is invalid or cannot be enforced; the message names the place.
    """
    values = _column(checked(json_schema_of(schema), notation=notation, subject=subject))
    return JsonSchema(values.language, values.type)


def json_schema_of(schema: Mapping[str, Any] | type) -> Mapping[str, Any]:
    """Return a JSON Schema unchanged, or the JSON Schema of a class.

    Raises:
        OptionsError: the class has no `model_json_schema()`.
    """
    if not isinstance(schema, type):
        return schema
    if not hasattr(schema, "model_json_schema"):
        raise OptionsError(
            "json_schema: expected a mapping or a class with model_json_schema(), got "
            f"{schema.__name__}"
        )
    if "pydantic" in sys.modules:
        from pydantic import BaseModel

        from beam_gemma.structured.pydantic_schema import schema_of

        if issubclass(schema, BaseModel):
            return schema_of(schema)
    return schema.model_json_schema()


def _column(schema: Subschema) -> Values:
    """Return the values of a place that becomes a column, a field or the items of a list."""
    values = _values(schema)
    if pa.types.is_null(values.type):
        raise schema.error("a type with values", "nothing but null", "; leave it out")
    return values


def _values(schema: Subschema) -> Values:
    """Return the values of a place, made once for all references to it."""
    return schema.once(_bounded)


def _bounded(schema: Subschema) -> Values:
    parts = schema.parts()
    values = _of_parts([part for part in parts if part.keywords] or parts[:1], schema)
    if schema.get("nullable") is True or all(part.get("nullable") is True for part in parts):
        values = _union([values, NULL], schema)
    for limit, got, what in (
        (MAX_FIELDS, values.num_fields, "fields, nested ones among them"),
        (MAX_LEVELS, values.num_levels, "levels of objects and arrays"),
    ):
        if got > limit:
            raise schema.error(f"at most {limit:,} {what}", f"{got:,}", "; take fewer")
    return values


def _of_parts(parts: Sequence[Subschema], schema: Subschema) -> Values:
    if len(parts) > 1:
        values = _joined(parts, schema)
    elif keyword := {"anyOf", "oneOf"} & parts[0].keywords:
        return _alternatives(parts[0], min(keyword))
    elif {"enum", "const"} & parts[0].keywords:
        return _union(constants(parts[0]), parts[0])
    else:
        values = _union([_OF_TYPE[kind](parts[0]) for kind in parts[0].types()], parts[0])
    is_typed = any("type" in part.keywords for part in parts)
    return values if is_typed else replace(values, kinds=ALL_KINDS)


def _union(options: Sequence[Values], schema: Subschema) -> Values:
    if any(option.type == pa.float64() for option in options):
        options = [option.widened() if option.widened else option for option in options]
    structs = {option.type: option.num_fields for option in options if option.num_fields > 1}
    if len(structs) > 1 and sum(structs.values()) > MAX_FIELDS:
        got = f"{sum(structs.values()):,}"
        raise schema.error(f"options with at most {MAX_FIELDS:,} fields", got, "; take fewer")
    try:
        return union(options)
    except pa.ArrowTypeError as error:
        kinds = " and ".join(dict.fromkeys(str(option.type) for option in options))
        raise schema.error("values of one Arrow type", kinds, "; ask for one of them") from error


def _alternatives(schema: Subschema, keyword: str) -> Values:
    """Return the values of `anyOf`, or of `oneOf`, whose options must not share any value."""
    schema.alone(keyword, schema.keywords, f"; move it into {keyword}")
    places = [schema.inner(keyword, index) for index in range(len(schema[keyword]))]
    options = [_values(place) for place in places]
    if keyword == "oneOf":
        known: dict[tuple[int, int], bool] = {}
        for (_, one), (place, other) in combinations(zip(places, options, strict=True), 2):
            if may_share(one, other, known):
                raise place.error(
                    "no value of an option before it, by its type or by a required constant",
                    "values that may be of both",
                    "; take anyOf",
                )
    return _union(options, schema)


def _array(schema: Subschema) -> Values:
    least, most = schema.counts("minItems", "maxItems")
    if "prefixItems" in schema.keywords:
        return _tuple(schema, least, most)
    if "items" not in schema.keywords:
        raise schema.error("items", "an array of anything", "; add them")
    items = _column(schema.inner("items"))
    return _list(_items(items.language, least, most), items)


def _items(item: Language, least: int, most: int | None) -> Language:
    if most == 0:
        return EMPTY
    more = Concat((COMMA, item))
    items = Concat((item, Repeat(more, max(least - 1, 0), None if most is None else most - 1)))
    return items if least else optional(items)


def _tuple(schema: Subschema, least: int, most: int | None) -> Values:
    """Return arrays of one item per schema in `prefixItems`, and no further items."""
    num_items = len(schema["prefixItems"])
    if schema.get("items"):
        raise schema.inner("items").error("no items beside prefixItems", "some", "; leave them out")
    expected = f"{num_items} items, as many as prefixItems"
    if num_items < least:
        raise schema.error(expected, f"{least} at least")
    if most is not None and num_items > most:
        raise schema.error(expected, f"{most} at most")
    options = [_column(schema.inner("prefixItems", index)) for index in range(num_items)]
    first, *others = (option.language for option in options)
    behind = (Concat((COMMA, other)) for other in others)
    return _list(Concat((first, *behind)), _union(options, schema))


def _list(texts: Language, items: Values) -> Values:
    """Return arrays.

    Args:
        texts: Language of what stands between the brackets.
        items: The values of a single item.
    """
    return Values(
        language=Concat((Literal("["), texts, Literal("]"))),
        type=pa.list_(items.type),
        kinds=frozenset({"array"}),
        num_fields=1 + items.num_fields,
        num_levels=1 + items.num_levels,
    )


def _joined(parts: Sequence[Subschema], schema: Subschema) -> Values:
    """Return objects with the properties of several schemas."""
    for part in parts:
        if part.keywords - OF_TYPE["object"] - {"type"} or part.types() != ["object"]:
            raise part.error(
                f"an object, since {schema.pointer} joins it with others",
                " and ".join(sorted(part.keywords)),
            )
    return _object(parts)


def _map(schema: Subschema) -> Values:
    """Return objects of any names, with values of one schema."""
    keywords = schema.keywords & OF_TYPE["object"]
    schema.alone(
        "additionalProperties", keywords - {"propertyNames", "properties"}, "; name all properties"
    )
    items = _column(schema.inner("additionalProperties"))
    name = any_string(schema.notation)
    if "propertyNames" in keywords:
        place = schema.inner("propertyNames")
        name = _values(place)
        if name.type != pa.string() or name.is_nullable:
            raise place.error("names that are text", name.type, "; take names without format")
    member = Concat((name.language, Literal(":"), items.language))
    return Values(
        language=Concat((Literal("{"), _items(member, 0, None), Literal("}"))),
        type=pa.map_(pa.string(), items.type),
        kinds=frozenset({"object"}),
        num_fields=2 + items.num_fields,
        num_levels=1 + items.num_levels,
    )


def _object(parts: Sequence[Subschema]) -> Values:
    (only, *others) = parts
    has_names = others or only.get("properties")
    if not has_names and isinstance(only.get("additionalProperties"), Mapping):
        return _map(only)
    properties: dict[str, Values] = {}
    written: set[str] = set()
    for part in parts:
        for name in part.get("properties", ()):
            place = part.inner("properties", name)
            values = _column(place)
            elsewhere = properties.setdefault(name, values)
            if elsewhere.type != values.type or not is_same(elsewhere.language, values.language):
                raise place.error("what it is elsewhere", "another schema", "; write it once")
            if _is_always_written(place, values):
                written.add(name)
    for part in parts:
        _check_additional(part, properties)
        written |= _required(part, properties)
    if not properties:
        raise parts[-1].error("properties, each of which becomes a field", "none", "; add them")
    notation = parts[0].notation
    members = [
        (_member(notation.name(name), properties[name]), name in written)
        for name in notation.ordered(properties)
    ]
    return Values(
        language=Concat((Literal("{"), _members(members), Literal("}"))),
        type=pa.struct([(name, values.type) for name, values in properties.items()]),
        kinds=frozenset({"object"}),
        num_fields=1 + sum(values.num_fields for values in properties.values()),
        num_levels=1 + max(values.num_levels for values in properties.values()),
        required={name: properties[name] for name in properties if name in written},
    )


def _is_always_written(place: Subschema, values: Values) -> bool:
    """Return whether null could not stand for the property where a text leaves it out.

    Left out means the default. So where there is one, the text says it, unless it is null.
    """
    defaults = [part["default"] for part in place.parts() if "default" in part.schema]
    return bool(defaults) and not (defaults[-1] is None and values.is_nullable)


def _check_additional(schema: Subschema, properties: Mapping[str, Values]) -> None:
    """Refuse a schema for additional properties, or `false` where joined schemas have others."""
    additional = schema.get("additionalProperties", True)
    own = schema.get("properties", {})
    if "propertyNames" in schema.keywords:
        raise schema.inner("propertyNames").error(
            "names beside a schema in additionalProperties", "named properties", "; leave it out"
        )
    if not isinstance(additional, bool):
        raise schema.inner("additionalProperties").error(
            "false beside properties, since a field has one name",
            "a schema",
            "; make one of them an object of its own",
        )
    if not additional and properties.keys() - own.keys():
        raise schema.inner("additionalProperties").error(
            "no false in a schema that others are joined with", "false", "; leave it out"
        )


def _required(schema: Subschema, properties: Mapping[str, Values]) -> set[str]:
    required = schema.get("required", [])
    for index, name in enumerate(required):
        if name not in properties:
            raise schema.inner("required", index).error(
                "the name of a property", name, nearest(name, properties)
            )
    return set(required)


def _member(name: str, values: Values) -> Language:
    return Concat((Literal(f"{name}:"), values.language))


def _members(members: Sequence[tuple[Language, bool]]) -> Language:
    """Return members separated by commas; those that are not required may be missing."""
    anchor = next((i for i, (_, is_required) in enumerate(members) if is_required), None)
    if anchor is None:
        return optional(_some([(member, _behind(member, False)) for member, _ in members]))
    before = (optional(Concat((member, COMMA))) for member, _ in members[:anchor])
    after = (_behind(member, is_required) for member, is_required in members[anchor + 1 :])
    return Concat((*before, members[anchor][0], *after))


def _behind(member: Language, is_required: bool) -> Language:
    """Return a member as it follows others, after a comma."""
    behind = Concat((COMMA, member))
    return behind if is_required else optional(behind)


def _some(members: Sequence[tuple[Language, Language]]) -> Language:
    """Return sequences of at least one member, as a tree of n log n members, not n squared.

    Args:
        members: Each member in two forms: as the first one, and as one that may follow others.
    """
    if len(members) == 1:
        return members[0][0]
    first, second = members[: len(members) // 2], members[len(members) // 2 :]
    return OneOf((Concat((_some(first), *(behind for _, behind in second))), _some(second)))


_OF_TYPE: dict[str, Callable[[Subschema], Values]] = {
    "string": string,
    "integer": integer,
    "number": number,
    "boolean": lambda _: BOOLEAN,
    "null": lambda _: NULL,
    "array": _array,
    "object": lambda schema: _object([schema]),
}
