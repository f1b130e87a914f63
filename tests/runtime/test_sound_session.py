"""The session of sound: whole exports of folders, run on the CPU and in the form of CUDA."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from beam_gemma.errors import ArtifactError, CheckpointError
from beam_gemma.model.artifact import MANIFEST, Artifact
from beam_gemma.runtime.device_memory import HostMemory
from beam_gemma.runtime.sound_session import CpuSound, CudaSound, SoundSession
from export.__main__ import export
from export.checkpoints.hf_folder import check_names, expected_shapes, read_checkpoint
from tests.doubles.gemma4_hearing import (
    PUBLISHED,
    clip,
    clip_features,
    hearing_artifact,
    hearing_model,
    save_hearing,
)

LENGTHS = (70, 1, 193, 45)


def clips_of(name: str) -> list[np.ndarray]:
    signature = hearing_artifact(name).signature("sound", "cpu")
    return [clip(number, signature.num_features) for number in LENGTHS]


@pytest.mark.parametrize("name", PUBLISHED)
def test_embeddings_of_an_export_are_those_of_the_reference(name: str) -> None:
    artifact, model, clips = hearing_artifact(name), hearing_model(name), clips_of(name)
    assert artifact.sound is not None
    assert artifact.vision is None
    assert "inputs_embeds" in artifact.signature("generate", "cpu").optional_inputs
    session = SoundSession.of(artifact, "cpu")
    for frames, features in zip(clips, session.encode(clips), strict=True):
        assert len(features) == artifact.sound.tokens_of_frames(len(frames))
        expected = clip_features(model, frames)
        # float32 on both sides.
        np.testing.assert_allclose(features, expected, rtol=0, atol=2e-4)
    assert session.encode([]) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_form_of_cuda_has_memory_for_the_longest_clip(name: str) -> None:
    """The graph is the CPU's, in a memory that stands in for a GPU's."""
    artifact, clips = hearing_artifact(name), clips_of(name)
    assert artifact.sound is not None
    signature = artifact.signature("sound", "cpu")
    path = str(artifact.graph_path("sound", "cpu"))
    # A clip of 4 seconds, so that the run at the start is short.
    config = replace(artifact.sound, max_samples=64_000)
    made = CudaSound(path, signature, config, HostMemory()).encode(clips)
    for features, expected in zip(made, CpuSound(path, signature).encode(clips), strict=True):
        np.testing.assert_array_equal(features, expected)


def test_the_graph_is_loaded_with_the_first_clip(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hearing_artifact("gemma4_e2b").path, tmp_path / "model"))
    (folder / "sound.cpu.onnx").write_bytes(b"no graph")
    session = SoundSession.of(Artifact.read(folder), "cpu")
    with pytest.raises(ArtifactError, match=r"sound\.cpu\.onnx: ONNX Runtime cannot load it"):
        session.encode(clips_of("gemma4_e2b"))
    session = SoundSession.of(hearing_artifact("gemma4_e2b"), "cpu")
    assert session.load() is session.load()


def test_models_without_sound_say_what_to_do() -> None:
    artifact = hearing_artifact("gemma4_e2b")
    signatures = {key: s for key, s in artifact.signatures.items() if key[0] != "sound"}
    bare = replace(artifact, signatures=signatures)
    with pytest.raises(ArtifactError, match=r"expected a graph to hear on cpu, .* --text_only"):
        SoundSession.of(bare, "cpu")
    with pytest.raises(ArtifactError, match=r"expected a model that takes sound, got one"):
        SoundSession.of(replace(artifact, sound=None), "cpu")


def test_a_manifest_of_an_older_version_has_no_sound(tmp_path: Path) -> None:
    artifact = hearing_artifact("gemma4_e2b")
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    assert manifest.pop("sound")["encoder"] == "conformer"
    for signature in manifest["signatures"]:
        del signature["num_features"], signature["num_audio_tokens"]
    manifest["signatures"] = [s for s in manifest["signatures"] if s["head"] != "sound"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert Artifact.read(tmp_path).sound is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_hearing(hearing_model("gemma4_e2b"), tmp_path / "checkpoint")


def test_sound_is_left_out_if_asked(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = read_checkpoint(folder)
    assert "without what it has for" not in caplog.text
    check_names(checkpoint.tensors, expected_shapes(checkpoint))
    export(folder, tmp_path / "text", tasks=("generate",), text_only=True)
    assert "exporting the model without what it has for sound" in caplog.text
    artifact = Artifact.open(tmp_path / "text")
    assert artifact.sound is None
    assert artifact.signature("generate", "cpu").optional_inputs == ()


def test_tensors_and_markers_that_do_not_suit_are_named(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "boa_token_id": 7}))
    with pytest.raises(CheckpointError, match=r"expected boa_token_id .* <\|audio>, 300, got 7"):
        read_checkpoint(folder)
    raw["audio_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(raw))
    checkpoint = read_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"expected the tensor audio_tower\.layers\.2\."):
        check_names(checkpoint.tensors, expected_shapes(checkpoint))
