"""Every command of docs/models.md is one that the flags allow, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from beam_gemma.cli.classify_flags import classify_parser, classify_settings
from beam_gemma.cli.embed_flags import embed_parser, embed_settings
from beam_gemma.cli.flags import parse
from beam_gemma.cli.generate_flags import generate_parser, generate_settings
from export.__main__ import _parse

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "models.md").read_text()
PIPELINES = {
    "pipelines.generate": (generate_parser, generate_settings),
    "pipelines.classify": (classify_parser, classify_settings),
    "pipelines.embed": (embed_parser, embed_settings),
}


def commands() -> list[list[str]]:
    """Return the commands of the page, each as its words after `python -m`."""
    blocks = re.findall(r"(?:^    .*\n+)+", PAGE.replace("\\\n", ""), re.MULTILINE)
    text = "".join(block for block in blocks if "python -m" in block)
    lines = re.split(r"^    (?=python -m )", text, flags=re.MULTILINE)[1:]
    return [shlex.split(line.replace("$'", "'"))[2:] for line in lines]


def test_every_task_has_a_command() -> None:
    assert {command[0] for command in commands()} == {"export", *PIPELINES}


@pytest.mark.parametrize("command", commands(), ids=lambda words: " ".join(words[:3]))
def test_a_command_is_allowed(command: list[str]) -> None:
    module, *words = command
    if module == "export":
        assert _parse(words).output
        return
    make_parser, settings_of = PIPELINES[module]
    flags, _ = parse(make_parser(), words)
    assert settings_of(flags).has_source


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)h][^)]*)\)", PAGE))
def test_links_lead_somewhere(link: str) -> None:
    name, _, anchor = link.partition("#")
    text = (DOCS / name).read_text() if name else PAGE
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    assert not anchor or anchor in anchors
