"""The embed pipeline end to end, and embeddings within Beam's own transforms."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.ml.rag.types import Chunk, Content
from apache_beam.ml.transforms.base import MLTransform
from apache_beam.testing.util import assert_that
from apache_beam.typehints import List, Optional
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_gemma.cli import run as cli
from beam_gemma.errors import ArtifactError, OptionsError, RecordError
from beam_gemma.inference.handlers import GemmaEmbedModelHandler
from beam_gemma.inference.ml_transform import GemmaTextEmbeddings, VectorHandler
from beam_gemma.inference.transforms import Embed
from beam_gemma.tasks.text_encoder import EmbedSettings
from pipelines.embed import main
from tests.doubles.fake_models import local_pipeline
from tests.doubles.sentence_model import encode

ROOT = Path(__file__).parent.parent.parent
TEXTS = ["the cat", "in the hat", "a tent", "the cat"]
TOLERANCE = 2e-5


@pytest.fixture
def model(two_sided):
    return str(two_sided[1].path)


@pytest.fixture
def expected(two_sided):
    """The reference's embeddings of `TEXTS`."""
    return encode(two_sided[0], TEXTS)


@pytest.fixture
def run(monkeypatch, capsys, model, tmp_path):
    """Run the command line in this process over a table; return exit code, output and errors."""
    rows = {"id": range(5), "text": [*TEXTS, None], "title": ["x", None, "y", None, "z"]}
    pq.write_table(pa.table({k: list(v) for k, v in rows.items()}), tmp_path / "in.parquet")

    def run_with(*flags, output="out/v.parquet"):
        files = ["--input", tmp_path / "in.parquet", "--output", tmp_path / output]
        argv = ["embed", "--model", model, *files, *flags]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in argv])
        code = cli.exit_code(main)
        return code, *capsys.readouterr()

    return run_with


def close(vectors, expected):
    np.testing.assert_allclose(np.array(vectors, np.float32), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_table_to_table(run, tmp_path, expected, dtype):
    code, out, _ = run("--text_column", "text", "--embedding_dtype", dtype)
    assert code == cli.SUCCESS
    assert "read 5 = ok 4 + failed 1 = written 5 rows" in out
    [file] = (tmp_path / "out").glob("v-*")
    table = pq.read_table(file).sort_by("id")
    assert table.schema.field("embedding").type.value_type == pa.type_for_alias(dtype)
    results = table.to_pylist()
    tolerance = {"float32": TOLERANCE, "float16": 5e-4}[dtype]
    vectors = np.array([row["embedding"] for row in results[:4]], np.float32)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=tolerance)
    assert (results[4]["embedding"], results[4]["num_tokens"]) == (None, None)
    assert "column 'text': expected a value" in results[4]["error"]


def test_json_lines_and_titles(run, tmp_path, two_sided):
    flags = ["--text_column", "text", "--title_column", "title", "--truncate_dim", "128"]
    code, _, _ = run(*flags, output="out/v.jsonl")
    assert code == cli.SUCCESS
    [file] = (tmp_path / "out").glob("v-*")
    rows = {row["id"]: row for row in map(json.loads, file.read_text().splitlines())}
    theirs = encode(two_sided[0], ["title: x | text: the cat"])[:, :128]
    close([rows[0]["embedding"]], theirs / np.linalg.norm(theirs))


def test_a_dry_run_shows_texts_behind_their_prompts(run, tmp_path):
    code, out, _ = run("--text_column", "text", "--prompt_name", "query", "--dry_run")
    assert code == cli.SUCCESS
    assert "<bos>task: search result | query: the cat<eos>" in out
    assert "rows that would fail: 1 of the sample" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ([], "text: expected --text_column or --image_column, got none"),
        (["--image_column", "text"], "expected a model that takes pictures, for text, got"),
        (["--text_column", "text", "--image_tokens", "70"], "expected image_columns beside it"),
        (["--text_column", "txt"], "did you mean text?"),
        (["--text_column", "id"], "column 'id': expected string, got int64"),
        (["--text_column", "text", "--prompt_name", "qery"], "got 'qery'; did you mean query?"),
        (["--text_column", "text", "--prompt", "x", "--prompt_name", "query"], "one source"),
        (["--text_column", "text", "--title_column", "title", "--prompt_name", "query"], "one sou"),
        (["--text_column", "text", "--truncate_dim", "100"], "expected 160, 128, got 100"),
        (["--text_column", "text", "--max_num_seqs", "4"], "unknown flag --max_num_seqs"),
    ],
)
def test_what_cannot_work_is_refused(run, flags, error):
    code, _, err = run(*flags)
    assert code == cli.USAGE
    assert error in err


