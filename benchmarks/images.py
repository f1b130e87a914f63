"""Compares the speed of a tower of pictures with transformers and with the machine's matrix rate.

The tower has the shapes of every release, SigLIP So400m, with random weights: before PaliGemma's
projector at 224, 448 and 896 pixels, and before that of Gemma 3 4B. A decoder of one small layer
completes the checkpoint and is not run. Each system runs in its own process; transformers uses
the fastest of several batch sizes. On the CPU all is float32, on a GPU bfloat16.

python -m benchmarks.images --shape paligemma-224 --pictures 8 --output out/images.json
python -m benchmarks.images --shape gemma3-4b --pictures 256 --device cuda
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.vision_config import VisionConfig
from beam_gemma.runtime.vision_session import VisionSession
from benchmarks.gpu import card
from benchmarks.rate import matrix_rate
from export.__main__ import export, hide_messages
from export.checkpoints.released_sizes import TOWER

BATCH_SIZES = {"cpu": (1, 2, 4), "cuda": (1, 4, 16, 64)}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
BAR, SHARE_BAR = 1.2, 0.7
"""Least speed beside transformers', and least share of the matrix rate."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A released tower with its projector."""

    image_size: int
    hidden_size: int
    """Width of the decoder."""
    projector: str

    @property
    def num_image_tokens(self) -> int:
        """Tokens of the decoder that one picture takes."""
        return 256 if self.projector == "pooled" else (self.image_size // 14) ** 2


SHAPES = {
    "paligemma-224": Shape(image_size=224, hidden_size=2048, projector="linear"),
    "paligemma-448": Shape(image_size=448, hidden_size=2048, projector="linear"),
    "paligemma-896": Shape(image_size=896, hidden_size=2048, projector="linear"),
    "gemma3-4b": Shape(image_size=896, hidden_size=2560, projector="pooled"),
}


def operations(vision: VisionConfig, hidden_size: int) -> int:
    """Return the floating-point operations of one picture: all matrices and all attention pairs."""
    patches, width = vision.num_patches, vision.hidden_size
    matrices = 4 * width**2 + 2 * width * vision.intermediate_size
    attention = 4 * patches**2 * width
    embedding = 2 * patches * 3 * vision.patch_size**2 * width
    projector = 2 * vision.num_image_tokens * width * hidden_size
    layers = vision.num_hidden_layers * (2 * patches * matrices + attention)
    return embedding + layers + projector


def pictures_of(number: int, image_size: int) -> np.ndarray:
    """Return random pictures, uint8 [number, 3, image_size, image_size]."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (number, 3, image_size, image_size), np.uint8)


def run_ours(folder: Path, pictures: np.ndarray, device: Device) -> dict[str, Any]:
    """Return the time of our session in seconds; save its features."""
    session = VisionSession.of(Artifact.open(folder / "model"), device)
    session.encode(list(pictures[:1]))
    start = time.perf_counter()
    features = np.stack(session.encode(list(pictures)))
    seconds = time.perf_counter() - start
    if device == "cuda":  # bfloat16 comes as its bits
        features = features.view(ml_dtypes.bfloat16).astype(np.float32)
    np.save(folder / "ours.npy", features)
    return {"seconds": seconds}


def run_transformers(folder: Path, pictures: np.ndarray, device: Device) -> dict[str, Any]:
    """Return transformers' least time in seconds and its batch size; save its features."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        folder / "checkpoint", attn_implementation="sdpa", dtype=getattr(torch, DTYPES[device])
    )
    model = model.to(device)
    seconds = {}
    for size in [size for size in BATCH_SIZES[device] if size <= len(pictures)]:
        _features(model, pictures[:size], size)
        start = time.perf_counter()
        features = _features(model, pictures, size)
        seconds[size] = time.perf_counter() - start
    np.save(folder / "transformers.npy", features)
    best = min(seconds, key=lambda size: seconds[size])
    return {"seconds": seconds[best], "batch_size": best}


def _features(model: Any, pictures: np.ndarray, batch_size: int) -> np.ndarray:
    """Return transformers' features of pictures, computed in batches."""
    import torch

    found = []
    with torch.inference_mode():
        for first in range(0, len(pictures), batch_size):
            batch = torch.from_numpy(pictures[first : first + batch_size]).to(model.device)
            values = ((batch.float() / 255 - 0.5) / 0.5).to(model.dtype)
            found.append(model.get_image_features(values).pooler_output.float().cpu().numpy())
    return np.concatenate(found)


