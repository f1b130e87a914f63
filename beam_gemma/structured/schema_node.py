"""Schemas within a JSON Schema: their places, keywords and references."""

import difflib
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import unquote

from jsonschema import Draft202012Validator, SchemaError

from beam_gemma.errors import OptionsError, nearest
from beam_gemma.structured.notation import JSON, Notation

T = TypeVar("T")

MAX_LEVELS = 32
"""Maximum schemas within each other, and maximum references followed to reach one."""
MAX_NESTING = 70
"""Maximum objects and arrays within each other in the text of a schema."""
MAX_OBJECTS = 5_000
"""Maximum objects in the text of a schema; jsonschema checks a few thousand of them per second."""
MAX_VALUES = 100_000
"""Maximum values in the text of a schema, constants among them."""
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
OF_TYPE = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "boolean": set(),
    "null": set(),
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties", "propertyNames"},
}
"""Keywords that restrict the values of a type, by type."""
OF_ANY = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
NOTES = frozenset({"default", "nullable"})
"""Keywords that restrict no values, but that say of a place whether it may be left out or null."""
ANNOTATIONS = NOTES | {
    "$schema", "$id", "$comment", "$defs", "$anchor", "$dynamicAnchor", "$vocabulary",
    "definitions", "id", "title", "description", "example", "examples", "deprecated", "readOnly",
    "writeOnly", "discriminator", "propertyOrder", "propertyOrdering", "property_ordering",
    "enumNames", "note", "notes", "tsType", "contentEncoding", "contentMediaType", "contentSchema",
}  # fmt: skip
"""Keywords that restrict no values; some are those of OpenAPI and of form builders."""
FORMER = {"additionalItems", "dependencies", "disallow", "divisibleBy", "extends", "$recursiveRef"}
"""Keywords of earlier drafts that restrict values."""
SHORTEST_START = 3
"""Minimum letters by which the start of a keyword is taken for it, as in `min`."""
KNOWN = OF_ANY.union(*OF_TYPE.values())
"""Keywords that decoding can enforce."""


@dataclass(frozen=True, slots=True)
class Subschema:
    """A schema at its place within a root schema, which is a valid JSON Schema."""

    schema: Any
    root: Mapping[str, Any]
    pointer: str = "#"
    trail: tuple[str, ...] = ("#",)
    """References followed to reach this schema, the root first."""
    num_levels: int = 0
    """Number of schemas that this one is within; a reference is at the level of its target."""
    known: dict[tuple[str, str], Any] = field(default_factory=dict, compare=False, repr=False)
    """What `once` has made of schemas of this root."""
    notation: Notation = JSON
    """How texts write the values."""
    subject: str = "json_schema"
    """What messages call the root."""

    @property
    def keywords(self) -> frozenset[str]:
        """Keywords that restrict the valid values.

        Raises:
            OptionsError: decoding cannot enforce one of them.
        """
        if not isinstance(self.schema, Mapping):
            raise self.error("a schema that says what is valid", json.dumps(self.schema))
        for keyword in sorted(self.schema.keys() - KNOWN - ANNOTATIONS):
            is_real = keyword in FORMER or keyword in Draft202012Validator.VALIDATORS
            remedy = "; leave it out" if is_real else _meant(keyword)
            if remedy:
                place = self.inner(keyword)
                raise place.error("a keyword that decoding can keep to", keyword, remedy)
        return frozenset(KNOWN & self.schema.keys())

    def __getitem__(self, keyword: str) -> Any:
        return self.schema[keyword]

    def get(self, keyword: str, default: Any = None) -> Any:
        """Return the value of a keyword."""
        return self.schema.get(keyword, default)

    def inner(self, *keys: str | int) -> "Subschema":
        """Return the part of this schema at a path of keys."""
        pointer, schema = self.pointer, self.schema
        for key in keys:
            pointer += "/" + str(key).replace("~", "~0").replace("/", "~1")
            schema = schema[key]
        return replace(self, schema=schema, pointer=pointer, num_levels=self.num_levels + 1)

    def once(self, make: "Callable[[Subschema], T]") -> T:
        """Return what a function makes of this schema, made once for all references to it."""
        key = (make.__name__, self.pointer)
        if key not in self.known:
            self.known[key] = make(self)
        return self.known[key]

    def parts(self) -> list["Subschema"]:
        """Return the schemas that all apply, each once, with `$ref` and `allOf` resolved.

        Raises:
            OptionsError: a reference has no target, or its target contains the reference, or the
                schema is within too many others.
        """
        return self.once(Subschema._parts)

    def _parts(self) -> list["Subschema"]:
        for got, what in (
            (self.num_levels, "schemas within each other"),
            (len(self.trail) - 1, "references that lead to each other"),
        ):
            if got > MAX_LEVELS:
                raise self.error(f"at most {MAX_LEVELS} {what}", "more", "; take fewer levels")
        rest = (self.keywords - {"$ref", "allOf"}) | (NOTES & self.schema.keys())
        found = []
        if "$ref" in self.schema:
            found += self._target().parts()
        for index in range(len(self.get("allOf", ()))):
            found += self.inner("allOf", index).parts()
        if rest or not found:
            found.append(replace(self, schema={keyword: self[keyword] for keyword in sorted(rest)}))
        return list({part.pointer: part for part in found}.values())

    def types(self) -> list[str]:
        """Return the types of the values; without `type`, keywords of a single type imply it.

        Raises:
            OptionsError: there is no type, or a keyword belongs to another type.
        """
        keywords = self.keywords - OF_ANY
        if "type" in self.schema:
            types = self["type"] if isinstance(self["type"], list) else [self["type"]]
        else:
            types = [kind for kind in OF_TYPE if kind != "integer" and keywords & OF_TYPE[kind]]
            if len(types) != 1:
                raise self.error("a type", " and ".join(sorted(keywords)) or "none", "; add one")
        for keyword in sorted(keywords.difference(*(OF_TYPE[kind] for kind in types))):
            raise self.inner(keyword).error(
                f"a keyword of {' or '.join(types)}", keyword, "; leave it out or change the type"
            )
        return types

    def alone(self, keyword: str, others: Set[str], remedy: str = "; leave it out") -> None:
        """Refuse all keywords but one.

        Raises:
            OptionsError: there is another keyword.
        """
        for other in sorted(others - {keyword}):
            raise self.inner(other).error(f"nothing beside {keyword}", other, remedy)

    def counts(self, least: str, most: str) -> tuple[int, int | None]:
        """Return the minimum and maximum count that two keywords give; None means no maximum.

        Raises:
            OptionsError: the minimum is above the maximum.
        """
        low = int(self.get(least, 0))
        high = None if most not in self.schema else int(self[most])
        if high is not None and low > high:
            raise self.error(f"at most {most} {high}", f"{least} {low}")
        return low, high

    def accepted(self, values: Iterable[Any]) -> list[Any]:
        """Return the values, all scalars, that the keywords other than `enum` accept."""
        schema = {keyword: said for keyword, said in self.schema.items() if keyword != "enum"}
        checker = Draft202012Validator.FORMAT_CHECKER
        validator = Draft202012Validator(schema, format_checker=checker)
        return [value for value in values if validator.is_valid(value)]

    def error(self, expected: str, got: object, remedy: str = "") -> OptionsError:
        """Return an error that names this place."""
        return OptionsError(f"{self.place}: expected {expected}, got {got}{remedy}")

    @property
    def place(self) -> str:
        """This place, as messages name it."""
        return f"{self.subject}: {self.pointer}"

    def _target(self) -> "Subschema":
        """Return the target of `$ref`."""
        reference, place = self["$ref"], self.inner("$ref")
        head, *keys = unquote(reference).split("/")
        if head != "#":
            raise place.error("a reference within the same schema, as #/$defs/NAME", reference)
        if reference in self.trail:
            raise place.error(
                "a schema that does not hold itself",
                f"a reference to {reference} within it",
                "; write its levels out",
            )
        root = replace(self, schema=self.root, pointer="#", trail=(*self.trail, reference))
        keys = [key.replace("~1", "/").replace("~0", "~") for key in keys]
        try:
            target = replace(root.inner(*keys), num_levels=self.num_levels)
        except (LookupError, TypeError) as error:
            raise place.error(
                "a reference to a part of the schema", reference, "; see its $defs"
            ) from error
        if not _are_schemas(keys):
            target.once(_check_shape)
        return target


