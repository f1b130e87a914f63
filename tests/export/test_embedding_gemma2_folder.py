"""Folders of EmbeddingGemma 2: the form of the release, what may be missing, what is refused."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from beam_gemma.errors import BeamGemmaError, CheckpointError, OptionsError
from beam_gemma.model.embedding_config import EmbeddingConfig
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.tasks.text_encoder import EmbedSettings, TextEncoder
from export.__main__ import export
from export.checkpoints.embedding_gemma2 import check_template
from export.checkpoints.hf_folder import check_names, expected_shapes, read_checkpoint
from export.graph.tasks import for_embeddings
from tests.doubles.embedding_gemma2_models import (
    CHAT_TEMPLATE,
    PROMPTS,
    WIDTH,
    save_release,
    save_text,
    tiny_embedder,
)

BERT, PROMPTS_FILE = "sentence_bert_config.json", "config_sentence_transformers.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a folder in the form of the release, which a test may edit."""
    return shutil.copytree(tiny_embedder().checkpoint.path, tmp_path / "checkpoint")


def edit(file: Path, **changes: Any) -> None:
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**settings, **changes}))


def embedding_in(folder: Path) -> EmbeddingConfig:
    """Return the embedding settings of a folder whose tensors are those that they call for."""
    checkpoint = read_checkpoint(folder)
    check_names(checkpoint.tensors, expected_shapes(checkpoint))
    assert checkpoint.embedding is not None
    return checkpoint.embedding


def token_ids(folder: Path, text: str) -> tuple[int, ...]:
    checkpoint = read_checkpoint(folder)
    assert checkpoint.embedding is not None
    tokenizer = Tokenizer(checkpoint.tokenizer_model())
    return TextEncoder(tokenizer, EmbedSettings(), checkpoint.embedding)(text).token_ids


def test_the_form_of_the_release(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="export"):
        embedding = embedding_in(folder)
    assert embedding == EmbeddingConfig(
        pooling="mean",
        dense_sizes=(WIDTH,),
        max_tokens=8192,
        add_bos=True,
        add_eos=True,
        prompts=PROMPTS,
    )
    assert "without what it has for sound" in caplog.text
    checkpoint = read_checkpoint(folder)
    assert for_embeddings(checkpoint) is checkpoint, "no embedding needs less"
    assert checkpoint.vision is not None
    assert (checkpoint.vision.projector, checkpoint.vision.bidirectional) == ("tower", "none")
    names = [name for name in checkpoint.tensors if not name.startswith(("layers.", "dense."))]
    assert {name.split(".")[0] for name in names} >= {"vision_tower", "embed_vision"}
    assert not [name for name in names if "audio" in name]


def test_a_text_model_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="export"):
        checkpoint = read_checkpoint(folder, text_only=True)
    assert "without what it has for images and sound" in caplog.text
    assert checkpoint.vision is None
    assert not [name for name in checkpoint.tensors if "vision" in name]


def test_pieces_of_pictures_have_the_ids_that_the_settings_give(folder: Path) -> None:
    edit(folder / "config.json", image_token_id=300)
    with pytest.raises(CheckpointError, match="expected image_token_id of config"):
        read_checkpoint(folder)
    assert read_checkpoint(folder, text_only=True).vision is None


def test_the_last_module_may_be_missing(folder: Path) -> None:
    """Embeddings then have another length than 1."""
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:-1]))
    assert not embedding_in(folder).normalize


def test_dense_layers_come_behind_the_projection(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense",
             "type": "sentence_transformers.models.Dense"}  # fmt: skip
    (folder / "modules.json").write_text(json.dumps([*modules[:2], dense, *modules[2:]]))
    (folder / "2_Dense").mkdir()
    edit(folder / "2_Dense/config.json", in_features=WIDTH, out_features=40, bias=False,
         activation_function="torch.nn.modules.linear.Identity")  # fmt: skip
    weight = np.ones((40, WIDTH), np.float32)
    save_file({"linear.weight": weight}, folder / "2_Dense/model.safetensors")
    assert embedding_in(folder).dense_sizes == (WIDTH, 40)


def test_a_folder_of_the_model_alone_has_the_released_settings(folder: Path) -> None:
    for name in ("modules.json", BERT, PROMPTS_FILE, "chat_template.jinja"):
        (folder / name).unlink()
    for name in ("1_Pooling", "2_Normalize"):
        shutil.rmtree(folder / name)
    embedding = embedding_in(folder)
    assert (embedding.pooling, embedding.normalize) == ("mean", True)
    assert (embedding.add_bos, embedding.add_eos, embedding.max_tokens) == (True, True, 8192)
    assert len(embedding.prompts) == 20
    assert PROMPTS.items() <= embedding.prompts.items()
    edit(folder / PROMPTS_FILE, prompts={"query": "q: "})
    assert embedding_in(folder).prompts == {"query": "q: "}