SYSTEMS = {"ours": run_ours, "transformers": run_transformers}


def prepare(folder: Path, shape: Shape, device: Device) -> None:
    """Write a checkpoint with random weights and export it, unless the model exists."""
    if (folder / "model").exists():
        return
    from tests.doubles.vision_models import name_of, preprocessor_settings, save_vision_checkpoint

    model = _random_model(shape)
    checkpoint = save_vision_checkpoint(model, folder / "checkpoint")
    settings = preprocessor_settings(name_of(model)) | {
        "size": {"height": shape.image_size, "width": shape.image_size},
        "image_seq_length": shape.num_image_tokens,
    }
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(settings))
    hide_messages()
    export(checkpoint, folder / "model", device=device, tasks=["generate"], checksums="later")


def _random_model(shape: Shape) -> Any:
    """Return a model of transformers with a released tower and a decoder of one small layer."""
    import torch
    import transformers

    from tests.doubles.vision_models import (
        BEGIN_ID,
        END_ID,
        GEMMA3_TEXT,
        GEMMA_TEXT,
        IMAGE_ID,
        SOFT_ID,
    )

    torch.manual_seed(0)
    text = {"hidden_size": shape.hidden_size, "num_hidden_layers": 1}
    tower = {**TOWER, "image_size": shape.image_size}
    if shape.projector == "linear":
        return transformers.PaliGemmaForConditionalGeneration(
            transformers.PaliGemmaConfig(
                text_config={**GEMMA_TEXT, **text},
                vision_config=tower,
                projection_dim=shape.hidden_size,
                hidden_size=shape.hidden_size,
                image_token_index=IMAGE_ID,
            )
        )
    layers: Any = GEMMA3_TEXT["layer_types"]
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={**GEMMA3_TEXT, **text, "layer_types": layers[:1]},
            vision_config=tower,
            mm_tokens_per_image=shape.num_image_tokens,
            boi_token_index=BEGIN_ID,
            eoi_token_index=END_ID,
            image_token_index=SOFT_ID,
        )
    )
    # transformers leaves the matrix at zero.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)
    return model


def rate(device: Device) -> float:
    """Return the operations per second of a large product on a device."""
    if device == "cpu":
        return matrix_rate()
    return card.rates(device, DTYPES[device]).operations_per_sec


def compare(folder: Path, shape: Shape, number: int, device: Device) -> dict[str, Any]:
    """Run each system in its own process and return the figures."""
    artifact = Artifact.open(folder / "model")
    assert artifact.vision is not None
    count = operations(artifact.vision, artifact.config.hidden_size)
    rates = [rate(device)]
    report: dict[str, Any] = {"pictures": number, "operations_per_picture": count}
    for name in SYSTEMS:
        command = [sys.executable, "-m", "benchmarks.images", "--system", name]
        command += ["--folder", str(folder), "--pictures", str(number)]
        command += ["--image_size", str(shape.image_size), "--device", device]
        report[name] = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        )
        rates.append(rate(device))
    # The best of several measurements, since other processes may use the machine.
    report["matrix_rate"] = max(rates)
    for name in SYSTEMS:
        seconds = report[name]["seconds"]
        report[name] |= {
            "pictures_per_second": number / seconds,
            "share_of_matrix_rate": count * number / seconds / max(rates),
        }
    ours, theirs = (np.load(folder / f"{name}.npy") for name in SYSTEMS)
    report["largest_difference"] = float(np.abs(ours - theirs).max())
    report["largest_feature"] = float(np.abs(theirs).max())
    report["times_faster"] = report["transformers"]["seconds"] / report["ours"]["seconds"]
    report["bars"] = {"times_faster": BAR, "share_of_matrix_rate": SHARE_BAR}
    return report


def main() -> None:
    """Run the benchmark, or one system of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("models/images-benchmark"))
    parser.add_argument("--shape", choices=SHAPES, default="paligemma-224")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--device", choices=DTYPES, default="cpu")
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--image_size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.system:
        pictures = pictures_of(args.pictures, args.image_size)
        figures = SYSTEMS[args.system](args.folder, pictures, args.device)
        sys.stdout.write(json.dumps(figures))
        return
    folder = args.folder / args.shape / args.device
    shape = SHAPES[args.shape]
    prepare(folder, shape, args.device)
    report = json.dumps(compare(folder, shape, args.pictures, args.device), indent=1) + "\n"
    sys.stdout.write(report)
    if args.output:
        args.output.write_text(report)


if __name__ == "__main__":
    main()