@functools.cache
def _meant(keyword: str) -> str:
    """Return a hint at the keyword that an unknown one may be meant for; empty if there is none."""
    if keyword.lower().startswith("x-"):
        return ""
    names = {_plain(name): name for name in KNOWN | Draft202012Validator.VALIDATORS.keys()}
    plain = _plain(keyword)
    found = difflib.get_close_matches(plain, names, n=1, cutoff=0.75)
    if len(plain) >= SHORTEST_START:
        found += sorted(name for name in names if name.startswith(plain))
    return f"; did you mean {names[found[0]]}?" if found else ""


def _plain(keyword: str) -> str:
    return keyword.lower().replace("_", "").replace("$", "")


def _are_schemas(keys: Iterable[str]) -> bool:
    """Return whether all on a path is checked with the root; a default, for one, is not."""
    rest = iter(keys)
    return all(
        next(rest, None) is not None if key in {"$defs", "definitions", "properties"}
        else key == "items"
        for key in rest
    )  # fmt: skip


def _check_shape(schema: Subschema) -> None:
    """Check a schema against JSON Schema 2020-12."""
    try:
        Draft202012Validator.check_schema(schema.schema)
    except SchemaError as error:
        place = schema.inner(*error.absolute_path)
        got = json.dumps(place.schema, ensure_ascii=False)
        remedy = nearest(str(place.schema), OF_TYPE) or f"; {error.message}"
        raise place.error("the shape of JSON Schema 2020-12", got, remedy) from error


def _check_size(schema: object, subject: str) -> None:
    """Refuse a schema whose text would be too large to be checked, before it is written out."""
    num_objects = num_values = 0
    waiting = [(schema, 0)]
    while waiting:
        value, level = waiting.pop()
        if isinstance(value, Mapping):
            num_objects += 1
            waiting += [(inner, level + 1) for inner in value.values()]
        elif isinstance(value, list | tuple):
            waiting += [(inner, level + 1) for inner in value]
        num_values += 1
        for limit, got, what in (
            (MAX_NESTING, level, "levels of JSON within each other"),
            (MAX_OBJECTS, num_objects, "objects"),
            (MAX_VALUES, num_values, "values"),
        ):
            if got > limit:
                raise OptionsError(
                    f"{subject}: expected at most {limit:,} {what}, got more; take a smaller one"
                )


def checked(
    schema: Mapping[str, Any], *, notation: Notation = JSON, subject: str = "json_schema"
) -> Subschema:
    """Return the root of a schema after checking it against JSON Schema 2020-12.

    Args:
        schema: The schema.
        notation: How texts write its values.
        subject: What messages call the schema.

    Raises:
        OptionsError: the schema is invalid; the message names the place.
    """
    _check_size(schema, subject)
    try:
        text = json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
        root = json.loads(text.encode())
    except (TypeError, ValueError) as error:
        raise OptionsError(
            f"{subject}: expected a JSON Schema, got what JSON does not have: {error}"
        ) from error
    found = Subschema(root, root, notation=notation, subject=subject)
    _check_shape(found)
    return found
