"""Compile a JSON Schema to the regular language of its valid texts, and to an Arrow type.

The texts of a schema are compact JSON, `{"a":1,"b":[1,2]}`, with the properties in the order of
the schema and no others. Each such text is valid, but some valid values have no such text. A schema
that decoding cannot enforce, or that has no single Arrow type, is refused with the faulty place.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import pyarrow as pa

from beam_gemma.errors import OptionsError, nearest
from beam_gemma.structured.grammar import EMPTY, Concat, Language, Literal, OneOf, Repeat, optional
from beam_gemma.structured.json_scalars import BOOLEAN, NULL, constants, integer, number, string
from beam_gemma.structured.json_values import Values, arrow_value, json_text, may_share, union
from beam_gemma.structured.schema_node import OF_TYPE, Subschema, checked

COMMA = Literal(",")
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


def compile_schema(schema: Mapping[str, Any] | type) -> JsonSchema:
    """Compile a JSON Schema, or a class with `model_json_schema()` like Pydantic's.

    Raises:
        OptionsError: the schema is invalid or cannot be enforced; the message names the place.
    """
    values = _column(checked(json_schema_of(schema)))
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
    return schema.model_json_schema()


def _column(schema: Subschema) -> Values:
    """Return the values of a place that becomes a column, a field or the items of a list."""
    values = _values(schema)
    if pa.types.is_null(values.type):
        raise schema.error("a type with values", "nothing but null", "; leave it out")
    return values


def _values(schema: Subschema) -> Values:
    parts = schema.parts()
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
        for (_, one), (place, other) in combinations(zip(places, options, strict=True), 2):
            if may_share(one, other):
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
    return _list(_items(items.language, least, most), items.type)


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
    return _list(Concat((first, *behind)), _union(options, schema).type)


def _list(items: Language, item_type: pa.DataType) -> Values:
    return Values(
        language=Concat((Literal("["), items, Literal("]"))),
        type=pa.list_(item_type),
        kinds=frozenset({"array"}),
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


def _object(parts: Sequence[Subschema]) -> Values:
    properties: dict[str, Values] = {}
    for part in parts:
        for name in part.get("properties", ()):
            place = part.inner("properties", name)
            values = _column(place)
            if properties.setdefault(name, values) != values:
                raise place.error("what it is elsewhere", "another schema", "; write it once")
    required: set[str] = set()
    for part in parts:
        _check_additional(part, properties)
        required |= _required(part, properties)
    if not properties:
        raise parts[-1].error("properties, each of which becomes a field", "none", "; add them")
    members = [(_member(name, values), name in required) for name, values in properties.items()]
    return Values(
        language=Concat((Literal("{"), _members(members), Literal("}"))),
        type=pa.struct([(name, values.type) for name, values in properties.items()]),
        kinds=frozenset({"object"}),
        required={name: properties[name] for name in properties if name in required},
    )


def _check_additional(schema: Subschema, properties: Mapping[str, Values]) -> None:
    """Refuse a schema for additional properties, or `false` where joined schemas have others."""
    additional = schema.get("additionalProperties", True)
    own = schema.get("properties", {})
    if not isinstance(additional, bool):
        raise schema.inner("additionalProperties").error(
            "false, since a field has one name", "a schema", "; take an array of names and values"
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
    return Concat((Literal(f"{json_text(name)}:"), values.language))


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
