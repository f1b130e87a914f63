"""README, help, changelog and Makefile say what the code does."""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import beam_gemma
from beam_gemma.cli.classify_flags import classify_parser
from beam_gemma.cli.embed_flags import embed_parser
from beam_gemma.cli.flags import FlagParser, beam_flag_parser
from beam_gemma.cli.generate_flags import generate_parser
from beam_gemma.preflight import preflight_parser
from export.__main__ import _parser as export_parser
from tests.doubles.picture_requests import model_of

ROOT = Path(__file__).parent.parent
PARSERS = (generate_parser, classify_parser, embed_parser, export_parser, preflight_parser)
README = (ROOT / "README.md").read_text()


def readme_commands() -> list[list[str]]:
    """Return the python commands of the README's first screen."""
    lines = [line.strip() for line in README.splitlines() if line.startswith("    python -m")]
    return [shlex.split(line.replace("$'\\n'", "'\n'")) for line in lines]


def test_readme_commands_run(
    all_tasks_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, but with the tiny model's files and a template read from its file."""
    paths = {
        "gemma-3-270m.gguf": str(Path(all_tasks_model).with_name("checkpoint")),
        "models/gemma-3-270m": str(tmp_path / "model"),
        "models/gemma-3-4b-it": str(model_of("gemma3")[1].path),
        "Describe the product in one sentence.": "what",
    }
    monkeypatch.chdir(ROOT)
    # A tiny model takes no long prompt, so only the end of each.
    for name, end in (("keywords", 40), ("sales", 20)):
        template = (ROOT / f"examples/{name}.txt").read_text()
        paths[f"$(cat examples/{name}.txt)"] = template[-end:]
    outputs = {"keywords": 70, "sales": 24, "sentiment": 48, "embeddings": 70, "captions": 6}
    for command in readme_commands():
        words = [paths.get(word, word.replace("out/", f"{tmp_path}/out/")) for word in command[1:]]
        assert words[0] == "-m"
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(words[1], run_name="__main__")
        assert not ended.value.code
    for name, num_rows in outputs.items():
        shards = list((tmp_path / "out").glob(f"{name}-*.parquet"))
        assert sum(pq.read_metadata(shard).num_rows for shard in shards) == num_rows


def test_the_test_command_is_what_ci_runs() -> None:
    assert re.search(r"^    make test\b", README, re.MULTILINE)
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("name", re.findall(r"\]\(([^)h][^)]*)\)", README))
def test_links_lead_somewhere(name: str) -> None:
    assert (ROOT / name).exists()


PAGES = ("dataflow", "design", "models", "pictures", "structured", "classification",
         "reliability", "tables", "thinking", "tools", "gpu")  # fmt: skip


OTHERS = re.compile(r"^(?:gcloud|bq) (?:.*\\\n)*.*$", re.MULTILINE)
"""Commands with flags of their own."""


def test_flags_named_in_the_docs_exist() -> None:
    known = {option for parser in PARSERS for a in parser()._actions for option in a.option_strings}
    known |= beam_flag_parser()._option_string_actions.keys()
    known |= {"--target", "--uri", "--rm", "--gpus", "--entrypoint"}  # of docker and gcloud
    pages = (f"docs/{page}.md" for page in PAGES)
    for name in ("README.md", *pages):
        text = re.sub(OTHERS, "", (ROOT / name).read_text())
        for flag in set(re.findall(r"(?<![\w-])--[a-z_]+(?![\w-])", text)):
            assert flag in known, f"{name} names {flag}"


@pytest.mark.parametrize("parser", PARSERS)
def test_every_flag_has_help_with_its_default(parser: Callable[[], FlagParser]) -> None:
    for action in parser()._actions:
        if isinstance(action, argparse._HelpAction) or action.required:
            continue
        assert action.help, action.option_strings
        assert "(default: " in action.help or "required" in action.help, action.option_strings


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
