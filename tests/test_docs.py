"""README, help, changelog and Makefile say what the code does."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import beam_gemma
from beam_gemma.generate_options import generate_parser
from tests.conftest import TinyModel

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def readme_commands() -> list[list[str]]:
    """Return the python commands of the README's first screen."""
    lines = [line.strip() for line in README.splitlines() if line.startswith("    python -m")]
    return [shlex.split(line.replace("$'\\n'", "'\n'")) for line in lines]


def test_readme_commands_run(tiny_gemma3: TinyModel, tmp_path: Path) -> None:
    """As they stand, but with the tiny model's files and a template read from its file."""
    template = (ROOT / "examples/keywords.txt").read_text()
    paths = {
        "gemma-3-270m.gguf": str(tiny_gemma3.checkpoint.path),
        "models/gemma-3-270m": str(tmp_path / "model"),
        "out/keywords.parquet": str(tmp_path / "out" / "keywords.parquet"),
        "$(cat examples/keywords.txt)": template[-40:],
    }
    commands = readme_commands()
    assert [command[2] for command in commands] == ["export", "pipelines.generate"]
    for command in commands:
        words = [paths.get(word, word) for word in command[1:]]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, timeout=240)
    rows = pq.read_table(tmp_path / "out").num_rows
    assert rows == pq.read_metadata(ROOT / "examples/articles.parquet").num_rows


def test_the_test_command_is_what_ci_runs() -> None:
    assert re.search(r"^    make test\b", README, re.MULTILINE)
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("name", re.findall(r"\]\(([^)h][^)]*)\)", README))
def test_links_lead_somewhere(name: str) -> None:
    assert (ROOT / name).exists()


def test_flags_named_in_the_docs_exist() -> None:
    known = {o for a in generate_parser()._actions for o in a.option_strings}
    export_help = (ROOT / "export/__main__.py").read_text()
    for path in (ROOT / "README.md", ROOT / "docs/design.md"):
        for flag in set(re.findall(r"(?<![\w-])--[a-z_]+", path.read_text())):
            assert flag in known or f'"{flag}"' in export_help, f"{path.name} names {flag}"


def test_every_flag_has_help_with_its_default() -> None:
    for action in generate_parser()._actions:
        if isinstance(action, argparse._HelpAction) or action.required:
            continue
        assert action.help, action.option_strings
        grouped = action.option_strings[0] in ("--prompt", "--prompt_column", "--messages_column")
        assert "(default: " in action.help or grouped, action.option_strings


def test_changelog_has_the_version() -> None:
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == beam_gemma.__version__


def test_pins_satisfy_the_packages() -> None:
    """make setup installs with constraints.txt; what setup.py names must be pinned there."""
    pinned = {
        re.split(r"==| @ ", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]
    }
    names = re.findall(
        r'^ +"([a-zA-Z0-9_-]+)(?:\[\w+\])?[><=]=', (ROOT / "setup.py").read_text(), re.M
    )
    assert len(names) > 15
    assert {name.lower().replace("_", "-") for name in names} <= pinned
