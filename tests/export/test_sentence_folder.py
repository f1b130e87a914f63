"""Folders of sentence-transformers: what each setting means, and which are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from beam_gemma.errors import BeamGemmaError, CheckpointError, OptionsError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.embedding_config import EmbeddingConfig
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint

Edit = Callable[[Any], Any]


@pytest.fixture
def folder(two_sided: tuple[SentenceTransformer, Artifact], tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may edit."""
    return shutil.copytree(two_sided[1].path.parent / "checkpoint", tmp_path / "checkpoint")


def edit(file: Path, **changes: Any) -> None:
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**settings, **changes}))


def embedding_of(folder: Path) -> EmbeddingConfig:
    embedding = read_checkpoint(folder).embedding
    assert embedding is not None
    return embedding


def test_settings_under_their_older_names(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling/config.json").write_text(
        '{"word_embedding_dimension": 48, "pooling_mode_mean_tokens": false, '
        '"pooling_mode_lasttoken": true, "pooling_mode_cls_token": false}'
    )
    (folder / "sentence_bert_config.json").write_text(
        '{"max_seq_length": 100, "do_lower_case": false}'
    )
    edit(folder / "tokenizer_config.json", add_eos_token=False)
    embedding = embedding_of(folder)
    assert (embedding.pooling, embedding.max_tokens) == ("lasttoken", 100)
    assert (embedding.add_bos, embedding.add_eos) == (True, False)


@pytest.mark.parametrize(
    ("file", "changes", "error"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "expected pooling by mean or lasttoken"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}, "got ['mean', 'max']"),
        ("1_Pooling/config.json", {"include_prompt": False}, "expected include_prompt True"),
        ("2_Dense/config.json", {"bias": True}, "expected bias False, got True"),
        ("2_Dense/config.json", {"use_residual": True}, "expected use_residual False"),
        ("2_Dense/config.json", {"in_features": 50}, "expected in_features 48, got 50"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Tanh"}, "got 'torch.nn.Tanh'"),
        ("3_Dense/config.json", {"dropout": 0.1}, "the setting 'dropout' is not known"),
        ("4_Normalize/config.json", {"p": 1}, "the setting 'p' is not known"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "expected do_lower_case False"),
        ("config_sentence_transformers.json", {"promts": {}}, "did you mean prompts?"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    folder: Path, file: str, changes: dict[str, Any], error: str
) -> None:
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(folder)
    assert error in str(raised.value)
    assert file in str(raised.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: [*m[:2], {**m[2], "type": "sentence_transformers.models.LSTM"}], "LSTM"),
        (lambda m: [*m[:2], {**m[2], "type": "theirs.Dense"}], "got theirs.Dense"),
        (lambda m: [m[0], *m[2:]], "got Transformer, Dense, Dense, Normalize"),
        (lambda m: [*m[:2], m[4], *m[2:4]], "got Transformer, Pooling, Normalize, Dense, Dense"),
        (lambda m: [{**m[0], "path": "0_Transformer"}, *m[1:]], "in the folder itself"),
    ],
)
def test_modules_in_another_order_are_refused(folder: Path, change: Edit, error: str) -> None:
    file = folder / "modules.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(folder)
    assert error in str(raised.value)


def test_a_two_sided_model_without_modules_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "modules.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected modules\.json beside a model with two-si"):
        export(folder, tmp_path / "model", tasks=("embed",))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tasks": ("generate",)}, "expected embed alone for a model with two-sided attention"),
        ({"tasks": ("embed", "generate")}, "expected embed alone"),
        ({"pooling": "mean"}, "--pooling: expected none"),
    ],
)
def test_an_export_that_makes_no_sense_is_refused(
    folder: Path, tmp_path: Path, options: dict[str, Any], error: str
) -> None:
    with pytest.raises(OptionsError) as raised:
        export(folder, tmp_path / "model", **options)
    assert error in str(raised.value)
    assert isinstance(raised.value, BeamGemmaError)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("modules.json", {}, "expected a list of at most 64 modules"),
        ("modules.json", [1], "expected a list of at most 64 modules"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "with type and path"),
        ("1_Pooling/config.json", [], "expected a JSON object, got []"),
        ("1_Pooling/config.json", {"pooling_mode": []}, "by mean or lasttoken, got []"),
        ("2_Dense/config.json", {"in_features": 48, "bias": False, "out_features": 1 << 40,
         "activation_function": "torch.nn.Identity"}, "from 1 to 131,072, got 1099511627776"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "prompts as texts by name"),
        ("config_sentence_transformers.json", {"default_prompt_name": 1}, "as text, got 1"),
        ("sentence_bert_config.json", {"max_seq_length": -1}, "as a number from 1, got -1"),
        ("sentence_bert_config.json", {"max_seq_length": 1e999}, "which is no number"),
        ("tokenizer_config.json", {"add_eos_token": "no"}, "as true or false, got 'no'"),
    ],
)  # fmt: skip
def test_settings_of_another_kind_are_refused(
    folder: Path, file: str, content: Any, error: str
) -> None:
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(folder)
    assert error in str(raised.value)
    assert file in str(raised.value)


@pytest.mark.parametrize("path", ["../2_Dense", "/tmp", "link"])
def test_a_module_lies_in_the_folder(folder: Path, path: str) -> None:
    shutil.move(folder / "2_Dense", folder.parent / "2_Dense")
    (folder / "link").symlink_to(folder.parent / "2_Dense")
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"which leads elsewhere|got a symbolic link to"):
        read_checkpoint(folder)
