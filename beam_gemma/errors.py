"""Exceptions that the project raises on purpose.

    BeamGemmaError
    ├── ConfigError           a model architecture that is not supported or contradicts itself
    ├── OptionsError          a flag, argument or setting of a job
    ├── CheckpointError       a checkpoint that cannot be read in full
    ├── ArtifactError         a model folder that is damaged, missing or of another format
    ├── StorageError          a file of a job that cannot be written, or has changed
    ├── DeviceError           a device that has no memory left, or fails; maybe due to the step
    ├── EngineError           a stopped engine; no single row is at fault
    ├── BalanceError          rows lost or duplicated between reading and writing
    ├── FailuresError         more failed rows than allowed
    ├── BudgetError           a spent token budget; the job can be resumed
    └── RecordError           a row that fails; the only error stored as that row's `error`
        └── PromptTooLongError

A message is one sentence: faulty item, expected value, actual value, then the remedy.
"""

import difflib
from collections.abc import Iterable


class BeamGemmaError(Exception):
    """Base of all errors of the project.

    Example:
        >>> try:
        ...     Limits(gpu_memory_utilization=2.0)
        ... except BeamGemmaError as error:
        ...     print(error)
        gpu_memory_utilization: expected above 0 and at most 1, got 2.0
    """


class ConfigError(BeamGemmaError):
    """A model architecture is not supported or contradicts itself."""


class OptionsError(BeamGemmaError):
    """A flag, argument or setting of a job is wrong."""


class CheckpointError(BeamGemmaError):
    """A checkpoint cannot be read in full."""


class ArtifactError(BeamGemmaError):
    """A model folder is damaged, missing or of another format."""


class StorageError(BeamGemmaError):
    """A file of a job cannot be written, or has changed since it was written."""


class DeviceError(BeamGemmaError):
    """A device has no memory for a step, or failed; the step may be the cause."""


class EngineError(BeamGemmaError):
    """The engine stopped, and no single row is at fault."""


class BudgetError(BeamGemmaError):
    """The token budget of a job is spent; finished rows are kept and the job can be resumed."""


class BalanceError(BeamGemmaError):
    """Rows were lost or duplicated between reading and writing."""


class FailuresError(BeamGemmaError):
    """More rows of a job failed than allowed."""


class RecordError(BeamGemmaError):
    """One row cannot be processed; it gets this message as its `error`."""


class PromptTooLongError(RecordError):
    """The prompt of one row exceeds the model's or the requested limit."""


def one_line(error: BaseException) -> str:
    """Return the type and message of another library's error, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
