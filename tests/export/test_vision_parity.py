"""The ladder of a tower: our module in float64, then the graph in ONNX Runtime, on both devices."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from beam_gemma.model.vision_config import VisionConfig
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.tensors import Checkpoint
from export.checkpoints.vision_tensors import is_of_pictures
from export.graph.tasks import graph_module
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_on_cpu import cuda_file_on_cpu
from tests.doubles.exported_tower import exported_tower, tower_signature, traced_tower
from tests.doubles.reference import float64_throughout
from tests.doubles.traces import with_weights_as_inputs
from tests.doubles.vision_models import (
    IMAGE_SIZE,
    MODELS,
    image_features,
    save_vision_checkpoint,
    tiny_vision_model,
)

NUM_PICTURES = 5
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Seeing:
    """A tiny model that sees, its checkpoint, pictures, and what transformers makes of them."""

    name: str
    model: torch.nn.Module
    checkpoint: Checkpoint
    pixels: np.ndarray
    exact: np.ndarray
    """Features in float64."""
    float32: np.ndarray

    @property
    def vision(self) -> VisionConfig:
        assert self.checkpoint.vision is not None
        return self.checkpoint.vision


Load = Callable[[str], Seeing]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    @cache
    def loaded(name: str) -> Seeing:
        model = tiny_vision_model(name)
        folder = save_vision_checkpoint(model, tmp_path_factory.mktemp(name))
        checkpoint = read_checkpoint(folder)
        pixels = pictures(IMAGE_SIZE[name])
        rounded = image_features(model, torch.from_numpy(pixels)).numpy()
        with float64_throughout():
            exact = image_features(model.double(), torch.from_numpy(pixels)).numpy()
        return Seeing(name, model.float(), checkpoint, pixels, exact, rounded)

    return loaded


@pytest.fixture(params=["gemma3", "paligemma"])
def seeing(load: Load, request: pytest.FixtureRequest) -> Seeing:
    """One for each projector."""
    return load(request.param)


def pictures(side: int) -> np.ndarray:
    """Return random pixels, and one picture each of black and white."""
    pixels = np.random.default_rng(7).integers(0, 256, (NUM_PICTURES, 3, side, side), np.uint8)
    pixels[1], pixels[2] = 0, 255
    return pixels


def session(file: Path, threads: int = 2) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(file: Path, pixels: np.ndarray, threads: int = 2) -> np.ndarray:
    return session(file, threads).run(["image_features"], {"pixels": pixels})[0]


def largest_error(values: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(values - exact).max())


@pytest.mark.parametrize("name", MODELS)
def test_module_in_float64_equals_the_reference(load: Load, name: str) -> None:
    """Float64 leaves no room for a wrong formula."""
    seeing = load(name)
    signature = tower_signature(seeing.checkpoint, "cpu", "float32")
    module = graph_module(seeing.checkpoint.config, None, signature, seeing.vision).double()
    module.load_state_dict(float64_state(seeing.checkpoint), strict=True)
    with torch.no_grad():
        outputs, _ = module.eval()({"pixels": torch.from_numpy(seeing.pixels)}, {})
    features = outputs["image_features"].numpy()
    assert features.shape == (NUM_PICTURES, seeing.vision.num_image_tokens, 48)
    np.testing.assert_allclose(features, seeing.exact, rtol=0, atol=1e-12)


def float64_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the weights of the tower; the norm of the projector is the effective one."""
    state = {}
    for name, stored in checkpoint.tensors.items():
        if is_of_pictures(name):
            values = np.concatenate(list(stored.chunks())).astype(np.float64)
            state[name] = torch.from_numpy(values + name.endswith("mm_soft_emb_norm.weight"))
    return state


