"""Schemas within a JSON Schema: their places, keywords and references."""

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator, SchemaError

from beam_gemma.errors import OptionsError, nearest

_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
OF_TYPE = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "boolean": set(),
    "null": set(),
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
"""Keywords that restrict the values of a type, by type."""
OF_ANY = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
ANNOTATIONS = {
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default",
    "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
}  # fmt: skip
"""Keywords that restrict no values; `discriminator` is OpenAPI's, beside `oneOf`."""
KNOWN = OF_ANY.union(ANNOTATIONS, *OF_TYPE.values())


@dataclass(frozen=True, slots=True)
class Subschema:
    """A schema at its place within a root schema, which is a valid JSON Schema."""

    schema: Any
    root: Mapping[str, Any]
    pointer: str = "#"
    trail: tuple[str, ...] = ("#",)
    """References followed to reach this schema, the root first."""

    @property
    def keywords(self) -> frozenset[str]:
        """Keywords that restrict the valid values.

        Raises:
            OptionsError: decoding cannot enforce one of them.
        """
        if not isinstance(self.schema, Mapping):
            raise self.error("a schema that says what is valid", json.dumps(self.schema))
        for keyword in sorted(self.schema.keys() - KNOWN):
            is_real = keyword in Draft202012Validator.VALIDATORS
            raise self.inner(keyword).error(
                "a keyword that decoding can keep to",
                keyword,
                "; leave it out" if is_real else nearest(keyword, KNOWN) or "; leave it out",
            )
        return frozenset(self.schema.keys() - ANNOTATIONS)

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
        return replace(self, schema=schema, pointer=pointer)

    def parts(self) -> list["Subschema"]:
        """Return the schemas that all apply, with `$ref` and `allOf` resolved.

        Raises:
            OptionsError: a reference has no target, or its target contains the reference.
        """
        rest = self.keywords - {"$ref", "allOf"}
        found = []
        if "$ref" in self.schema:
            found += self._target().parts()
        for index in range(len(self.get("allOf", ()))):
            found += self.inner("allOf", index).parts()
        if rest or not found:
            found.append(replace(self, schema={keyword: self[keyword] for keyword in sorted(rest)}))
        return found

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
        return OptionsError(f"json_schema: {self.pointer}: expected {expected}, got {got}{remedy}")

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
        target = Subschema(self.root, self.root, trail=(*self.trail, reference))
        try:
            return target.inner(*(key.replace("~1", "/").replace("~0", "~") for key in keys))
        except (KeyError, TypeError) as error:
            raise place.error(
                "a reference to a part of the schema", reference, "; see its $defs"
            ) from error


def checked(schema: Mapping[str, Any]) -> Subschema:
    """Return the root of a schema after checking it against JSON Schema 2020-12.

    Raises:
        OptionsError: the schema is invalid; the message names the place.
    """
    try:
        text = json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
        root = json.loads(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionsError(
            f"json_schema: expected a JSON Schema, got what JSON does not have: {error}"
        ) from error
    try:
        Draft202012Validator.check_schema(root)
    except SchemaError as error:
        place = Subschema(root, root).inner(*error.absolute_path)
        got = json.dumps(place.schema, ensure_ascii=False)
        remedy = nearest(str(place.schema), OF_TYPE) or f"; {error.message}"
        raise place.error("the shape of JSON Schema 2020-12", got, remedy) from error
    return Subschema(root, root)
