"""Every error that the project raises on purpose.

    BeamGemmaError
    ├── ConfigError           a model architecture that is not supported or contradicts itself
    ├── OptionsError          a flag, argument or setting of a job
    ├── CheckpointError       a checkpoint that cannot be read in full
    ├── ArtifactError         a model folder that is damaged, missing or of another format
    ├── EngineError           the engine stopped; no row is at fault
    └── RecordError           one row; the only error that ends as that row's `error`
        └── PromptTooLongError

A message is one sentence: the thing at fault, what was expected, what was got, then the remedy.
"""

import difflib
from collections.abc import Iterable


class BeamGemmaError(Exception):
    """Base of all errors of the project."""


class ConfigError(BeamGemmaError):
    """A model architecture is not supported or contradicts itself."""


class OptionsError(BeamGemmaError):
    """A flag, argument or setting of a job is wrong."""


class CheckpointError(BeamGemmaError):
    """A checkpoint cannot be read in full."""


class ArtifactError(BeamGemmaError):
    """A model folder is damaged, missing or of another format."""


class EngineError(BeamGemmaError):
    """The engine stopped, and no single row is at fault."""


class RecordError(BeamGemmaError):
    """One row cannot be processed; it gets this message as its `error`."""


class PromptTooLongError(RecordError):
    """The prompt of one row does not fit the model or the limit that was asked for."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
