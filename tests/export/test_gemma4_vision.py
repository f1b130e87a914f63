"""How Gemma 4 sees: sizes and pixels as transformers', and the ladder of its graph of pictures."""

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)

from beam_gemma.errors import ConfigError
from beam_gemma.inputs.image_processor import ImageProcessor, kept_ratio
from beam_gemma.model.gemma4_vision import gemma4_vision
from beam_gemma.model.vision_config import IMAGE_TOKENS
from beam_gemma.runtime.device_memory import HostMemory
from beam_gemma.runtime.vision_session import CpuTower, CudaTower, patches_of
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.tensors import Checkpoint
from export.checkpoints.vision_tensors import is_of_pictures
from export.graph.tasks import graph_module
from tests.doubles.exported_tower import exported_tower, tower_signature
from tests.doubles.gemma4_seeing import (
    SEEING,
    STEP,
    picture_features,
    save_seeing_gemma4,
    seeing_gemma4,
)
from tests.doubles.reference import float64_throughout
from tests.doubles.seeing import picture

SIZES = ((1, 1), (2, 3), (5, 1), (4, 4))
"""Heights and widths of pictures in tokens."""
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Seeing:
    """A tiny model, its checkpoint, pictures, and what transformers makes of them."""

    checkpoint: Checkpoint
    pixels: list[np.ndarray]
    exact: list[np.ndarray]
    """Features of each picture in float64."""
    float32: list[np.ndarray]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seeing]:
    @cache
    def loaded(name: str) -> Seeing:
        model = seeing_gemma4(name)
        folder = save_seeing_gemma4(model, tmp_path_factory.mktemp(name))
        draw = np.random.default_rng(7)
        pixels = [draw.integers(0, 256, (3, a * STEP, b * STEP), np.uint8) for a, b in SIZES]
        float32 = [picture_features(model, torch.from_numpy(p)).numpy() for p in pixels]
        with float64_throughout():
            wide = model.double()
            exact = [picture_features(wide, torch.from_numpy(p)).numpy() for p in pixels]
        return Seeing(read_checkpoint(folder), pixels, exact, float32)

    return loaded


@pytest.fixture(params=SEEING)
def seeing(load: Callable[[str], Seeing], request: pytest.FixtureRequest) -> Seeing:
    return load(request.param)


def test_module_in_float64_equals_the_reference(seeing: Seeing) -> None:
    """Float64 leaves no room for a wrong formula."""
    checkpoint = seeing.checkpoint
    signature = tower_signature(checkpoint, "cpu", "float32")
    module = graph_module(checkpoint.config, None, signature, checkpoint.vision).double().eval()
    state = {
        name: torch.from_numpy(np.concatenate(list(stored.chunks())).astype(np.float64))
        for name, stored in checkpoint.tensors.items()
        if is_of_pictures(name)
    }
    module.load_state_dict(state, strict=True)
    for pixels, exact in zip(seeing.pixels, seeing.exact, strict=True):
        with torch.no_grad():
            feeds = {n: torch.from_numpy(x) for n, x in patches_of(pixels, signature).items()}
            outputs, _ = module(feeds, {})
        features = outputs["image_features"].numpy()
        np.testing.assert_allclose(features, exact, rtol=0, atol=1e-12)


def test_graph_for_the_cpu_equals_the_reference(seeing: Seeing, tmp_path: Path) -> None:
    file = str(exported_tower(seeing.checkpoint, tmp_path, "cpu", "float32"))
    signature = tower_signature(seeing.checkpoint, "cpu", "float32")
    one, two = (CpuTower(file, signature, num_threads=threads) for threads in (1, 2))
    worst, allowed = 0.0, 0.0
    together = two.encode(seeing.pixels)
    pictures = zip(seeing.pixels, together, seeing.exact, seeing.float32, strict=True)
    for pixels, features, exact, rounded in pictures:
        np.testing.assert_array_equal(features, one.encode([pixels])[0])
        worst = max(worst, float(np.abs(features - exact).max()))
        allowed = max(allowed, float(np.abs(rounded - exact).max()))
    assert worst < TOLERANCE
    assert worst <= 2 * allowed


def test_the_form_of_cuda_takes_pictures_of_any_size(seeing: Seeing, tmp_path: Path) -> None:
    """The graph is the CPU's, in a memory that stands in for a GPU's; it has room for 64 tokens."""
    file = str(exported_tower(seeing.checkpoint, tmp_path, "cpu", "float32"))
    signature = replace(tower_signature(seeing.checkpoint, "cpu", "float32"), num_image_tokens=64)
    tower = CudaTower(file, signature, HostMemory(), batch=2)
    pixels = [*seeing.pixels, seeing.pixels[0]]  # a small one after a large one too
    made = tower.encode(pixels)
    for features, expected in zip(made, CpuTower(file, signature).encode(pixels), strict=True):
        np.testing.assert_array_equal(features, expected)


@pytest.mark.parametrize("max_tokens", IMAGE_TOKENS)
def test_sizes_of_pictures_are_the_reference_s(max_tokens: int) -> None:
    sides = (1, 2, 17, 47, 48, 49, 300, 768, 1023, 2000, 9973)
    for height, width in itertools.product(sides, sides):
        expected = get_aspect_ratio_preserving_size(height, width, 16, 9 * max_tokens, 3)
        assert kept_ratio(height, width, 48, max_tokens) == expected


@pytest.mark.parametrize("max_tokens", [70, 280])
def test_pixels_are_the_reference_s(max_tokens: int) -> None:
    """Bits of uint8, from the files of pictures of several ratios."""
    vision = gemma4_vision({"model_type": "gemma4", "vision_config": {}}, {})
    assert vision is not None
    processor = ImageProcessor(vision, image_tokens=max_tokens)
    reference = Gemma4ImageProcessorPil(max_soft_tokens=max_tokens)
    for height, width in ((40, 60), (700, 300), (96, 2000), (768, 768)):
        file = picture(height, (width, height))
        [pixels] = processor.pixels(file)
        found = reference(Image.open(io.BytesIO(file)), return_tensors="np")
        count = int(found["num_soft_tokens_per_image"][0])
        assert vision.tokens_of(*pixels.shape[1:]) == count
        rows, columns = (side // 16 for side in pixels.shape[1:])
        cut = pixels.reshape(3, rows, 16, columns, 16).transpose(1, 3, 2, 4, 0)
        values = np.rint(found["pixel_values"][0][: rows * columns] * 255).astype(np.uint8)
        np.testing.assert_array_equal(cut.reshape(rows * columns, -1), values)
        assert not found["pixel_values"][0][rows * columns :].any()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"head_dim": 32}, "head_dim: expected one of"),
        ({"hidden_sizes": 3}, "the key 'hidden_sizes' is not known; did you mean"),
        ({"patch_size": 0}, "expected patch_size as a whole number"),
        ({"rope_parameters": {"rope_type": "default"}}, "expected axial rope_parameters"),
    ],
)
def test_settings_of_a_tower_that_cannot_be_computed_are_refused(
    section: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        gemma4_vision({"model_type": "gemma4", "vision_config": section}, {})
