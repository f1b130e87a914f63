"""Fixtures that several tests share: tiny models, exported once for a test run."""

from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from beam_gemma.artifact import Artifact
from export.__main__ import export
from export.checkpoint import read_checkpoint
from export.tensors import Checkpoint
from tests.reference import MODELS, VOCAB, logits_of, save_checkpoint, tiny_model

# The same examples in every run: a failure found once is found again.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

SEQUENCE_LENGTHS = [9, 150, 40]


@dataclass(frozen=True)
class TinyModel:
    """One tiny model: the reference, its checkpoint and what we made of it."""

    reference: torch.nn.Module
    checkpoint: Checkpoint
    artifact: Artifact
    sequences: list[list[int]]
    logits: list[np.ndarray]
    """Of the reference in float32."""
    exact_logits: list[np.ndarray]
    """Of the reference in float64."""


@pytest.fixture(scope="session", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Each tiny model in turn."""
    return _tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The tiny Gemma 3 alone, for tests that need a model but not every one."""
    return _tiny("gemma3_text", tmp_path_factory.mktemp("tiny_gemma3"))


def _tiny(name: str, folder: Path) -> TinyModel:
    reference = tiny_model(name)
    source = save_checkpoint(reference, folder / "checkpoint")
    export(source, folder / "artifact")
    rng = np.random.default_rng(7)
    sequences = [rng.integers(3, VOCAB, n).tolist() for n in SEQUENCE_LENGTHS]
    logits = [logits_of(reference, ids) for ids in sequences]
    exact = tiny_model(name).double()
    return TinyModel(
        reference=reference,
        checkpoint=read_checkpoint(source),
        artifact=Artifact.open(folder / "artifact"),
        sequences=sequences,
        logits=logits,
        exact_logits=[logits_of(exact, ids) for ids in sequences],
    )
