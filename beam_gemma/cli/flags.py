"""Flags that tasks share, with complete help; Beam's are passed on, unknown ones refused."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import (
    DirectOptions,
    PipelineOptions,
    StandardOptions,
    _BeamArgumentParser,
)

from beam_gemma.errors import OptionsError, nearest

LOCAL_RUNNER = "DirectRunner"
NO_PRISM = "--prism_location=/nonexistent"
"""Without it, DirectRunner downloads another engine at each run and, failing that, falls back."""
BEAM_FLAGS = """
Any other flag goes to Beam, such as --runner NAME (default: DirectRunner, in this process),
--direct_running_mode multi_threading, --direct_num_workers N, --project NAME or --region NAME.
"""


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Refuse the flags.

        Raises:
            OptionsError: always.
        """
        raise OptionsError(message)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Take `--flag=--` at its word, where Python 3.11 makes an empty list of it."""
        if action.option_strings and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)


class _BeamFlagParser(FlagParser, _BeamArgumentParser):
    """All flags of Beam."""


def flag_parser(module: str, description: str, examples: str) -> FlagParser:
    """Return the parser of `python -m MODULE`, without flags yet."""
    return FlagParser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"examples:\n{examples}{BEAM_FLAGS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def beam_flag_parser() -> FlagParser:
    """Return the parser of all flags that Beam has."""
    parser = _BeamFlagParser(allow_abbrev=False, add_help=False)
    for group in {str(cls): cls for cls in PipelineOptions.__subclasses__()}.values():
        group._add_argparse_args(parser)
    return parser


def parse(
    parser: FlagParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, PipelineOptions]:
    """Return our flags and Beam's options.

    Raises:
        OptionsError: a flag is unknown, missing, or has a value of a wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    beam_parser = beam_flag_parser()
    # Before anything else: a flag that seems to be missing may only be misspelt.
    _refuse_unknown(argv, [*parser._option_string_actions, *beam_parser._option_string_actions])
    of_job = [argument for argument in argv if _labels_job(argument)]
    flags, rest = parser.parse_known_args([a for a in argv if a not in of_job])
    rest += of_job
    _, stray = beam_parser.parse_known_args(rest)
    if stray:
        raise OptionsError(f"{stray[0]!r}: expected a flag before it, got none")
    options = PipelineOptions(rest)
    if is_local(options) and not any(flag.startswith("--prism_location") for flag in rest):
        options = PipelineOptions([*rest, NO_PRISM])
    return flags, options


def _labels_job(argument: str) -> bool:
    """Return whether a flag labels the job, as launchers of templates do, rather than rows."""
    name, _, value = argument.partition("=")
    try:
        return name == "--labels" and isinstance(json.loads(value), dict)
    except ValueError:
        return False


def _refuse_unknown(argv: Sequence[str], known: Sequence[str]) -> None:
    for argument in argv:
        name = argument.partition("=")[0]
        if re.fullmatch(r"--\S+", name) and name not in known:
            raise OptionsError(f"unknown flag {name}{nearest(name, known)}")


def is_local(options: PipelineOptions) -> bool:
    """Return whether a job runs on this machine, in the engine that comes with Beam."""
    return options.view_as(StandardOptions).runner in (None, LOCAL_RUNNER)


def in_one_process(options: PipelineOptions) -> bool:
    """Return whether a job runs in this process alone."""
    mode = options.view_as(DirectOptions).direct_running_mode
    return is_local(options) and mode != "multi_processing"


def text_of(flag: str, path: str) -> str:
    """Return the text of a file that a flag names, on this machine or on gs://.

    Raises:
        OptionsError: it cannot be read.
    """
    try:
        with FileSystems.open(path) as stream:
            return stream.read().decode()
    except (OSError, ValueError, BeamIOError) as error:
        raise OptionsError(
            f"{flag} {path}: expected a text file that can be read, got an error: {error}"
        ) from error


def words_of(flag: str, text: str, remedy: str) -> tuple[str, ...]:
    """Return words that commas part.

    Raises:
        OptionsError: there is white space around one, which may belong to it or not.
    """
    words = tuple(text.split(","))
    for word in words:
        if word != word.strip():
            raise OptionsError(
                f"{flag}: expected words with a comma and no space between them, got {word!r}; "
                f"{remedy}"
            )
    return words
