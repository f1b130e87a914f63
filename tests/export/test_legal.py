"""What an exported folder says of the license of its weights."""

from dataclasses import replace
from pathlib import Path

import pytest

from beam_gemma.model.newer_config import newer_config
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.legal import write_legal
from export.checkpoints.sidecar_files import MAX_CARD_BYTES, stated_license
from export.checkpoints.tensors import Checkpoint
from tests.doubles.checkpoint_files import write_gguf, write_mini
from tests.doubles.gguf_models import MODELS

ROOT = Path(__file__).parents[2]
TERMS, APACHE = "ai.google.dev/gemma/terms", "under the Apache License, Version 2.0"


def written(checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Return the texts of the files that an export writes, by name."""
    write_legal(checkpoint, folder)
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.fixture
def mini(tmp_path: Path) -> Checkpoint:
    return write_mini(tmp_path / "mini")


def test_a_gemma_comes_under_the_gemma_terms(mini: Checkpoint, tmp_path: Path) -> None:
    files = written(mini, tmp_path / "legal")
    assert files.keys() == {"NOTICE"}
    assert TERMS in files["NOTICE"]
    assert "prohibited_use_policy" in files["NOTICE"]
    assert "Apache" not in files["NOTICE"]


@pytest.mark.parametrize(("name", "is_apache"), [("E2B", True), ("31B", True), ("3n", False)])
def test_the_license_is_that_of_the_family(
    mini: Checkpoint, tmp_path: Path, name: str, *, is_apache: bool
) -> None:
    """Gemma 4 comes under the Apache License, whose text is to go with it; Gemma 3n does not."""
    checkpoint = replace(mini, config=newer_config(MODELS[name]))
    files = written(checkpoint, tmp_path / "legal")
    assert (APACHE in files["NOTICE"]) == is_apache
    assert (TERMS in files["NOTICE"]) != is_apache
    assert ("prohibited_use_policy" in files["NOTICE"]) != is_apache
    license_text = (ROOT / "LICENSE").read_text()
    assert files.get("LICENSE") == (license_text if is_apache else None)


def test_texts_beside_the_weights_go_with_them(mini: Checkpoint, tmp_path: Path) -> None:
    (mini.path / "LICENSE").write_text("theirs")
    (mini.path / "README.md").write_text(
        "---\nlibrary_name: transformers\nlicense: other\nlicense_name: 'our-terms'\n"
        "license_link: https://example.org/terms\n---\nlicense: none of it\n"
    )
    checkpoint = replace(read_checkpoint(mini.path), config=newer_config(MODELS["E2B"]))
    files = written(checkpoint, tmp_path / "legal")
    assert files["checkpoint-LICENSE"] == "theirs"
    assert "Apache License" in files["LICENSE"]
    assert "license as: other, our-terms, https://example.org/terms\n" in files["NOTICE"]


def test_a_gguf_states_its_license_in_its_metadata(mini: Checkpoint, tmp_path: Path) -> None:
    keys = {"general.license": "gemma", "general.license.link": "https://example.org/terms"}
    path = write_gguf(tmp_path / "x.gguf", mini, settings=keys)
    assert read_checkpoint(path).license == "gemma, https://example.org/terms"
    assert read_checkpoint(write_gguf(tmp_path / "y.gguf", mini)).license is None


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (b"", None),
        (b"license: gemma\n", None),
        (b"---\nlicense: gemma\n", None),
        (b"---\nlicense:\n- gemma\n---\n", None),
        (b"---\nlicense: \xff\x1b[2Jgemma\n---\n", "\ufffd[2Jgemma"),
        (b"---\nlicense: " + b"x" * 900 + b"\n---\n", "x" * 200),
        (b"---\n" + b"a: b\n" * MAX_CARD_BYTES + b"license: gemma\n---\n", None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_card_that_names_no_license_in_one_line_states_none(
    tmp_path: Path, card: bytes, expected: str | None
) -> None:
    (tmp_path / "README.md").write_bytes(card)
    assert stated_license(tmp_path) == expected
