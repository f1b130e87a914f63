"""The decoder of segment tokens, against the published architecture in PyTorch."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from beam_gemma.errors import OptionsError
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.mask_decoder import CODEBOOK, TENSORS, MaskDecoder

CODES = (5, 127, 0, 64, 3, 3, 90, 17, 28, 51, 101, 76, 8, 45, 33, 120)


class Residual(nn.Module):
    """A residual block of the published decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
            nn.Conv2d(128, 128, 1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.net(x)


def published():
    """Return the decoder as its names and shapes say, layer by layer."""
    up = {"kernel_size": 4, "stride": 2, "padding": 1}
    return nn.Sequential(
        nn.Conv2d(512, 128, 1), nn.ReLU(), Residual(), Residual(),
        nn.ConvTranspose2d(128, 128, **up), nn.ReLU(),
        nn.ConvTranspose2d(128, 64, **up), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, **up), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, **up), nn.ReLU(),
        nn.Conv2d(16, 1, 1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return published()


@pytest.fixture(scope="module")
def weights(model):
    codebook = torch.randn(128, 512, generator=torch.Generator().manual_seed(1))
    named = {f"decoder.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    # The other half of the published file.
    return named | {CODEBOOK: codebook.numpy(), "encoder.0.bias": np.zeros(3, np.float32)}


def test_names_and_shapes_are_the_published_ones(weights):
    del weights["encoder.0.bias"]
    assert dict(TENSORS) == {name: tensor.shape for name, tensor in weights.items()}
    weights["encoder.0.bias"] = np.zeros(3, np.float32)


def test_a_mask_is_the_published_decoders(model, weights):
    entries = torch.from_numpy(weights[CODEBOOK][list(CODES)])
    with torch.no_grad():
        wanted = model.double()(entries.double().view(4, 4, 512).permute(2, 0, 1)[None])[0, 0]
    model.float()
    mask = MaskDecoder(weights).mask(CODES)
    assert mask.shape == (64, 64)
    assert mask.dtype == np.float32
    assert wanted.std() > 1e-3
    np.testing.assert_allclose(mask, wanted.numpy(), atol=1e-6)


def test_a_picture_of_a_mask(weights, tmp_path):
    np.savez(tmp_path / "decoder.npz", **weights)
    decoder = MaskDecoder.from_file(tmp_path / "decoder.npz")
    mask = decoder.mask(CODES)
    picture = np.asarray(Image.open(io.BytesIO(decoder.png(CODES))))
    assert picture.dtype == np.uint8
    assert ((picture >= 128) == (mask >= 0)).all()
    np.testing.assert_allclose(picture / 127.5 - 1, np.clip(mask, -1, 1), atol=0.5 / 127.5 + 1e-6)
    bright = MaskDecoder(weights | {"decoder.12.bias": np.array([9.0])})
    assert np.asarray(Image.open(io.BytesIO(bright.png(CODES)))).min() == 255


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.4.bias"), "expected a tensor decoder.4.bias, got none"),
        (lambda w: w.update({CODEBOOK: w[CODEBOOK][:64]}), r"\(128, 512\)"),
        (lambda w: w.update({"decoder.12.bias": np.zeros(1, np.int64)}), "int64"),
    ],
)
def test_other_tensors_are_refused(weights, tmp_path, change, message):
    damaged = dict(weights)
    change(damaged)
    np.savez(tmp_path / "decoder.npz", **damaged)
    with pytest.raises(OptionsError, match=message):
        MaskDecoder.from_file(tmp_path / "decoder.npz")


def test_files_that_hold_no_decoder_are_refused(weights, tmp_path):
    path = tmp_path / "decoder.npz"
    np.savez(path, **weights)
    whole = path.read_bytes()
    contents = (
        b"", b"not a file of arrays", whole[:1000], whole[:-100], whole[:3000] + b"?" + whole[3001:]
    )  # fmt: skip
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(OptionsError, match="mask decoder"):
            MaskDecoder.from_file(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    for other in ("missing.npz", "array.npy", "."):
        with pytest.raises(OptionsError, match="mask decoder"):
            MaskDecoder.from_file(tmp_path / other)


def test_a_job_depends_on_the_content_of_its_decoder(weights, tmp_path):
    digests = {}
    for name, bias in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        np.savez(tmp_path / name, **weights | {"decoder.12.bias": np.array([bias])})
        settings = GenerateSettings(
            prompt="x", boxes=True, mask_decoder=str(tmp_path / f"{name}.npz")
        )
        digests[name] = settings.parameters["mask_decoder"]
    assert digests["a"] == digests["b"] != digests["c"]
    assert "mask_decoder" not in GenerateSettings(prompt="x", boxes=True).parameters
    with pytest.raises(OptionsError, match=r"mask decoder missing\.npz"):
        _ = GenerateSettings(prompt="x", boxes=True, mask_decoder="missing.npz").parameters
