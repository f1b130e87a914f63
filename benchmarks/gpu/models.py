"""Makes models of given shapes with random weights, without a hub, for measuring only.

Timings do not depend on the weights' values, except that zeros multiply faster than other numbers.
A folder may come without its large files (those without a checksum); they are made again from their
sizes.
"""

import json
import shutil
from pathlib import Path

import numpy as np

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.signature import HEADS
from benchmarks.shapes import make_checkpoint
from export.__main__ import export
from export.checkpoints.released_sizes import Size

SPREAD = 0.02
"""Standard deviation of the weights."""
BLOCK = 1 << 22
"""Count of random numbers drawn; a file repeats them, each time rotated by `STRIDE` more."""
STRIDE = 4099


def ready(size: Size, folder: Path, *, device: Device, task: str, precision: str) -> Path:
    """Return the exported model folder of a size, made unless it exists."""
    model = folder / _folder_name(size)
    if not (model / "manifest.json").exists():
        checkpoint = folder / "checkpoint"
        shutil.rmtree(checkpoint, ignore_errors=True)
        make_checkpoint(size, checkpoint)
        dtype = "float32" if size.config.use_bidirectional_attention else "bfloat16"
        for file in sorted(checkpoint.rglob("*.safetensors")):
            fill(file, header_bytes(file), dtype)
        export(
            checkpoint, model, device=device, tasks=(task,), precision=precision, checksums="later"
        )
        shutil.rmtree(checkpoint)
    restore(model)
    Artifact.open(model).signature(HEADS[task], device)
    return model


def restore(model: Path) -> None:
    """Make the files without a checksum that are missing from a folder."""
    artifact = Artifact.read(model)
    for name, entry in artifact.files.items():
        file = model / name
        if not file.exists() and entry.sha256 is None:
            with file.open("wb") as stream:
                stream.truncate(entry.num_bytes)
            fill(file, 0, "float32" if artifact.precision == "fp32" else "bfloat16")


def fill(file: Path, start: int, dtype: str) -> None:
    """Overwrite a file with random numbers from byte `start` to its end."""
    drawn = (np.random.default_rng(0).standard_normal(BLOCK) * SPREAD).astype(np.float32)
    # A bfloat16 is the upper half of a float32.
    block = drawn if dtype == "float32" else (drawn.view(np.uint32) >> 16).astype(np.uint16)
    left = file.stat().st_size - start
    shift = 0
    with file.open("r+b") as stream:
        stream.seek(start)
        while left > 0:
            data = np.roll(block, shift).tobytes()[:left]
            stream.write(data)
            left -= len(data)
            shift += STRIDE


def header_bytes(file: Path) -> int:
    """Return the byte offset of the numbers in a safetensors file."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def hf_folder(size: Size, folder: Path) -> Path:
    """Return a folder with a Hugging Face `config.json`, for systems that draw their weights."""
    home = folder / f"{_folder_name(size)}-config"
    home.mkdir(parents=True, exist_ok=True)
    config = {
        **size.raw,
        "architectures": ["Gemma3ForCausalLM"],
        "dtype": "bfloat16",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    (home / "config.json").write_text(json.dumps(config))
    return home


def _folder_name(size: Size) -> str:
    return size.name.lower().replace(" ", "-")
