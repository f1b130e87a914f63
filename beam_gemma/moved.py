"""Import paths of version 0.7, which work for one version more with a DeprecationWarning.

Until 0.7 `beam_gemma` was one flat folder. The modules that pipelines imported public classes from
are found under their old names by an importer. A wing that has the name of an old module, and a
module that has renamed a class, look the class up here.

>>> import warnings
>>> with warnings.catch_warnings(record=True) as caught:
...     from beam_gemma.sampling import SamplingParams
>>> SamplingParams.__module__
'beam_gemma.engine.sampling'
"""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "beam_gemma.embed": "beam_gemma.tasks.embed",
    "beam_gemma.generate": "beam_gemma.tasks.generate",
    "beam_gemma.handlers": "beam_gemma.inference.handlers",
    "beam_gemma.limits": "beam_gemma.runtime.limits",
    "beam_gemma.policy": "beam_gemma.tasks.moderate",
    "beam_gemma.questions": "beam_gemma.tasks.questions",
    "beam_gemma.sampling": "beam_gemma.engine.sampling",
    "beam_gemma.text_embeddings": "beam_gemma.inference.ml_transform",
    "beam_gemma.text_encoder": "beam_gemma.tasks.text_encoder",
    "beam_gemma.transforms": "beam_gemma.inference.transforms",
    "beam_gemma.write_table": "beam_gemma.jobs.write_table",
}
"""Modules of 0.7 that held public classes, and where each is now."""
CLASSES = {
    ("beam_gemma.inference.handlers", "GemmaModelHandler"): "GemmaGenerateModelHandler",
    ("beam_gemma.structured", "StructuredOutput"): "StructuredOutput",
    ("beam_gemma.tables", "ReadTable"): "ReadTable",
}
"""Public classes that have another name now, or whose module's name a wing has taken, and the name
of each in `beam_gemma`."""


class _OldPaths(MetaPathFinder, Loader):
    """Imports a module under its old name."""

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MODULES[module.__name__]
        _warn(old, new, stacklevel=3)
        module.__getattr__ = lambda name: getattr(  # type: ignore[method-assign]
            importlib.import_module(new), name
        )


def install() -> None:
    """Make the old modules importable."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())


def attribute(module: str, name: str) -> Any:
    """Return a class under the name that it had in a module of 0.7.

    Raises:
        AttributeError: the module held no public class of this name.
    """
    if (new := CLASSES.get((module, name))) is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", f"beam_gemma.{new}", stacklevel=4)
    return getattr(importlib.import_module("beam_gemma"), new)


def _warn(old: str, new: str, *, stacklevel: int) -> None:
    warnings.warn(
        f"{old}: expected {new}, got the name of version 0.7, which goes with the next version",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
