"""A tiny model that sees, for tests of whole jobs, and random pictures for it."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from export.__main__ import export
from tests.doubles.once import exporter_digest, kept
from tests.doubles.vision_models import save_vision_checkpoint, tiny_vision_model


def seeing_folder() -> str:
    """Return the folder of a tiny Gemma 3 that completes and scores prompts with pictures."""

    def make(folder: Path) -> None:
        checkpoint = save_vision_checkpoint(tiny_vision_model("gemma3"), folder / "checkpoint")
        export(checkpoint, folder / "model", tasks=["generate", "classify"])

    return str(kept(f"tiny-jobs-gemma3-{exporter_digest()}", make) / "model")


def picture(number: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    """Return the file of a random picture."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
