"""How Gemma 3n sees: the reference held to timm, the module, its graphs, and its full size."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beam_gemma.errors import ConfigError
from beam_gemma.model.gemma3n_vision import gemma3n_vision
from beam_gemma.model.mobilenet_v5 import ARCHITECTURES
from beam_gemma.model.vision_config import VisionConfig
from beam_gemma.runtime.vision_session import CpuTower
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.mobilenet_v5 import TOWER, mobilenet_shapes
from export.checkpoints.newer_sizes import NEWER_SIZES
from export.checkpoints.tensors import Checkpoint
from export.checkpoints.vision_tensors import is_of_pictures
from export.graph.tasks import graph_module
from export.modules.mobilenet_v5 import MobileNetV5, product
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import with_weights_as_inputs
from tests.doubles.cuda_on_cpu import cuda_file_on_cpu
from tests.doubles.exported_tower import exported_tower, tower_signature, traced_tower
from tests.doubles.gemma3n_seeing import picture_rows, save_seeing_gemma3n, seeing_gemma3n
from tests.doubles.mobilenet import TINY, TINY_NAME, MobileNet, colors, filled
from tests.doubles.reference import float64_throughout
from tests.export.test_vision_parity import run
from tests.export.test_vision_sizes import checkpoint_of

GOLDEN = (
    0.544506905626, 0.964968933532, 0.127886918057, 0.375216369703, -1.041769988554,
    -0.063718292654, 0.527077999103, 0.003782256529, 0.216407140332, -0.523431805133,
)  # fmt: skip
"""Every 16th feature that timm 1.0.31 makes of `TINY`, `filled`, from `colors`."""
FULL = "mobilenetv5_300m_enc"
NUM_PARAMETERS = 294_126_912
"""Those of timm's tower of that name."""
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Seeing:
    """A tiny model, its checkpoint, pictures, and what transformers makes of them."""

    checkpoint: Checkpoint
    pixels: np.ndarray
    exact: np.ndarray
    """Embeddings of each picture in float64."""
    float32: np.ndarray


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    model = seeing_gemma3n()
    folder = save_seeing_gemma3n(model, tmp_path_factory.mktemp("seeing"))
    pixels = np.random.default_rng(7).integers(0, 256, (5, 3, 96, 96), np.uint8)
    float32 = picture_rows(model, torch.from_numpy(pixels)).numpy()
    with float64_throughout():
        exact = picture_rows(model.double(), torch.from_numpy(pixels)).numpy()
    return Seeing(read_checkpoint(folder), pixels, exact, float32)