def test_a_model_for_another_task_is_refused(tiny_gemma3):
    with pytest.raises(ArtifactError, match=r"expected a graph to embed.*--tasks embed"):
        GemmaEmbedModelHandler(str(tiny_gemma3.artifact.path))


def test_a_graph_that_is_not_its_models_is_refused(two_sided, tmp_path):
    """One is causal and the other is not: nothing is embedded with it."""
    folder = shutil.copytree(two_sided[1].path, tmp_path / "model")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["use_bidirectional_attention"] = False
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"expected causal attention .* got two-sided"):
        GemmaEmbedModelHandler(str(folder), large_model=False).load_model()


def test_rows_keep_their_schema(model, expected):
    settings = EmbedSettings(text_column="text")
    fields = RowTypeConstraint.from_fields([("key", int), ("text", str)])
    with local_pipeline() as pipeline:
        rows = pipeline | beam.Create(list(enumerate(TEXTS)))
        rows |= beam.MapTuple(lambda i, t: beam.Row(key=i, text=t)).with_output_types(fields)
        results = rows | Embed(GemmaEmbedModelHandler(model, settings, large_model=False))
        assert dict(results.element_type._fields)["embedding"] == Optional[List[float]]

        def check(found):
            found = sorted(found, key=lambda row: row.key)
            close([row.embedding for row in found], expected)

        assert_that(results, check)


def test_rows_without_a_text_column_are_refused(model):
    with pytest.raises(OptionsError, match="expected one of text_column, image_columns, got"):
        Embed(GemmaEmbedModelHandler(model))


def test_columns_within_an_ml_transform(model, expected, tmp_path):
    transform = GemmaTextEmbeddings(model, columns=["a", "b"])
    with local_pipeline() as pipeline:
        rows = pipeline | beam.Create([{"a": t, "b": "a tent", "id": i} for i, t in
                                       enumerate(TEXTS)])  # fmt: skip
        ml = MLTransform(write_artifact_location=str(tmp_path)).with_transform(transform)

        def check(found):
            found = sorted(found, key=lambda row: row["id"])
            close([row["a"] for row in found], expected)
            close([row["b"] for row in found], expected[[2] * 4])

        assert_that(rows | ml, check)


def test_a_text_without_an_embedding_is_not_quoted(model):
    """The error ends the job and is in its log."""
    handler = VectorHandler(model, EmbedSettings())
    loaded = handler.load_model()
    with pytest.raises(RecordError, match=r"^text 1 of a batch of 2 .*: text: .*shorten") as error:
        handler.run_inference(["the cat", "hush " * 5000], loaded)
    assert "hush" not in str(error.value)


def test_chunks_of_a_rag_ingestion(model, two_sided, tmp_path):
    transform = GemmaTextEmbeddings(model, prompt_name="document", truncate_dim=128)
    theirs = encode(two_sided[0], TEXTS, prompt_name="document")[:, :128]
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    with local_pipeline() as pipeline:
        chunks = pipeline | beam.Create(
            [Chunk(content=Content(text=text), id=str(i)) for i, text in enumerate(TEXTS)]
        )
        ml = MLTransform(write_artifact_location=str(tmp_path)).with_transform(transform)

        def check(found):
            found = sorted(found, key=lambda chunk: chunk.id)
            close([chunk.embedding.dense_embedding for chunk in found], theirs)

        assert_that(chunks | ml, check)


def test_help_is_complete():
    command = [sys.executable, "-m", "pipelines.embed", "--help"]
    text = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    for flag in ("--text_column", "--title_column", "--truncate_dim", "--max_num_batched_tokens"):
        assert flag in text