def test_graph_for_the_cpu_equals_the_reference(seeing: Seeing, tmp_path: Path) -> None:
    file = exported_tower(seeing.checkpoint, tmp_path, "cpu", "float32")
    features = run(file, seeing.pixels)
    error = largest_error(features, seeing.exact)
    assert error < TOLERANCE
    assert error <= 2 * largest_error(seeing.float32, seeing.exact)
    kernels = [node.op_type for node in optimized(file, tmp_path).graph.node]
    assert kernels.count("MultiHeadAttention") == seeing.vision.num_hidden_layers
    assert not {"Softmax", "Conv"} & set(kernels)


def optimized(file: Path, folder: Path) -> onnx.ModelProto:
    """Return the graph that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx", load_external_data=False)


def test_features_of_a_picture_do_not_depend_on_its_company(seeing: Seeing, tmp_path: Path) -> None:
    """The same bits alone, in any batch and with any number of threads."""
    file = exported_tower(seeing.checkpoint, tmp_path, "cpu", "float32")
    together = run(file, seeing.pixels)
    alone = np.concatenate([run(file, picture[None]) for picture in seeing.pixels])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, run(file, seeing.pixels, threads=1))
    np.testing.assert_array_equal(together[1:4], run(file, seeing.pixels[1:4]))
    np.testing.assert_array_equal(together[::-1], run(file, seeing.pixels[::-1].copy()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_graph_for_cuda_has_kernels_and_equals_the_reference(
    seeing: Seeing, tmp_path: Path, dtype: str
) -> None:
    """Run on the CPU in float32, so it must equal a reference whose matrices are rounded."""
    graph = traced_tower(seeing.checkpoint, "cuda", dtype)
    assert unplaced(with_weights_as_inputs(graph)) == [], "nodes without a kernel for CUDA"
    source = exported_tower(seeing.checkpoint, tmp_path / "cuda", "cuda", dtype)
    for file in source.parent.glob("weights/*"):  # `onnx_ir` reads no hard links
        shutil.copyfile(file, tmp_path / file.name)
        (tmp_path / file.name).rename(file)
    features = run(cuda_file_on_cpu(source, tmp_path / "cpu.onnx"), seeing.pixels)
    with float64_throughout():
        model = rounded(seeing.name, getattr(torch, dtype)).double()
        exact = image_features(model, torch.from_numpy(seeing.pixels)).numpy()
    assert largest_error(features, exact) < TOLERANCE
    assert largest_error(exact, seeing.exact) > 100 * TOLERANCE  # the rounding shows


def rounded(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return a model whose matrices and biases a dtype holds; those of norms stay as they are."""
    model = tiny_vision_model(name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.copy_(parameter.to(dtype))
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_residual_stream_on_cuda_is_wide_enough(load: Load, dtype: str) -> None:
    """In float16 it is float32: activations of a tower may exceed the largest float16."""
    seeing = load("paligemma")
    graph = traced_tower(seeing.checkpoint, "cuda", dtype).graph
    sums = {node.outputs[0].dtype for node in graph if node.op_type == "Add"}
    wide = ir.DataType.FLOAT if dtype == "float16" else ir.DataType.BFLOAT16
    assert sums == {wide}
    assert [value.dtype for value in graph.outputs] == [ir.DataType[dtype.upper()]]


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_every_weight_of_pictures_makes_a_difference(load: Load, part: str) -> None:
    """What the other tests compare with: a weight that left no trace would hide a mistake."""
    torch.manual_seed(0)
    model, pixels = tiny_vision_model("gemma3"), torch.from_numpy(load("gemma3").pixels)
    before = image_features(model, pixels)
    for name, parameter in model.named_parameters():
        # A bias of keys changes no share of attention.
        if f".{part}." in name and not name.endswith("k_proj.bias"):
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter.mul_(1 + 0.1 * torch.sign(torch.randn(parameter.shape)))
            moved = (image_features(model, pixels) - before).abs().max()
            with torch.no_grad():
                parameter.copy_(kept)
            assert moved > 100 * TOLERANCE, name
