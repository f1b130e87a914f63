"""The model folder: complete, undamaged, of this format, or refused in one sentence."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import MANIFEST, Artifact
from beam_gemma.model.encoder_decoder_config import encoder_decoder_configs
from export.checkpoints.released_sizes import SIZES
from tests.conftest import TinyModel
from tests.doubles.encoder_decoder_models import model_config

MANIFESTS = sorted((Path(__file__).parents[1] / "data/manifests").glob("*.json"))


@pytest.fixture
def folder(tiny_gemma3: TinyModel, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_gemma3.artifact.path, tmp_path / "model"))


def edit_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_it_says_what_was_exported(tiny_gemma3: TinyModel, folder: Path) -> None:
    artifact = Artifact.open(str(folder))
    assert artifact.config == tiny_gemma3.checkpoint.config
    assert artifact.devices == ("cpu",)
    assert artifact.eos_token_ids == (1,)
    assert artifact.precision == "fp32"
    assert artifact.digest == tiny_gemma3.artifact.digest
    artifact.verify()


def test_the_terms_of_the_weights_travel_with_them(folder: Path) -> None:
    assert "ai.google.dev/gemma/terms" in (folder / "legal" / "NOTICE").read_text()


@pytest.mark.parametrize(
    "name", ["generate.cpu.onnx", "tokenizer.model", "weights/written.safetensors"]
)
def test_a_missing_or_cut_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"{name}: expected [\d,]+ bytes, got [\d,]+; .*again"):
        Artifact.open(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: expected a file of the model, got nothing"):
        Artifact.open(folder)


def test_a_flipped_bit_is_found(folder: Path) -> None:
    content = bytearray((folder / "generate.cpu.onnx").read_bytes())
    content[1000] ^= 1
    (folder / "generate.cpu.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"generate\.cpu\.onnx: expected sha256"):
        Artifact.open(folder)


def test_a_flipped_bit_of_the_weights_is_found_by_verify(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beam_gemma.model.artifact.SMALL_FILE_BYTES", 0)
    file = folder / "weights" / "written.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    artifact = Artifact.open(folder)
    with pytest.raises(ArtifactError, match=r"written\.safetensors: expected sha256"):
        artifact.verify()


def test_another_format_is_refused_with_the_remedy(folder: Path) -> None:
    for other in (0, 99):
        edit_manifest(folder, format=other)
        message = rf"format {other}, this version reads 1; export .* again"
        with pytest.raises(ArtifactError, match=message):
            Artifact.open(folder)


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_what_older_versions_wrote_is_read(file: Path, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(file.read_text())
    artifact = Artifact.read(tmp_path)
    assert artifact.source["exporter"] == f"beam_gemma {file.stem}"
    [config] = [size.config for size in SIZES if size.name == "Gemma 3 270M"]
    assert artifact.config == config
    assert artifact.signature("generate", "cpu").vocab_size == config.vocab_size
    assert (artifact.embedding is None) == (("embed", "cpu") not in artifact.signatures)


def test_a_manifest_without_its_fields_is_refused(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": 1, "name": "x"}')
    with pytest.raises(ArtifactError, match="expected the fields of format 1, got 'config'"):
        Artifact.open(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="expected JSON"):
        Artifact.open(folder)


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
    return files


def test_a_manifest_that_leaves_a_file_out_is_refused(folder: Path) -> None:
    """Else the file would be loaded without a check."""
    files = entries(folder)
    for name in ("tokenizer.model", "generate.cpu.onnx"):
        edit_manifest(folder, files={n: e for n, e in files.items() if n != name})
        with pytest.raises(ArtifactError, match=f"expected an entry for {name}, got none"):
            Artifact.open(folder)
    edit_manifest(folder, files={})
    with pytest.raises(ArtifactError, match=r"an entry for generate\.cpu\.onnx, got none"):
        Artifact.open(folder)
    edit_manifest(folder, files={n: e for n, e in files.items() if not n.startswith("weights/")})
    with pytest.raises(ArtifactError, match=r"weights/.*: expected only files of the model"):
        Artifact.open(folder)


@pytest.mark.parametrize("sha256", [None, "", "0" * 63, "G" * 64, "0" * 65])
def test_a_file_without_a_checksum_is_refused(folder: Path, sha256: str | None) -> None:
    files = entries(folder)
    files["tokenizer.model"]["sha256"] = sha256
    edit_manifest(folder, files=files)
    with pytest.raises(ArtifactError, match=r"expected the sha256 of tokenizer\.model, got"):
        Artifact.open(folder)


def test_weights_without_checksums_are_checked_by_size_and_said_to_be(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `--checksums later` writes them."""
    files, name = entries(folder), "weights/written.safetensors"
    files[name]["sha256"] = None
    edit_manifest(folder, files=files)
    Artifact.open(folder).verify()
    (record,) = caplog.records
    assert "1 files of weights have no checksum, so that only their sizes" in record.getMessage()
    (folder / name).write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"expected [0-9,]+ bytes, got 0"):
        Artifact.open(folder)


def test_names_that_are_twice_are_refused(folder: Path) -> None:
    manifest = (folder / MANIFEST).read_text()
    twice = '"tokenizer.model": {}, "tokenizer.model":'
    (folder / MANIFEST).write_text(manifest.replace('"tokenizer.model":', twice))
    with pytest.raises(ArtifactError, match="a name that is twice in an object"):
        Artifact.open(folder)


def test_an_encoder_is_that_of_its_decoder(folder: Path) -> None:
    decoder, encoder = map(asdict, encoder_decoder_configs(model_config("t5gemma").to_dict()))
    edit_manifest(folder, config=decoder, encoder=encoder)
    assert Artifact.open(folder).encoder is not None
    wider = {**encoder, "hidden_size": encoder["hidden_size"] * 2}
    for config, other, got in (
        (decoder, None, "no encoder"),
        (encoder, None, "no encoder"),
        (encoder, decoder, "an encoder of another model"),
        (decoder, decoder, "an encoder of another model"),
        (decoder, wider, "an encoder of another model"),
        (decoder, {**encoder, "model_type": "t5gemma2"}, "an encoder of another model"),
    ):
        edit_manifest(folder, config=config, encoder=other)
        with pytest.raises(ArtifactError, match=f"got {got} beside a config of t5gemma; export"):
            Artifact.open(folder)


def test_other_folders_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="got another folder; make one with python -m export"):
        Artifact.open(tmp_path)
    with pytest.raises(ArtifactError, match="got nothing"):
        Artifact.open(tmp_path / "none")


def test_a_graph_that_was_not_exported_is_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a graph to generate on cuda, got generate"):
        Artifact.open(folder).signature("generate", "cuda")
