"""The JSON Schema of a Pydantic class, with what Pydantic itself leaves out of it.

This module is imported only for a class of Pydantic, as Pydantic may not be installed.
"""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from beam_gemma.errors import OptionsError

WHOLE_NAME = "^(0|-?[1-9][0-9]{0,17})$"
"""Names of properties that are whole numbers."""
_KEYWORDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
}
"""JSON Schema's keywords for what restricts a decimal."""


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema of a Pydantic class.

    Raises:
        OptionsError: the class has a type that JSON Schema cannot describe.
    """
    return model.model_json_schema(schema_generator=_Generator)


class _Generator(GenerateJsonSchema):
    """Writes schemas whose values Pydantic takes, where its own ones do not say enough."""

    def field_is_required(self, field: Any, *args: Any, **options: Any) -> bool:
        """A field is always written, unless it is None where it is left out.

        A column has null there, which the class might not take. Defaults that a function makes
        stand nowhere in the schema.
        """
        is_required = super().field_is_required(field, *args, **options)
        return is_required or field["schema"].get("default", ...) is not None

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        """A decimal is a number; Pydantic's own schema leaves out its numbers of digits."""
        found = {key: float(schema[name]) for name, key in _KEYWORDS.items() if name in schema}
        digits, places = schema.get("max_digits"), schema.get("decimal_places")
        if digits is not None and places is None:
            raise _refusal("decimal_places beside max_digits", "none", "; set both")
        if places is not None and "multipleOf" in found:
            raise _refusal("one of multiple_of and decimal_places", "both", "; set one")
        if places is not None:
            found["multipleOf"] = 10**-places
        if digits is not None:
            limit = 10.0 ** (digits - places)
            found["exclusiveMinimum"] = max(-limit, found.get("exclusiveMinimum", -limit))
            found["exclusiveMaximum"] = min(limit, found.get("exclusiveMaximum", limit))
        return {"type": "number", **found}

    def dict_schema(self, schema: Any) -> JsonSchemaValue:
        """Names of a dict's items are texts of its keys; Pydantic leaves out those of numbers."""
        found = super().dict_schema(schema)
        keys = self.generate_inner(schema["keys_schema"]) if "keys_schema" in schema else {}
        patterns = found.pop("patternProperties", {})
        for pattern, items in patterns.items():
            found |= {"additionalProperties": items, "propertyNames": {"pattern": pattern}}
        if keys.get("type") == "integer" and not keys.keys() - {"type", "title"}:
            found["propertyNames"] = {"pattern": WHOLE_NAME}
        elif keys.get("type", "string") != "string":
            raise _refusal("keys of a dict that are text or whole numbers", keys["type"])
        return found

    def datetime_schema(self, schema: Any) -> JsonSchemaValue:
        """A point in time has a zone."""
        if schema.get("tz_constraint") == "naive":
            raise _refusal("times in a zone", "NaiveDatetime", "; take datetime")
        return super().datetime_schema(schema)


def _refusal(expected: str, got: str, remedy: str = "") -> OptionsError:
    return OptionsError(f"json_schema: expected {expected}, got {got}{remedy}")
