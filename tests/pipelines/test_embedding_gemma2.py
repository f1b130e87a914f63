"""A table of texts embedded with an EmbeddingGemma 2, from the command line to the vectors."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer

from beam_gemma.cli import run as cli
from pipelines.embed import main
from tests.doubles.embedding_gemma2_models import WIDTH, save_text, tiny_embedder
from tests.doubles.sentence_model import encode, texts

TEXTS = texts(12)
TOLERANCE = 2e-5
"""Of float32 embeddings of length 1."""
Run = Callable[..., tuple[int, str, np.ndarray]]
"""Function of flags that returns the exit code, the errors and the embeddings of `TEXTS`."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """The same model in sentence-transformers."""
    return save_text("embedding_gemma2", tmp_path_factory.mktemp("reference") / "model")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    table = pa.table({"id": list(range(len(TEXTS))), "body": TEXTS})
    pq.write_table(table, tmp_path / "in.parquet")

    def run_with(*flags: str) -> tuple[int, str, np.ndarray]:
        model = tiny_embedder().artifact.path
        files = ["--input", tmp_path / "in.parquet", "--output", tmp_path / "out/v.parquet"]
        argv = ["embed", "--model", model, *files, "--text_column", "body", *flags]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in argv])
        code = cli.exit_code(main)
        written = list((tmp_path / "out").glob("v-*"))
        rows = pq.read_table(written[0]).sort_by("id").to_pylist() if written else []
        vectors = np.array([row["embedding"] for row in rows], np.float32)
        return code, capsys.readouterr().err, vectors

    return run_with


@pytest.mark.parametrize("name", ["query", "document", "Clustering", "sts"])
def test_prompts_by_their_names(reference: SentenceTransformer, run: Run, name: str) -> None:
    code, _, vectors = run("--prompt_name", name)
    assert code == cli.SUCCESS
    known = {"sts": "STS"}.get(name, name)
    theirs = encode(reference, TEXTS, prompt_name=known)
    np.testing.assert_allclose(vectors, theirs, rtol=0, atol=TOLERANCE)
    assert vectors.shape == (len(TEXTS), WIDTH)


def test_vectors_that_are_cut_have_length_one(reference: SentenceTransformer, run: Run) -> None:
    code, _, vectors = run("--prompt_name", "query", "--truncate_dim", "128")
    assert code == cli.SUCCESS
    theirs = encode(
        reference, TEXTS, prompt_name="query", truncate_dim=128, normalize_embeddings=True
    )
    np.testing.assert_allclose(vectors, theirs, rtol=0, atol=TOLERANCE)
    cosines = (vectors.astype(np.float64) * theirs).sum(axis=1)
    # float32; vectors of length 1.
    np.testing.assert_allclose(cosines, 1, rtol=0, atol=1e-6)


def test_a_prompt_that_the_model_lacks_is_refused(run: Run) -> None:
    code, errors, _ = run("--prompt_name", "clusterin")
    assert code == cli.USAGE
    assert "got 'clusterin'; did you mean Clustering?" in errors
