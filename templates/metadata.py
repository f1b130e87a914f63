"""Write the Flex Templates' parameter metadata from the pipelines' flags.

Run it with `python -m templates.metadata`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from beam_gemma.cli.classify_flags import classify_parser
from beam_gemma.cli.embed_flags import embed_parser
from beam_gemma.cli.estimate_flags import FLAGS as OF_A_DRY_RUN
from beam_gemma.cli.flag_types import (
    above_zero,
    column_names,
    count,
    fraction,
    positive,
    rising,
    switch,
)
from beam_gemma.cli.flags import FlagParser
from beam_gemma.cli.generate_flags import generate_parser

FOLDER = Path(__file__).parent
PARSERS: dict[str, Callable[[], FlagParser]] = {
    "generate": generate_parser,
    "embed": embed_parser,
    "classify": classify_parser,
}
Kind = tuple[str, str | None]
"""Type of a parameter, and the POSIX pattern that its whole value must match, or None."""
ANY_TEXT: Kind = ("TEXT", None)
OBJECT = "^gs://[^/]+/.+$"
TABLE = "^(gs://[^/]+/|bq://).+$"
KINDS_OF_TYPES: dict[Any, Kind] = {
    None: ANY_TEXT,
    column_names: ANY_TEXT,
    rising: ("TEXT", "^[1-9][0-9]*(,[1-9][0-9]*)*$"),
    switch: ("BOOLEAN", "^(true|false)$"),
    count: ("NUMBER", "^[0-9]+$"),
    positive: ("NUMBER", "^[1-9][0-9]*$"),
    int: ("NUMBER", "^-?[0-9]+$"),
    float: ("NUMBER", r"^-?[0-9]+(\.[0-9]+)?$"),
    above_zero: ("NUMBER", r"^([0-9]*[1-9][0-9]*(\.[0-9]+)?|[0-9]*\.[0-9]*[1-9][0-9]*)$"),
    fraction: ("NUMBER", r"^(0(\.[0-9]+)?|1(\.0+)?)$"),
}
KINDS_OF_PLACES: dict[Any, Kind] = {
    "DIR": ("GCS_READ_FOLDER", OBJECT),
    "FILE": ("GCS_READ_FILE", OBJECT),
    "URI": ("TEXT", TABLE),
}
"""Kinds by metavar. Paths must be on Cloud Storage, as a launcher has no files of its own; tables
can also be in BigQuery."""
KINDS_OF_FLAGS: dict[str, Kind] = {"report": ("GCS_WRITE_FILE", OBJECT)}
ACRONYMS = {
    "cudagraph": "CUDA graph",
    "gpu": "GPU",
    "json": "JSON",
    "ids": "IDs",
    "eos": "EOS",
    "sdk": "SDK",
}
NOT_IN_THE_FORM = ("dry_run", *OF_A_DRY_RUN)
"""Parameters hidden in the form, since a dry run, which only logs an estimate, counts as failed."""
WORKER_IMAGE = {
    "name": "sdk_container_image",
    "label": "Worker image",
    "helpText": "Image of the workers, which templates/build.sh makes beside this template. "
    "(required)",
    "groupName": "Dataflow",
    "isOptional": False,
    "paramType": "TEXT",
    "regexes": ["^[^ ]+[:@][^ ]+$"],
}
"""Parameter for the only Beam option that every launch needs beside the launch settings."""


def metadata(task: str) -> dict[str, Any]:
    """Return the metadata of a task's template."""
    parser = PARSERS[task]()
    return {
        "name": f"Gemma batch inference: {task}",
        "description": parser.description,
        "streaming": False,
        "parameters": [*_parameters(parser), WORKER_IMAGE],
    }


def write(folder: Path = FOLDER) -> list[Path]:
    """Write the metadata of all templates and return the files."""
    files = []
    for task in PARSERS:
        file = folder / f"{task}.json"
        file.write_text(json.dumps(metadata(task), indent=2) + "\n")
        files.append(file)
    return files


def _parameters(parser: argparse.ArgumentParser) -> Iterator[dict[str, Any]]:
    for group in parser._action_groups:
        for action in group._group_actions:
            if not isinstance(action, argparse._HelpAction):
                yield _parameter(action, group.title or "")


def _parameter(action: argparse.Action, group: str) -> dict[str, Any]:
    param_type, pattern = _kind(action)
    parameter = {
        "name": action.dest,
        "label": _label(action.dest),
        "helpText": _help(action),
        "groupName": group[:1].upper() + group[1:],
        "isOptional": not action.required,
        "paramType": param_type,
    }
    if pattern is not None:
        parameter["regexes"] = [pattern]
    if action.choices is not None:
        names = map(str, action.choices)
        parameter["enumOptions"] = [{"value": name, "label": name} for name in names]
    if (default := _default(action)) is not None:
        parameter["defaultValue"] = default
    if action.dest in NOT_IN_THE_FORM:
        parameter["hiddenUi"] = True
    return parameter


def _kind(action: argparse.Action) -> Kind:
    if action.choices is not None:
        return ("ENUM", None)
    if action.dest in KINDS_OF_FLAGS:
        return KINDS_OF_FLAGS[action.dest]
    if action.type is None:
        return KINDS_OF_PLACES.get(action.metavar, ANY_TEXT)
    if action.type not in KINDS_OF_TYPES:
        raise LookupError(
            f"--{action.dest}: expected a type of KINDS_OF_TYPES, got {action.type}; add it there"
        )
    return KINDS_OF_TYPES[action.type]


def _label(name: str) -> str:
    words = " ".join(ACRONYMS.get(word, word) for word in name.split("_"))
    return words[0].upper() + words[1:]


def _help(action: argparse.Action) -> str:
    text = (action.help or "") % vars(action)
    # A launch passes each parameter only once, so notes on repeating flags are dropped.
    return text.replace("; may be repeated", "")


def _default(action: argparse.Action) -> str | None:
    if action.default in (None, []):
        return None
    if isinstance(action.default, bool):
        return str(action.default).lower()
    default = str(action.default)
    # A form would strip, and so change, a whitespace-only default.
    return default if default.strip() else None


if __name__ == "__main__":
    for path in write():
        sys.stdout.write(f"wrote {path.relative_to(FOLDER.parent)}\n")
