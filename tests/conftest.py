"""Fixtures that several tests share: tiny models, exported once for a test run."""

import tests.type_checks  # noqa: F401 - before the modules whose checks it makes cheap

# isort: split
import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
import torch

from beam_gemma.model.artifact import Artifact
from beam_gemma.monitoring import progress
from beam_gemma.runtime.devices import onnxruntime
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.tensors import Checkpoint
from tests.doubles.emulators import Cloud, emulators
from tests.doubles.gemma4_models import GEMMA4_MODELS, gemma4_model
from tests.doubles.once import exporter_digest, kept
from tests.doubles.reference import MODELS, VOCAB, logits_of, save_checkpoint, tiny_model
from tests.doubles.traces import kept_trace

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

pytest_plugins = ["tests.budgets"]

# The same examples in every run: a failure found once is found again. How long one takes says more
# of what else the machine does; the time limits of tests hold nevertheless.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")

# PyTorch's second thread spins between the small operators of a tiny model: it adds ten times the
# CPU time and takes none off the wall time.
torch.set_num_threads(1)

SEQUENCE_LENGTHS = [9, 150, 40]
BUILDERS: dict[str, Callable[[str], torch.nn.Module]] = {
    **dict.fromkeys(MODELS, tiny_model),
    **dict.fromkeys(GEMMA4_MODELS, gemma4_model),
}
"""Functions that make the tiny decoders, by their names."""


@pytest.fixture(scope="session", autouse=True)
def no_lines_of_progress() -> Iterator[None]:
    """On a slow machine jobs would say how far they are, amid what tests expect them to say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "LINE_SECS", 3600.0)
        yield


class SleepingThreads(onnxruntime.SessionOptions):
    """Options of a session whose threads sleep while they wait."""

    def __init__(self) -> None:
        super().__init__()
        self.add_session_config_entry("session.intra_op.allow_spinning", "0")


@pytest.fixture(scope="session", autouse=True)
def no_spinning_threads() -> Iterator[None]:
    """Sessions of this process compute the same with threads that sleep instead of spin.

    A tiny model's step takes a millisecond, in which 16 threads that spin use whatever cores there
    are. How an operator's work is cut into parts depends on the number of threads alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", SleepingThreads)
        yield


@pytest.fixture(scope="session", autouse=True)
def graphs_traced_once() -> Iterator[None]:
    """Exports of this process take graphs that any process has traced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.__main__.trace", kept_trace)
        patch.setattr("export.graph.to_onnx.trace", kept_trace)
        yield


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


@pytest.fixture(scope="session")
def tiny_of() -> Callable[[str], TinyModel]:
    """Tiny models by their names; to export one takes longer than most tests."""
    return functools.cache(_tiny)


@pytest.fixture(scope="session", params=BUILDERS)
def tiny(request: pytest.FixtureRequest, tiny_of: Callable[[str], TinyModel]) -> TinyModel:
    """Each tiny model in turn."""
    return tiny_of(request.param)


@pytest.fixture(scope="session")
def tiny_gemma3(tiny_of: Callable[[str], TinyModel]) -> TinyModel:
    """The tiny Gemma 3 alone, for tests that need a model but not every one."""
    return tiny_of("gemma3_text")


@pytest.fixture(scope="session")
def all_tasks_model() -> str:
    """Folder of a tiny model that generates, classifies and embeds."""

    def make(folder: Path) -> None:
        checkpoint = save_checkpoint(tiny_model("gemma_mha"), folder / "checkpoint")
        export(checkpoint, folder / "model", tasks=["generate", "classify", "embed"])

    return str(kept(f"tiny-all-tasks-{exporter_digest()}", make) / "model")


@pytest.fixture(scope="session")
def gcp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """BigQuery and Cloud Storage on this machine."""
    with emulators(tmp_path_factory.mktemp("gcp")) as cloud:
        yield cloud


SENTENCE_MODELS = {
    "two-sided": {},
    "causal": {"use_bidirectional_attention": False},
    "last token": {"use_bidirectional_attention": False, "pooling": "lasttoken"},
}
"""Mean pooling unless it says otherwise; each with a window smaller than its texts."""


def _sentence(name: str, folder: Path) -> "tuple[SentenceTransformer, Artifact]":
    from tests.doubles.sentence_model import sentence_model  # imports take 10 seconds

    model = sentence_model(folder / "checkpoint", **SENTENCE_MODELS[name])

    def make(kept_folder: Path) -> None:
        checkpoint = shutil.copytree(folder / "checkpoint", kept_folder / "checkpoint")
        export(checkpoint, kept_folder / "artifact")

    folder = kept(f"sentence-{name.replace(' ', '-')}-{exporter_digest()}", make)
    return model, Artifact.open(folder / "artifact")


@pytest.fixture(scope="session")
def two_sided(
    tmp_path_factory: pytest.TempPathFactory,
) -> "tuple[SentenceTransformer, Artifact]":
    """A tiny EmbeddingGemma: the reference and what we made of it."""
    return _sentence("two-sided", tmp_path_factory.mktemp("two_sided"))


@pytest.fixture(scope="session", params=SENTENCE_MODELS)
def sentence(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    two_sided: "tuple[SentenceTransformer, Artifact]",
) -> "tuple[SentenceTransformer, Artifact]":
    """Each kind of model that embeds, in turn."""
    if request.param == "two-sided":
        return two_sided
    return _sentence(request.param, tmp_path_factory.mktemp("sentence"))


@pytest.fixture(scope="session")
def batch() -> list[str]:
    """Texts of mixed length, the longest beyond the windows."""
    from tests.doubles.sentence_model import texts

    return texts()


def _tiny(name: str) -> TinyModel:
    reference = BUILDERS[name](name)

    def make(folder: Path) -> None:
        export(save_checkpoint(reference, folder / "checkpoint"), folder / "artifact")

    folder = kept(f"tiny-{name}-{exporter_digest()}", make)
    rng = np.random.default_rng(7)
    sequences = [rng.integers(3, VOCAB, n).tolist() for n in SEQUENCE_LENGTHS]
    logits = [logits_of(reference, ids) for ids in sequences]
    exact = BUILDERS[name](name).double()
    return TinyModel(
        reference=reference,
        checkpoint=read_checkpoint(folder / "checkpoint"),
        artifact=Artifact.open(folder / "artifact"),
        sequences=sequences,
        logits=logits,
        exact_logits=[logits_of(exact, ids) for ids in sequences],
    )
