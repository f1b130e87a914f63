"""Flag parsing of all tasks: Beam's flags are passed on, unknown flags are rejected."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions

from beam_gemma.beam_internals import parser_of_all_flags, without_prism
from beam_gemma.errors import OptionsError, nearest

LOCAL_RUNNER = "DirectRunner"
BEAM_FLAGS = """
Any other flag is passed to Beam, such as --runner NAME (default: DirectRunner,
in this process), --direct_running_mode multi_threading, --direct_num_workers N,
--project NAME or --region NAME.

BOOL is true or false. A flag with [BOOL] and no value is true.
"""
ArgumentGroup: TypeAlias = argparse._ArgumentGroup
"""What `add_argument_group` returns; argparse has no public name for it."""


class FlagParser(argparse.ArgumentParser):
    """An argument parser that raises `OptionsError`.

    It uses private parts of argparse as they are in Python 3.11: `_get_values`, `_get_value` and
    `_option_string_actions`; `ArgumentGroup` names one more. Without one of them, a command ends
    with an AttributeError. `tests/test_private_parts.py` fails when a part changes.
    """

    def error(self, message: str) -> NoReturn:
        """Raise the parser's message as an `OptionsError`.

        Raises:
            OptionsError: always.
        """
        raise OptionsError(message)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Keep the value of `--flag=--`, which Python 3.11 turns into an empty list."""
        if action.option_strings and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def names(self) -> list[str]:
        """Return the names of all flags, such as `--input`."""
        return list(self._option_string_actions)


def flag_parser(module: str, description: str, examples: str) -> FlagParser:
    """Return a parser without flags for `python -m MODULE`."""
    return FlagParser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"examples:\n{examples}{BEAM_FLAGS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def beam_flag_parser() -> FlagParser:
    """Return a parser with all of Beam's flags."""
    return parser_of_all_flags(FlagParser)


def parse(
    parser: FlagParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, PipelineOptions]:
    """Parse the command line into our flags and Beam's options.

    Raises:
        OptionsError: a flag is unknown, missing, or has a value of the wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    beam_parser = beam_flag_parser()
    # Check this first, because a flag that seems to be missing may be misspelled.
    _refuse_unknown(argv, [*parser.names(), *beam_parser.names()])
    of_job = [argument for argument in argv if _labels_job(argument)]
    flags, rest = parser.parse_known_args([a for a in argv if a not in of_job])
    rest += of_job
    _, stray = beam_parser.parse_known_args(rest)
    if stray:
        raise OptionsError(f"{stray[0]!r}: expected a flag before it, got none")
    options = PipelineOptions(rest)
    if is_local(options) and not any(flag.startswith("--prism_location") for flag in rest):
        options = without_prism(rest)
    return flags, options


def _labels_job(argument: str) -> bool:
    """Return whether --labels holds job labels, as template launchers pass them, as JSON."""
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
    """Return whether a job runs on this machine, in Beam's own DirectRunner."""
    return options.view_as(StandardOptions).runner in (None, LOCAL_RUNNER)


def in_one_process(options: PipelineOptions) -> bool:
    """Return whether a job runs in this process only."""
    mode = options.view_as(DirectOptions).direct_running_mode
    return is_local(options) and mode != "multi_processing"


def text_of(flag: str, path: str) -> str:
    """Return the text of the file that a flag names, on this machine or on gs://.

    Raises:
        OptionsError: the file cannot be read.
    """
    try:
        with FileSystems.open(path) as stream:
            return stream.read().decode()
    except (OSError, ValueError, BeamIOError) as error:
        raise OptionsError(
            f"{flag} {path}: expected a text file that can be read, got an error: {error}"
        ) from error


def words_of(flag: str, text: str, remedy: str) -> tuple[str, ...]:
    """Split comma-separated words.

    Raises:
        OptionsError: a word has white space around it, which may or may not be part of it.
    """
    words = tuple(text.split(","))
    for word in words:
        if word != word.strip():
            raise OptionsError(
                f"{flag}: expected words with a comma and no space between them, got {word!r}; "
                f"{remedy}"
            )
    return words
