"""The session of pictures: what it computes, on what it depends, and when it loads its graph."""

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.device_memory import HostMemory
from beam_gemma.runtime.limits import Limits
from beam_gemma.runtime.vision_session import CpuTower, CudaTower, VisionSession
from beam_gemma.tasks.open_model import start_engine
from tests.doubles.picture_requests import MODELS, make_request, model_of, picture_pixels
from tests.doubles.vision_models import image_features


def pixels_of(name: str, count: int) -> list[np.ndarray]:
    return [picture_pixels(name, number) for number in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_those_of_the_reference(name: str) -> None:
    reference, artifact = model_of(name)
    pixels = pixels_of(name, 3)
    expected = image_features(reference, torch.tensor(np.stack(pixels))).numpy()
    embeddings = VisionSession.of(artifact, "cpu").encode(pixels)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_do_not_depend_on_other_pictures_or_threads(name: str) -> None:
    artifact = model_of(name)[1]
    pixels = pixels_of(name, 4)
    base = VisionSession.of(artifact, "cpu", num_threads=1).encode(pixels)
    assert len({one.tobytes() for one in base}) == 4
    other = VisionSession.of(artifact, "cpu", num_threads=2)
    for i in (2, 0):
        np.testing.assert_array_equal(other.encode(pixels[i : i + 1])[0], base[i])
    np.testing.assert_array_equal(other.encode(pixels[::-1]), base[::-1])
    assert other.encode([]) == []


class CountedTower:
    def encode(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [one[0] for one in items]


def test_the_graph_is_loaded_once_with_the_first_picture() -> None:
    loaded = []

    def load() -> CountedTower:
        loaded.append(1)
        return CountedTower()

    session = VisionSession(model_of("gemma3")[1].signature("vision", "cpu"), load)
    assert not loaded
    for _ in range(2):
        session.encode(pixels_of("gemma3", 2))
        assert len(loaded) == 1


def without_tower(folder: Path) -> Artifact:
    """Return a model whose graph of pictures is damaged."""
    shutil.copytree(model_of("gemma3")[1].path, folder)
    (folder / "vision.cpu.onnx").write_bytes(b"no graph")
    return Artifact.read(folder)


def test_a_job_of_text_does_not_need_the_tower(tmp_path: Path) -> None:
    limits = Limits(max_num_seqs=2)
    text = make_request("gemma3", [[2, 20, 21]])
    picture = make_request("gemma3", [[2, 20, 21], 0])
    artifact = without_tower(tmp_path / "model")
    with closing(start_engine(artifact, "generate", "cpu", limits)) as engine:
        # Success between them keeps the device from being taken for broken.
        results = engine.generate([text, picture])
    assert results[0].error is None
    assert results[1].error is not None
    assert "vision.cpu.onnx: ONNX Runtime cannot load it" in results[1].error
    whole = model_of("gemma3")[1]
    with closing(start_engine(whole, "generate", "cpu", limits)) as engine:
        results = engine.generate([text, picture])
    assert [result.error for result in results] == [None, None]


def test_a_model_without_a_graph_of_pictures_says_what_to_do() -> None:
    artifact = model_of("gemma3")[1]
    signatures = {key: s for key, s in artifact.signatures.items() if key[0] != "vision"}
    bare = replace(artifact, signatures=signatures)
    with pytest.raises(ArtifactError, match=r"expected a graph to see on cpu, .* export the model"):
        VisionSession.of(bare, "cpu")
    with closing(start_engine(bare, "generate", "cpu", Limits(max_num_seqs=2))) as engine:
        [result] = engine.generate([make_request("gemma3", [0, [20]])])
    assert result.error is not None
    assert result.error.startswith("pictures: expected none")
    with pytest.raises(ArtifactError, match=r"expected a model that takes pictures, got one"):
        VisionSession.of(replace(artifact, vision=None), "cpu")


def test_a_graph_that_differs_from_its_signature_is_refused() -> None:
    artifact = model_of("gemma3")[1]
    path = str(artifact.graph_path("generate", "cpu"))
    with pytest.raises(ArtifactError, match=r"expected the inputs \['pixels'\]"):
        CpuTower(path, artifact.signature("vision", "cpu"))


@pytest.mark.parametrize("name", MODELS)
def test_batches_on_a_device_are_filled_up(name: str) -> None:
    """The graph is the CPU's, in a memory that stands in for a GPU's."""
    artifact = model_of(name)[1]
    signature = artifact.signature("vision", "cpu")
    path = str(artifact.graph_path("vision", "cpu"))
    tower = CudaTower(path, signature, HostMemory(), batch=3)
    pixels = pixels_of(name, 7)
    embeddings = tower.encode(pixels)
    expected = CpuTower(path, signature).encode(pixels)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=2e-6 * scale)
    again = tower.encode(pixels[5:])
    np.testing.assert_array_equal(again, embeddings[5:], err_msg="in another batch and place")


def test_embeddings_in_bfloat16_are_passed_as_their_bits(tmp_path: Path) -> None:
    """The graph casts the pixels of each channel's first row."""
    signature = Signature(
        head="vision",
        device="cuda",
        dtype="bfloat16",
        vocab_size=9,
        hidden_size=5,
        max_model_len=9,
        states=(),
        image_size=5,
        num_image_tokens=3,
    )
    [pixels], [features] = signature.step_inputs(), signature.outputs()
    nodes = [
        helper.make_node("Gather", [pixels.name, "first"], ["rows"], axis=2),
        helper.make_node("Cast", ["rows"], [features.name], to=TensorProto.BFLOAT16),
    ]
    graph = helper.make_graph(
        nodes,
        "first_rows",
        [helper.make_tensor_value_info(pixels.name, TensorProto.UINT8, pixels.shape)],
        [helper.make_tensor_value_info(features.name, TensorProto.BFLOAT16, features.shape)],
        [helper.make_tensor("first", TensorProto.INT64, [], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "rows.onnx")
    tower = CudaTower(str(tmp_path / "rows.onnx"), signature, HostMemory(), batch=2)
    pictures = list(np.random.default_rng(1).integers(0, 256, (3, 3, 5, 5), np.uint8))
    for picture, embeddings in zip(pictures, tower.encode(pictures), strict=True):
        assert embeddings.dtype == np.uint16
        expected = picture[:, 0].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(embeddings.view(ml_dtypes.bfloat16), expected)
