"""Private and undocumented parts of Beam; no other module uses them.

Each function says which part it uses, why, and what happens without it. The parts were read in the
Beam version `BEAM_VERSION`. If one is missing, an `OptionsError` names it; nothing falls back
silently. `tests/test_private_parts.py` fails when a part changes.
"""

import argparse
import importlib
import re
from collections.abc import Sequence
from importlib.metadata import version
from operator import attrgetter
from typing import Any, TypeVar

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_gemma.errors import OptionsError

BEAM_VERSION = "2.77.0"
"""The Beam version in which the parts were read."""
NO_PRISM = "--prism_location=/nonexistent"
"""A flag that rules out Prism, Beam's engine that DirectRunner otherwise downloads."""
ERROR_OF_OURS = re.compile(r"^beam_gemma\.errors\.\w+: (.*)$", re.MULTILINE)
"""The last line of a traceback, for an error of this project."""
_OPTIONS = "apache_beam.options.pipeline_options"
_TRANSFORMS = "apache_beam.ml.transforms.base"
_WORKERS = "apache_beam.runners.portability.fn_api_runner.worker_handlers"
ParserT = TypeVar("ParserT", bound=argparse.ArgumentParser)


def send_whole() -> None:
    """Make workers of Beam's local runner send only whole elements; call when building a pipeline.

    By default, they flush their buffers every second, even while another thread is encoding an
    element (seen in Beam 2.77, with `--direct_running_mode=multi_threading`), and data added during
    the flush is lost. Bounded jobs do not need timed flushes; other flushes send whole elements.

    Sets `worker_handlers.DATA_BUFFER_TIME_LIMIT_MS`, which each worker reads when it starts.

    Raises:
        OptionsError: Beam lacks the part, so that elements could be lost.
    """
    _part(_WORKERS, "DATA_BUFFER_TIME_LIMIT_MS")
    workers: Any = importlib.import_module(_WORKERS)
    workers.DATA_BUFFER_TIME_LIMIT_MS = 0


def without_prism(flags: Sequence[str]) -> PipelineOptions:
    """Return the options of a run on this machine that does not look for Prism.

    Without `NO_PRISM`, DirectRunner downloads Prism at each run, and runs the job in this process
    only if that fails. With a path that does not exist, it fails at once and nothing is downloaded.

    Relies on this fallback, and uses the flag `--prism_location` of `PrismRunnerOptions`.

    Raises:
        OptionsError: Beam lacks the flag, which it would ignore and then download Prism.
    """
    options = PipelineOptions([NO_PRISM]).view_as(_part(_OPTIONS, "PrismRunnerOptions"))
    if not hasattr(options, "prism_location"):
        raise _missing(f"{_OPTIONS}.PrismRunnerOptions.prism_location", "no such flag")
    return PipelineOptions([*flags, NO_PRISM])


def parser_of_all_flags(parser_class: type[ParserT]) -> ParserT:
    """Return a parser with the flags of all of Beam's groups of options.

    Uses `_BeamArgumentParser`, whose `add_value_provider_argument` some groups call, and
    `PipelineOptions._add_argparse_args`, which adds a group's flags.

    Args:
        parser_class: The class whose methods the parser has besides those of Beam's parser.

    Raises:
        OptionsError: Beam lacks a part, so that its flags would be unknown.
    """
    _part(_OPTIONS, "PipelineOptions._add_argparse_args")
    both = type(parser_class.__name__, (parser_class, _part(_OPTIONS, "_BeamArgumentParser")), {})
    parser: Any = both(allow_abbrev=False, add_help=False)
    for group in {str(cls): cls for cls in PipelineOptions.__subclasses__()}.values():
        group._add_argparse_args(parser)
    return parser


def text_embedding_handler(manager: Any) -> Any:
    """Return the ModelHandler with which MLTransform embeds the text columns of dicts.

    Uses `_TextEmbeddingHandler`, which Beam's own embedding transforms pass to RunInference.

    Args:
        manager: The EmbeddingsManager whose model embeds the texts.

    Raises:
        OptionsError: Beam lacks the part, so that no text could be embedded.
    """
    return _part(_TRANSFORMS, "_TextEmbeddingHandler")(manager)


def row_fields(element_type: Any) -> tuple[tuple[str, Any], ...] | None:
    """Return the names and types of an element's fields, or None if the elements are not Rows.

    Uses `RowTypeConstraint._fields`; no public attribute has the names.

    Args:
        element_type: The element type of a PCollection.

    Raises:
        OptionsError: Beam lacks the part, so that a result could take a field's name.
    """
    row = RowTypeConstraint.from_user_type(element_type) or element_type
    if not isinstance(row, RowTypeConstraint):
        return None
    try:
        return row._fields
    except AttributeError as error:
        raise _missing("apache_beam.typehints.row_type.RowTypeConstraint._fields", error) from error


def sentence_of_worker(error: Exception) -> str | None:
    """Return the message of our error that failed a worker, or None if there is none.

    Relies on the text of the RuntimeError that Beam's runners raise for a failed worker. It holds
    the worker's traceback, which ends with the error's class, its message and the step's name. If
    it does not, this returns None, and `cli/run.py` raises the RuntimeError with its whole text.

    Args:
        error: The error that a runner raised.
    """
    sentences: list[str] = ERROR_OF_OURS.findall(str(error))
    return sentences[-1] if sentences else None


def _part(module: str, name: str) -> Any:
    """Return a part of one of Beam's modules.

    Raises:
        OptionsError: Beam lacks the part.
    """
    try:
        return attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise _missing(f"{module}.{name}", error) from error


def _missing(part: str, reason: object) -> OptionsError:
    return OptionsError(
        f"apache-beam {version('apache-beam')}: expected {part} as in version {BEAM_VERSION}, "
        f"got: {reason}; install apache-beam=={BEAM_VERSION}"
    )
