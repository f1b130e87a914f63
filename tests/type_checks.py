"""Makes the type checks of a test run cheap; importing it does so.

pytest's option `--jaxtyping-packages` has every function of `beam_gemma` check its arguments and
its result. jaxtyping also notes the sizes of named dimensions at each call, which takes most of
the time of a test that runs the engine. A function whose annotations name no dimension is checked
by beartype alone, which finds the same faults.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ForwardRef, get_args

import jaxtyping

with_dimensions = jaxtyping.jaxtyped


def needs_dimensions(annotation: Any) -> bool:
    """Return whether an annotation holds an array with dimensions, or a name not known yet."""
    if isinstance(annotation, str | ForwardRef):
        return True
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    parts = annotation if isinstance(annotation, list | tuple) else get_args(annotation)
    return any(map(needs_dimensions, parts))


def checked(target: Any, *, typechecker: Callable[[Any], Any]) -> Any:
    """Return a function, or a class with an `__init__`, that checks its arguments."""
    if isinstance(target, type):
        # jaxtyping checks the fields of dataclasses; methods are decorated one by one.
        if dataclasses.is_dataclass(target):
            target.__init__ = checked(target.__init__, typechecker=typechecker)  # type: ignore[misc]
        return target
    annotations = getattr(target, "__annotations__", None)
    if annotations is None or any(map(needs_dimensions, annotations.values())):
        return with_dimensions(target, typechecker=typechecker)
    return typechecker(target)


def jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the decorator that jaxtyping puts on each function and class."""
    return lambda target: checked(target, typechecker=typechecker)


jaxtyping.jaxtyped = jaxtyped
