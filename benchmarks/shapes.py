"""Exports a checkpoint of every released size's shapes; reports time, memory and parameters.

    python -m benchmarks.shapes --folder /tmp/shapes
    python -m benchmarks.shapes --folder /tmp/shapes --only 'Gemma 3 27B'

Each checkpoint consists of sparse safetensors files (nominally 54 GB for 27B, a few KB on disk),
exported in its own process: decoders in bfloat16 for CUDA, with their encoders and towers of
pictures, and EmbeddingGemma in float32 for the CPU with its sentence-transformers modules. Prints a
Markdown table.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from beam_gemma.model.artifact import graph_name
from beam_gemma.model.graph_tensors import Head
from beam_gemma.model.signature import HEADS
from benchmarks.table import table
from export.checkpoints.encoder_decoder_folder import NORMS, SHARED
from export.checkpoints.newer_sizes import NEWER_SIZES
from export.checkpoints.released_sizes import (
    ENCODER_DECODER_SIZES,
    RECURRENT_SIZES,
    SIZES,
    VISION_SIZES,
    Size,
)
from export.checkpoints.tensors import ENCODER
from export.checkpoints.vision_tensors import PATCHES, PROJECTOR, TOWER
from export.graph.weights import safetensors_header
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

SHARD_BYTES = 5e9
ITEM_BYTES = {"BF16": 2, "F32": 4}
ALL_SIZES = (*SIZES, *VISION_SIZES, *RECURRENT_SIZES, *ENCODER_DECODER_SIZES, *NEWER_SIZES)
END = "<end_of_image>"
MARKER_IDS = {"boi_token_index": 6, "eoi_token_index": 300}
"""Ids of the pieces around a picture in the tiny tokenizer, the last of which is `END`."""
ROUNDED = re.compile(r"\d+[BM]")
DENSE = 3072
"""Width between the two dense layers of EmbeddingGemma."""
HEADER = ("size", "parameters", "published", "seconds", "memory, GB", "written, MB", "linked, GB")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Cost and result of exporting one size."""

    num_parameters: int
    num_embedded: int
    """Number of these parameters in the embedding."""
    seconds: float
    memory_bytes: int
    written_bytes: int
    linked_bytes: int


