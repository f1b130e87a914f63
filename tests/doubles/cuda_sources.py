"""Tiny T5Gemma and T5Gemma 2 as graphs for CUDA that the CPU provider runs, beside references.

All stacks have 64 channels, so that the factor of embeddings is 8 in all types.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.model.signature import Signature
from export.__main__ import export
from tests.doubles.cuda_on_cpu import cuda_file_on_cpu
from tests.doubles.encoder_decoder_models import (
    ENCODER_WIDTH,
    model_config,
    save_encoder_decoder,
)
from tests.doubles.once import exporter_digest, kept
from tests.doubles.reference import draw_weights
from tests.doubles.vision_models import drawn


def rounded_model(name: str) -> torch.nn.Module:
    """Return a reference in float32 with weights that bfloat16 holds."""
    config = model_config(name)
    if name == "t5gemma2":
        model = drawn(transformers.T5Gemma2ForConditionalGeneration(config))
    else:
        config.decoder.hidden_size = ENCODER_WIDTH
        model = draw_weights(transformers.T5GemmaForConditionalGeneration(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


@dataclass(frozen=True)
class Exported:
    """An export, and graphs of it that the CPU provider runs."""

    artifact: Artifact
    device: Device
    folder: Path

    def graph(self, head: Head) -> tuple[str, Signature]:
        """Return the file of a graph and its signature, both with float32 in place of 16 bits."""
        signature = self.artifact.signature(head, self.device)
        path = self.artifact.graph_path(head, self.device)
        if self.device == "cpu":
            return str(path), signature

        def make(folder: Path) -> None:
            folder.mkdir()
            cuda_file_on_cpu(path, folder / "graph.onnx")

        folder = kept(f"{self.folder.name}-{head}-on-cpu", make)
        return str(folder / "graph.onnx"), replace(signature, dtype="float32")


@functools.cache
def exported_pair(
    name: str, device: Device, precision: str, tasks: tuple[str, ...] = ("generate",)
) -> Exported:
    """Return the export of a rounded reference, made once for an exporter."""

    def make(folder: Path) -> None:
        checkpoint = save_encoder_decoder(rounded_model(name), folder / "checkpoint")
        export(checkpoint, folder / "model", device=device, precision=precision, tasks=tasks)

    of = "-".join((name, device, precision, *tasks))
    folder = kept(f"rounded-{of}-{exporter_digest()}", make)
    return Exported(Artifact.open(folder / "model"), device, folder)