def flat(kernels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return kernels of one place as matrices."""
    return {n: k.flatten(1) if k.shape[2:] == (1, 1) else k for n, k in kernels.items()}


@torch.no_grad()
def test_the_reference_makes_the_numbers_of_timm() -> None:
    """timm itself cannot be installed beside a PyTorch for the CPU alone."""
    found = filled(MobileNet(TINY).double())(colors(TINY.image_size))
    # float64, rounded to 12 digits behind the point.
    np.testing.assert_allclose(found.flatten()[::16], GOLDEN, rtol=0, atol=1e-9)


@torch.no_grad()
def test_each_block_in_float64_equals_the_reference() -> None:
    """Each gets random numbers, so that no block hides the faults of another."""
    reference, ours = filled(MobileNet(TINY).double()), MobileNetV5(TINY).double()
    ours.load_state_dict(flat(reference.state_dict()), strict=True)
    torch.manual_seed(0)
    for name, _, channels, side in TINY.placed_blocks():
        maps = torch.randn(2, channels, side, side, dtype=torch.float64)
        expected = reference.get_submodule(f"blocks.{name}")(maps)
        rows = maps.permute(0, 2, 3, 1).reshape(-1, channels)
        found = ours.get_submodule(f"blocks.{name}")(rows)
        expected = expected.permute(0, 2, 3, 1).reshape(found.shape)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_module_in_float64_equals_the_reference(seeing: Seeing) -> None:
    """From pixels to embeddings, with that of the token behind a picture."""
    checkpoint = seeing.checkpoint
    signature = tower_signature(checkpoint, "cpu", "float32")
    module = graph_module(checkpoint.config, None, signature, checkpoint.vision).double().eval()
    state = {
        name: torch.from_numpy(np.concatenate(list(stored.chunks())).astype(np.float64))
        for name, stored in checkpoint.tensors.items()
        if is_of_pictures(name)
    }
    module.load_state_dict(state, strict=True)
    with torch.no_grad():
        outputs, _ = module({"pixels": torch.from_numpy(seeing.pixels)}, {})
    features = outputs["image_features"].numpy()
    np.testing.assert_allclose(features, seeing.exact, rtol=0, atol=1e-9)


def test_graph_for_the_cpu_equals_the_reference(seeing: Seeing, tmp_path: Path) -> None:
    """It has the same bits alone and in company, and with any number of threads."""
    file = str(exported_tower(seeing.checkpoint, tmp_path, "cpu", "float32"))
    signature = tower_signature(seeing.checkpoint, "cpu", "float32")
    towers = [CpuTower(file, signature, num_threads=threads) for threads in (1, 2, 7)]
    pixels = list(seeing.pixels)
    together = np.stack(towers[0].encode(pixels))
    for tower in towers:
        alone = [tower.encode([one])[0] for one in pixels[::-1]]
        np.testing.assert_array_equal(alone[::-1], together)
    worst = np.abs(together - seeing.exact).max()
    assert worst < TOLERANCE
    assert worst <= 2 * np.abs(seeing.float32 - seeing.exact).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_graph_for_cuda_has_kernels_and_equals_the_reference(
    seeing: Seeing, tmp_path: Path, dtype: str
) -> None:
    """Run on the CPU in float32, so it must equal a reference whose matrices are rounded.

    Several pictures are computed at once there.
    """
    graph = traced_tower(seeing.checkpoint, "cuda", dtype)
    assert unplaced(with_weights_as_inputs(graph)) == [], "nodes without a kernel for CUDA"
    source = exported_tower(seeing.checkpoint, tmp_path / "cuda", "cuda", dtype)
    for file in source.parent.glob("weights/*"):  # `onnx_ir` reads no hard links
        shutil.copyfile(file, tmp_path / file.name)
        (tmp_path / file.name).rename(file)
    features = run(cuda_file_on_cpu(source, tmp_path / "cpu.onnx"), seeing.pixels)
    with float64_throughout():
        model = rounded(getattr(torch, dtype)).double()
        exact = picture_rows(model, torch.from_numpy(seeing.pixels)).numpy()
    assert np.abs(features - exact).max() < TOLERANCE
    assert np.abs(exact - seeing.exact).max() > 10 * TOLERANCE  # the rounding shows


@torch.no_grad()
def rounded(dtype: torch.dtype) -> torch.nn.Module:
    """Return the model with what is a matrix in our graph as a dtype holds it."""
    model = seeing_gemma3n()
    for parameter in model.parameters():
        if parameter.ndim == 2 or parameter.shape[2:] == (1, 1):
            parameter.copy_(parameter.to(dtype))
    return model


@torch.no_grad()
def test_a_product_in_float16_holds_numbers_beyond_its_range() -> None:
    """The released tower has kernels whose products would be infinite."""
    torch.manual_seed(0)
    matrix = torch.nn.Linear(64, 32, bias=False)
    x = torch.randn(16, 64) * 3e5
    expected = matrix(x)
    found = product(matrix.half(), x)
    # float16 has 11 digits in base 2.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def full_config(**vision: Any) -> VisionConfig:
    raw = {"model_type": "gemma3n", "vision_config": {"model_type": "gemma3n_vision", **vision}}
    config = gemma3n_vision(raw, {})
    assert config is not None
    return config


def test_full_size_has_the_parameters_of_timm() -> None:
    """On a device without memory."""
    shapes = mobilenet_shapes(full_config(), 2048)
    tower = {n.removeprefix(TOWER): s for n, s in shapes.items() if n.startswith(TOWER)}
    assert sum(map(math.prod, tower.values())) == NUM_PARAMETERS
    with torch.device("meta"):
        reference = MobileNet(ARCHITECTURES[FULL]).state_dict()
    assert {n: tuple(k.shape) for n, k in flat(reference).items()} == tower


def test_full_size_is_traced_without_weights() -> None:
    size = next(size for size in NEWER_SIZES if size.name == "Gemma 3n E2B")
    vision = full_config()
    assert (vision.image_size, vision.num_image_tokens) == (768, 257)
    checkpoint = Checkpoint(**{**vars(checkpoint_of(size.config, size)), "vision": vision})
    graph = traced_tower(checkpoint, "cuda", "bfloat16").graph
    found = {n: tuple(v.shape) for n, v in graph.initializers.items() if v.const_value is None}
    assert found == mobilenet_shapes(vision, 2048)
    # All else are shapes, and the weights of norms of weight 1.
    others = [v.const_value.nbytes for v in graph.initializers.values() if v.const_value]
    assert sum(others) < 20_000


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"architecture": "mobilenetv5_base"},
            f"architecture: expected {FULL} or {TINY_NAME}, got",
        ),
        ({"hidden_size": 1024}, r"hidden_size: expected one of \(2048,\), got 1024"),
        ({"model_args": {"depth": 3}}, "model_args: expected one of"),
        ({"vocab_ofset": 3}, "the key 'vocab_ofset' is not known; did you mean vocab_offset"),
        ({"vocab_offset": 262_145}, "eoi_token_id: expected a whole number from 262,145"),
    ],
)
def test_settings_of_a_tower_that_cannot_be_computed_are_refused(
    section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        full_config(**section)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_normalize": True, "image_mean": [0.5] * 3}, "do_normalize: expected false"),
        ({"size": {"height": 512, "width": 512}}, "size: expected a height and a width of 768"),
        ({"image_seq_length": 64}, "image_seq_length: expected 256, got 64"),
        ({"do_resise": True}, "the key 'do_resise' is not known; did you mean do_resize"),
    ],
)
def test_settings_of_a_processor_that_makes_other_pixels_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    raw = {"model_type": "gemma3n", "vision_config": {}}
    with pytest.raises(ConfigError, match=message):
        gemma3n_vision(raw, settings)