def make_checkpoint(size: Size, folder: Path) -> None:
    """Write config, index and sparse shards with Hugging Face's names."""
    folder.mkdir(parents=True)
    raw: dict[str, Any] = dict(size.raw)
    if size.vision is not None and size.encoder is not None:
        raw["encoder"] = {**raw["encoder"], **MARKER_IDS}
    elif "boi_token_index" in raw:
        raw |= MARKER_IDS
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model((END,)))
    is_encoder = size.config.use_bidirectional_attention
    dtype = "F32" if is_encoder else "BF16"
    shapes = [(hf_name(name, size), shape) for name, shape in hf_shapes(size).items()]
    num_bytes = ITEM_BYTES[dtype] * sum(math.prod(shape) for _, shape in shapes)
    num_shards = math.ceil(num_bytes / SHARD_BYTES)
    weight_map = {}
    for i in range(num_shards):
        shard = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        write_sparse(folder / shard, dict(shapes[i::num_shards]), dtype)
        weight_map |= {name: shard for name, _ in shapes[i::num_shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if is_encoder:
        make_modules(folder, size.config.hidden_size)


def write_sparse(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Write a sparse safetensors file: only the header takes space on disk."""
    sizes = {name: ITEM_BYTES[dtype] * math.prod(shape) for name, shape in shapes.items()}
    header = safetensors_header((n, dtype, shape, sizes[n]) for n, shape in shapes.items())
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(sizes.values()))


def make_modules(folder: Path, width: int) -> None:
    """Write EmbeddingGemma's sentence-transformers modules: pooling, two dense layers, norm."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Dense": "Dense",
             "4_Normalize": "Normalize"}  # fmt: skip
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in kinds:
        (folder / path).mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    for path, (rows, columns) in {"2_Dense": (DENSE, width), "3_Dense": (width, DENSE)}.items():
        settings = {"in_features": columns, "out_features": rows, "bias": False,
                    "activation_function": "torch.nn.modules.linear.Identity"}  # fmt: skip
        (folder / path / "config.json").write_text(json.dumps(settings))
        shapes = {"linear.weight": (rows, columns)}
        write_sparse(folder / path / "model.safetensors", shapes, "F32")


def hf_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a published checkpoint, with patches' kernel as it is stored."""
    shapes, vision = size.tensor_shapes(), size.vision
    if vision is not None:
        shapes[PATCHES] = (vision.hidden_size, 3, vision.patch_size, vision.patch_size)
    return shapes


def hf_name(name: str, size: Size) -> str:
    """Return a tensor's name in a published checkpoint."""
    if size.encoder is not None:
        return pair_name(name, is_second=size.vision is not None)
    if size.vision is not None:
        tower = name.replace(TOWER, f"{TOWER}vision_model.", 1)
        return tower if name.startswith((TOWER, PROJECTOR)) else f"language_model.model.{name}"
    if size.config.is_recurrent:
        return "model.final_norm.weight" if name == "norm.weight" else f"model.{name}"
    if size.config.model_type == "vaultgemma":
        name = name.replace("post_attention_layernorm", "pre_feedforward_layernorm")
    return name if size.config.use_bidirectional_attention else f"model.{name}"


def pair_name(name: str, *, is_second: bool) -> str:
    """Return a tensor's name in a published T5Gemma, or in a T5Gemma 2."""
    for theirs, ours in NORMS.items():
        name = name.replace(ours, theirs)
    text = "encoder.text_model." if is_second else ENCODER
    for theirs, ours in SHARED.items() if is_second else ():
        name = text + theirs if name == ours else name
    if name.startswith((TOWER, PROJECTOR)):
        return f"model.encoder.{name}"
    if name.startswith(ENCODER):
        name = text + name.removeprefix(ENCODER).removeprefix("text_model.")
        return f"model.{name}"
    return f"model.decoder.{name}"


def export(size: Size, folder: Path) -> Export:
    """Export a checkpoint of this size's shapes, then delete both."""
    shutil.rmtree(folder, ignore_errors=True)
    make_checkpoint(size, folder / "checkpoint")
    is_encoder = size.config.use_bidirectional_attention
    task, device = ("embed", "cpu") if is_encoder else ("generate", "cuda")
    command = [sys.executable, "-m", "export", "--checkpoint", folder / "checkpoint",
               "--output", folder / "exported", "--device", device, "--tasks", task,
               "--checksums", "later"]  # fmt: skip
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"{size.name}: the export failed")
    counts = {}
    heads: list[Head] = [HEADS[task]]
    heads += ["vision"] if size.vision is not None else []
    heads += ["encode"] if size.encoder is not None else []
    for head in heads:
        file = folder / "exported" / graph_name(head, device)
        graph = onnx.load(file, load_external_data=False).graph
        counts |= {value.name: math.prod(value.dims) for value in graph.initializer}
    sizes = {False: 0, True: 0}
    for file in (folder / "exported").rglob("*"):
        if file.is_file():
            sizes[file.stat().st_nlink > 1] += file.stat().st_size
    shutil.rmtree(folder)
    return Export(
        num_parameters=sum(n for name, n in counts.items() if name in size.tensor_shapes()),
        num_embedded=counts["embed_tokens.weight"],
        seconds=seconds,
        memory_bytes=usage.ru_maxrss * 1024,
        written_bytes=sizes[False],
        linked_bytes=sizes[True],
    )


def row(size: Size, result: Export) -> list[str]:
    """Return a line of the table; exit if the count differs from the published one."""
    counted = result.num_parameters - (0 if size.counts_embedding else result.num_embedded)
    if size.num_parameters not in (None, counted):
        raise SystemExit(f"{size.name}: {counted:,} parameters, {size.num_parameters:,} published")
    what = "" if size.counts_embedding else " without embedding"
    return [
        size.name,
        f"{result.num_parameters:,}",
        f"{size.num_parameters:,}{what}" if size.num_parameters else rounded(size.name),
        f"{result.seconds:.0f}",
        f"{result.memory_bytes / 1e9:.2f}",
        f"{result.written_bytes / 1e6:.1f}",
        f"{result.linked_bytes / 1e9:.1f}",
    ]


def rounded(name: str) -> str:
    """Return what a name says of the number of parameters."""
    return "-".join(ROUNDED.findall(name)) or "none"


def main() -> None:
    """Export the chosen sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="Where to work; emptied.")
    names = [size.name for size in ALL_SIZES]
    parser.add_argument("--only", action="append", choices=names, help="Sizes (default: all).")
    args = parser.parse_args()
    chosen = [size for size in ALL_SIZES if size.name in (args.only or names)]
    print(table(HEADER, [row(size, export(size, args.folder)) for size in chosen]))


if __name__ == "__main__":
    main()
