"""Every error that the project raises on purpose.

    BeamGemmaError
    ├── ConfigError           a model architecture that is not supported or contradicts itself
    ├── OptionsError          a flag, argument or setting of a job
    ├── CheckpointError       a checkpoint that cannot be read in full
    ├── ArtifactError         a model folder that is damaged, missing or of another format
    ├── StorageError          a file of a job that cannot be written, or is not what it was
    ├── DeviceError           a device that has no room, or fails; the step may be at fault
    ├── EngineError           the engine stopped; no row is at fault
    ├── BalanceError          rows were lost or doubled on the way
    ├── FailuresError         more rows failed than a job may have
    ├── BudgetError           the tokens that a job may cost are spent; it can go on
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


class StorageError(BeamGemmaError):
    """A file of a job cannot be written, or is not what was written."""


class DeviceError(BeamGemmaError):
    """A device has no room for a step, or failed; the step may be at fault."""


class EngineError(BeamGemmaError):
    """The engine stopped, and no single row is at fault."""


class BudgetError(BeamGemmaError):
    """The tokens that a job may cost are spent; what is done is kept, and the job can go on."""


class BalanceError(BeamGemmaError):
    """Rows were lost or doubled between reading and writing."""


class FailuresError(BeamGemmaError):
    """More rows of a job failed than may."""


class RecordError(BeamGemmaError):
    """One row cannot be processed; it gets this message as its `error`."""


class PromptTooLongError(RecordError):
    """The prompt of one row does not fit the model or the limit that was asked for."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
