"""Values read from JSON have the types of the fields they are for, or the first fault is named."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from beam_gemma.model.field_types import first_fault


@dataclass(frozen=True)
class Inner:
    """A part of another dataclass."""

    size: int


@dataclass(frozen=True)
class Outer:
    """One field of each kind."""

    name: Any = "x"
    count: Any = 3
    scale: Any = 0.5
    inner: Any = Inner(size=1)


def outer(**annotations: Any) -> type:
    """Return `Outer` with the types of some fields."""
    kinds = {"name": str, "count": int, "scale": float, "inner": Inner} | annotations
    return dataclass(frozen=True)(type("Outer", (Outer,), {"__annotations__": kinds}))


@pytest.mark.parametrize(
    ("field", "kind", "right", "wrong", "fault"),
    [
        ("name", str, "", 5, "5 for name"),
        ("name", str | None, None, 5, "5 for name"),
        ("name", Literal["a", "b"], "b", "c", "'c' for name"),
        ("name", Literal["a", "b"], "b", {}, "a dict for name"),
        ("count", int, 0, -1, "-1 for count"),
        ("count", int, 2**63 - 1, 2**63, "a number beyond 64 bits for count"),
        ("count", int, 1, True, "True for count"),
        ("count", int, 1, 1.0, "1.0 for count"),
        ("count", int, 1, "9" * 99, f"'{'9' * 39} for count"),
        ("count", bool, False, 0, "0 for count"),
        ("scale", float, 1, float("nan"), "nan for scale"),
        ("scale", float, -2.5, float("inf"), "inf for scale"),
        ("scale", float, 1e6, 10**400, "a number beyond 64 bits for scale"),
        ("scale", float, 1e6, False, "False for scale"),
        ("inner", Inner, Inner(size=0), Inner(size=None), "None for inner.size"),  # type: ignore[arg-type]
        ("inner", Inner, Inner(size=0), {"size": 0}, "a dict for inner"),
        ("inner", Inner | int, 4, "4", "'4' for inner"),
        ("inner", tuple[int, ...], (), (1, "2"), "'2' for inner[1]"),
        ("inner", tuple[int, ...], (1, 2), [1, 2], "a list for inner"),
        ("inner", tuple[str, Inner], ("a", Inner(size=1)), ("a",), "a tuple for inner"),
        ("inner", tuple[tuple[str, int], ...], (("a", 1),), (("a", 1), ("b", "c")), "inner[1][1]"),
        ("inner", Mapping[str, int], {"a": 1}, {"a": "1"}, "'1' for inner['a']"),
        ("inner", Mapping[str, int], {}, {1: 1}, "1 for inner, a key"),
    ],
)
def test_a_field_of_another_type(field: str, kind: Any, right: Any, wrong: Any, fault: str) -> None:
    of = outer(**{field: kind})
    assert first_fault(of(**{field: right})) is None
    assert fault in str(first_fault(of(**{field: wrong})))
