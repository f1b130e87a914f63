"""Schemas within a JSON Schema: their places, their keywords, and where their references lead."""

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
"""The keywords that say which values of a type are valid."""
OF_ANY = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
ANNOTATIONS = {
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default",
    "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
}  # fmt: skip
"""What says nothing of which values are valid; `discriminator` is OpenAPI's, beside `oneOf`."""
KNOWN = OF_ANY.union(ANNOTATIONS, *OF_TYPE.values())


@dataclass(frozen=True, slots=True)
class Subschema:
    """A schema at its place within another, which is checked to be a JSON Schema."""

    schema: Any
    root: Mapping[str, Any]
    pointer: str = "#"
    trail: tuple[str, ...] = ("#",)
    """The references that led here."""

    @property
    def keywords(self) -> frozenset[str]:
        """Which say what is valid.

        Raises:
            OptionsError: there is one that cannot be kept to.
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
        """Return what a keyword says."""
        return self.schema.get(keyword, default)

    def inner(self, *keys: str | int) -> "Subschema":
        """Return what is further within."""
        pointer, schema = self.pointer, self.schema
        for key in keys:
            pointer += "/" + str(key).replace("~", "~0").replace("/", "~1")
            schema = schema[key]
        return replace(self, schema=schema, pointer=pointer)

    def parts(self) -> list["Subschema"]:
        """Return the schemas that must hold together, without `$ref` and `allOf`.

        Raises:
            OptionsError: a reference leads nowhere, or to a schema around it.
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
        """Return the types that values may have; keywords of one type imply it.

        Raises:
            OptionsError: there is no type, or a keyword is of another.
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
            OptionsError: there is another.
        """
        for other in sorted(others - {keyword}):
            raise self.inner(other).error(f"nothing beside {keyword}", other, remedy)

    def counts(self, least: str, most: str) -> tuple[int, int | None]:
        """Return what two keywords say of how many there may be.

        Raises:
            OptionsError: the first is above the second.
        """
        low = int(self.get(least, 0))
        high = None if most not in self.schema else int(self[most])
        if high is not None and low > high:
            raise self.error(f"at most {most} {high}", f"{least} {low}")
        return low, high

    def accepted(self, values: Iterable[Any]) -> list[Any]:
        """Return which values the keywords but `enum` accept; none may be an object or an array."""
        schema = {keyword: said for keyword, said in self.schema.items() if keyword != "enum"}
        checker = Draft202012Validator.FORMAT_CHECKER
        validator = Draft202012Validator(schema, format_checker=checker)
        return [value for value in values if validator.is_valid(value)]

    def error(self, expected: str, got: object, remedy: str = "") -> OptionsError:
        """Return what is wrong at this place."""
        return OptionsError(f"json_schema: {self.pointer}: expected {expected}, got {got}{remedy}")

    def _target(self) -> "Subschema":
        """Return what the reference leads to."""
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
    """Return a schema that has the shape of one.

    Raises:
        OptionsError: it has not; with the place.
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