def test_a_lower_limit_of_the_folder_holds(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", model_max_length=2048)
    assert embedding_in(folder).max_tokens == 2048
    edit(folder / BERT, max_seq_length=100)
    assert embedding_in(folder).max_tokens == 100


def test_a_text_model_without_a_processor_gets_no_markers(tmp_path: Path) -> None:
    """As in sentence-transformers: a tokenizer's chat template writes its own or none."""
    reference = save_text("embedding_gemma2", tmp_path / "model", chat_template=CHAT_TEMPLATE)
    ours = token_ids(tmp_path / "model", "the hen in the inn")
    theirs = reference[0].preprocess(["the hen in the inn"])["input_ids"][0]
    assert list(ours) == theirs.tolist()
    plain = save_text("embedding_gemma2", tmp_path / "plain")
    ours = token_ids(tmp_path / "plain", "the hen in the inn")
    theirs = plain[0].preprocess(["the hen in the inn"])["input_ids"][0]
    assert list(ours) == theirs.tolist()
    assert (ours[0], ours[-1]) == (2, 1)


def test_a_folder_without_towers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_release("embedding_gemma2", tmp_path / "model", towers=False)
    with caplog.at_level(logging.WARNING, logger="export"):
        assert embedding_in(tmp_path / "model").dense_sizes == (WIDTH,)
    assert "sound" not in caplog.text


@pytest.mark.parametrize(
    ("source", "got"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", "in line 1"),
        ("{% for m in messages %}\n{{ m['content'] | trim }}{% endfor %}", "in line 2"),
        ("{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}", "in line 1"),
        ("{% for m in messages %}<|turn>{{ m.content }}{% endfor %}", "in line 1"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "in line 1"),
        ("", "got none"),
    ],
)
def test_a_template_that_changes_texts_is_refused(folder: Path, source: str, got: str) -> None:
    (folder / "chat_template.jinja").write_text(source)
    with pytest.raises(CheckpointError, match="writes the contents of messages as they") as raised:
        read_checkpoint(folder)
    assert got in str(raised.value)


def test_a_template_is_read_and_never_run(tmp_path: Path) -> None:
    """Its loops take no time, and one that is no template is an error."""
    check_template(tmp_path, "{% for i in range(10 ** 12) %}{{ m.content }}{% endfor %}")
    for source in ("{% for", "{{ " + "(" * 5000):
        with pytest.raises(CheckpointError, match="expected a Jinja template"):
            check_template(tmp_path, source)


@pytest.mark.parametrize(
    ("file", "changes", "error"),
    [
        (BERT, {"modality_config": {}}, "expected modality_config with text"),
        (BERT, {"modality_config": {"text": {"method": "get_text_features"}}}, "modality_config"),
        (BERT, {"modality_config": ["text"]}, "got ['text']"),
        (BERT, {"processing_kwargs": {"text": {}}}, "'processing_kwargs' is not known"),
        ("config.json", {"text_config": {}}, "config.json"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    folder: Path, file: str, changes: dict[str, Any], error: str
) -> None:
    edit(folder / file, **changes)
    with pytest.raises(BeamGemmaError) as raised:
        read_checkpoint(folder)
    assert error in str(raised.value)


@pytest.mark.parametrize("size", [0, "768", 161])
def test_the_projection_has_the_width_that_the_settings_give(folder: Path, size: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config=raw["text_config"] | {"embedding_dim": size})
    with pytest.raises(BeamGemmaError, match=r"whole number|of shape \[161, 48\] as config.json"):
        embedding_in(folder)


def test_the_projection_may_not_be_missing(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    tensors = {"language_model.norm.weight": np.ones(48, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    assert raw["text_config"]["hidden_size"] == 48
    with pytest.raises(CheckpointError, match=r"expected the tensor dense\.0\.weight, got none"):
        embedding_in(folder)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tasks": ("generate",)}, "expected embed alone"),
        ({"pooling": "lasttoken"}, "--pooling: expected none"),
    ],
)
def test_an_export_that_makes_no_sense_is_refused(
    folder: Path, tmp_path: Path, options: dict[str, Any], error: str
) -> None:
    with pytest.raises(OptionsError) as raised:
        export(folder, tmp_path / "model", **options)
    assert error in str(raised.value)
