"""The graph of a tower alone: traced and given its weights without the decoders beside it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from beam_gemma.model.artifact import graph_name
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.signature import Signature
from export.checkpoints.tensors import Checkpoint
from export.checkpoints.vision_tensors import is_of_pictures
from export.graph.signatures import vision_signature
from export.graph.tasks import graph_module
from export.graph.weights import WEIGHTS, attach
from tests.doubles.traces import kept_trace


def tower_signature(checkpoint: Checkpoint, device: Device, dtype: str) -> Signature:
    """Return the signature of a checkpoint's tower."""
    assert checkpoint.vision is not None
    return vision_signature(checkpoint.config, checkpoint.vision, device=device, dtype=dtype)


def traced_tower(checkpoint: Checkpoint, device: Device, dtype: str) -> ir.Model:
    """Return the graph of a checkpoint's tower, without its weights."""
    signature = tower_signature(checkpoint, device, dtype)
    build = partial(graph_module, checkpoint.config, None, signature, checkpoint.vision)
    return kept_trace(build, signature)


def exported_tower(checkpoint: Checkpoint, folder: Path, device: Device, dtype: str) -> Path:
    """Write the graph of a checkpoint's tower and its weights into a folder; return its file."""
    graph = traced_tower(checkpoint, device, dtype)
    pictures = {name: t for name, t in checkpoint.tensors.items() if is_of_pictures(name)}
    (folder / WEIGHTS).mkdir(parents=True)
    attach([graph], replace(checkpoint, tensors=pictures), folder)
    file = folder / graph_name("vision", device)
    ir.save(graph, file)
    return file
