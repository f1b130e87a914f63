"""A table of texts and pictures embedded with an EmbeddingGemma 2, from the flags to the vectors.

Pictures take about 60 tokens, five times what a layer with a window sees on each side.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.util import assert_that

from beam_gemma import batches
from beam_gemma.cli import run as cli
from beam_gemma.errors import OptionsError
from beam_gemma.inference.handlers import GemmaEmbedModelHandler
from beam_gemma.inference.transforms import Embed
from beam_gemma.model.artifact import Artifact
from beam_gemma.tasks.text_encoder import EmbedSettings
from pipelines.embed import main
from tests.doubles.embedding_gemma2_models import PROMPTS, WIDTH, tiny_embedder
from tests.doubles.embedding_pictures import read
from tests.doubles.fake_models import local_pipeline
from tests.doubles.seeing import picture
from tests.doubles.sentence_model import texts

TOLERANCE = 2e-5
"""Of float32 embeddings of length 1."""
SIZES = ((40, 30), (15, 60), (64, 64), (7, 5))
"""Widths and heights in pixels."""
TEXTS = texts(16)
Run = Callable[..., tuple[int, str, str]]
"""Function of flags that returns the exit code, the output and the errors."""


def row_of(number: int) -> dict[str, Any]:
    """Return a row with a text, a picture, both, or two pictures and a text."""
    kind = number % 4
    first, second = (picture(i, SIZES[i % 4]) for i in (number // 4, number + 7))
    photos = [None, [first], [first], [first, second]][kind]
    return {"id": number, "name": None if kind == 1 else TEXTS[number], "photo": photos}


ROWS = [row_of(number) for number in range(16)]


def expected(prompt_name: str, **options: int) -> np.ndarray:
    """Return the reference's embeddings of `ROWS`."""
    prompt = PROMPTS[prompt_name]
    seen = (read(r["photo"] or [], r["name"], prompt=prompt, **options) for r in ROWS)
    return np.stack([row.embedding() for row in seen])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def run_with(
        *flags: str,
        rows: list[dict[str, Any]] = ROWS,
        output: str = "out/v.parquet",
        model: Path | None = None,
    ) -> tuple[int, str, str]:
        kinds = {"id": pa.int64(), "name": pa.string(), "photo": pa.list_(pa.binary())}
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(kinds)), tmp_path / "in.parquet")
        model = model or tiny_embedder().seeing.path
        files = ["--input", tmp_path / "in.parquet", "--output", tmp_path / output]
        columns = ["--text_column", "name", "--image_column", "photo"]
        argv = ["embed", "--model", model, *files, *columns, *flags]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in argv])
        return cli.exit_code(main), *capsys.readouterr()

    return run_with


def results(folder: Path, output: str = "out") -> list[dict[str, Any]]:
    """Return the rows of an output in the order of their ids."""
    [file] = (folder / output).glob("v-*")
    return pq.read_table(file).sort_by("id").to_pylist()


def vectors(rows: list[dict[str, Any]]) -> np.ndarray:
    assert [row["error"] for row in rows] == [None] * len(rows)
    return np.array([row["embedding"] for row in rows], np.float32)


@pytest.mark.parametrize(("name", "tokens"), [("document", None), ("query", 140)])
def test_texts_pictures_and_both(run: Run, tmp_path: Path, name: str, tokens: int | None) -> None:
    flags = [] if tokens is None else [f"--image_tokens={tokens}"]
    code, out, err = run("--allow_missing_images", "--prompt_name", name, *flags)
    assert code == cli.SUCCESS, err
    assert "read 16 = ok 16 + failed 0 = written 16 rows" in out
    rows = results(tmp_path)
    assert [row["photo"] for row in rows] == [row["photo"] for row in ROWS]
    theirs = expected(name, **({} if tokens is None else {"max_soft_tokens": tokens}))
    found = vectors(rows)
    assert found.shape == (16, WIDTH)
    np.testing.assert_allclose(found, theirs, rtol=0, atol=TOLERANCE)
    cosines = (found.astype(np.float64) * theirs).sum(axis=1)
    # float32; vectors of length 1.
    np.testing.assert_allclose(cosines, 1, rtol=0, atol=1e-6)
    distances = np.abs(found[:, None] - found[None]).max(-1)
    assert distances[~np.eye(16, dtype=bool)].min() > 100 * TOLERANCE, "rows differ"


def test_vectors_that_are_cut_have_length_one(run: Run, tmp_path: Path) -> None:
    code, _, err = run("--allow_missing_images", "--prompt_name=query", "--truncate_dim=128")
    assert code == cli.SUCCESS, err
    theirs = expected("query")[:, :128]
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors(results(tmp_path)), theirs, rtol=0, atol=TOLERANCE)


def test_bad_pictures_are_errors_of_their_rows(run: Run, tmp_path: Path) -> None:
    """No other row changes, not even the one with the same good picture."""
    good, cut = picture(1), picture(2)[:-300]
    photos = [[good], [b"no picture"], [cut], [good, cut], None, [good], [picture(3)]]
    names = ["a", "a", "a", "a", "a", None, None]
    rows = [
        {"id": i, "name": name, "photo": photo}
        for i, (name, photo) in enumerate(zip(names, photos, strict=True))
    ]
    code, out, err = run(rows=rows)
    assert code == cli.SUCCESS, err
    assert "read 7 = ok 3 + failed 4 = written 7 rows" in out
    found = results(tmp_path)
    errors = [row["error"] for row in found]
    assert [error is None for error in errors] == [True, False, False, False, False, True, True]
    assert "column 'photo': expected a picture" in errors[1]
    assert errors[2].startswith("column 'photo': ")
    assert errors[3].startswith("column 'photo', picture 2: ")
    assert errors[4].startswith("column 'photo': expected a picture, got null; filter such rows")
    theirs = [read([good], "a"), read([good], None), read([picture(3)], None)]
    ours = vectors([found[0], *found[5:]])
    stacked = np.stack([row.embedding() for row in theirs])
    np.testing.assert_allclose(ours, stacked, rtol=0, atol=TOLERANCE)


def test_a_row_without_anything_is_an_error(run: Run, tmp_path: Path) -> None:
    rows = [{"id": 0, "name": None, "photo": None}, {"id": 1, "name": None, "photo": [picture(0)]}]
    code, _, err = run("--allow_missing_images", rows=rows)
    assert code == cli.SUCCESS, err
    nothing, seen = results(tmp_path)
    assert "column 'name': expected a value" in nothing["error"]
    assert seen["error"] is None


def test_equal_rows_are_computed_once(run: Run, tmp_path: Path) -> None:
    """A picture that rows with other texts share is computed once too."""
    one, other = picture(1), picture(2)
    pairs = [("a", one), ("b", one), ("a", other), ("a", one), (None, one), ("a", one)]
    rows = [{"id": i, "name": n, "photo": [p]} for i, (n, p) in enumerate(pairs)]
    code, _, err = run(rows=rows)
    assert code == cli.SUCCESS, err
    found = vectors(results(tmp_path))
    assert found[0].tolist() == found[3].tolist() == found[5].tolist()
    assert len({vector.tobytes() for vector in found}) == 4
    [task] = json.loads((tmp_path / "out/_v.run.json").read_text())["tasks"]
    assert (task["requests"], task["duplicate_rows"]) == (4, 2)


def test_a_job_that_stopped_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were finished are not computed again, and all are the same bits."""
    rows = [
        {**row_of(number % 16), "id": number, "name": f"a hen {number}"} for number in range(60)
    ]
    flags = ("--allow_missing_images", "--prompt_name=document")
    code, _, err = run(*flags, "--max_cost_tokens=3000", rows=rows)
    assert code not in (cli.SUCCESS, cli.USAGE), "the job reached its limit"
    monkeypatch.setattr(batches, "_HOLDER", batches._Holder())  # as in a process of its own
    code, out, err = run(*flags, "--resume", rows=rows)
    assert code == cli.SUCCESS, err
    assert "rows resumed" in out
    assert run(*flags, rows=rows, output="whole/v.parquet")[0] == cli.SUCCESS
    assert results(tmp_path) == results(tmp_path, "whole")
    assert len(vectors(results(tmp_path))) == 60


def test_a_dry_run_shows_where_pictures_are(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--dry_run", "--allow_missing_images", "--prompt_name=document")
    assert code == cli.SUCCESS, err
    assert "<bos>title: none | text: <|image>[picture]<image|><eos>" in out
    assert "rows that would fail: 0 of the sample" in out
    assert not (tmp_path / "out").exists()


def test_rows_of_other_pipelines() -> None:
    """Pictures of Pillow's kind of file in rows that are mappings, in an engine of its own."""
    settings = EmbedSettings(
        text_column="name", image_columns=("photo", "more"), allow_missing_images=True
    )
    handler = GemmaEmbedModelHandler(str(tiny_embedder().seeing.path), settings, large_model=True)
    rows = [
        {"id": 0, "name": "a hen", "photo": picture(1), "more": picture(2)},
        {"id": 1, "name": "a hen", "photo": None, "more": picture(2)},
        {"id": 2, "name": "a hen", "photo": None, "more": None},
    ]
    files = ([picture(1), picture(2)], [picture(2)], [])
    theirs = [read(each, "a hen").embedding() for each in files]

    def check(found: list[dict[str, Any]]) -> None:
        ours = vectors(sorted(found, key=lambda row: row["id"]))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)

    with local_pipeline() as pipeline:
        assert_that(pipeline | beam.Create(rows) | Embed(handler), check)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"image_columns": ("a", "a")}, "column 'a': expected once, for pictures alone"),
        ({"image_columns": ("a",), "text_column": "a"}, "column 'a': expected once, for pictures"),
        ({"allow_missing_images": True}, "allow_missing_images: expected image_columns beside it"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(OptionsError, match=error):
        EmbedSettings(**changes)


def test_models_that_embed_texts_alone_are_refused(
    run: Run, two_sided: tuple[object, Artifact], tmp_path: Path
) -> None:
    """One without a tower, and one whose tower its embeddings do not need."""
    manifest = json.loads((two_sided[1].path / "manifest.json").read_text())
    seeing = json.loads((tiny_embedder().seeing.path / "manifest.json").read_text())
    folder = shutil.copytree(two_sided[1].path, tmp_path / "model")
    (folder / "manifest.json").write_text(json.dumps({**manifest, "vision": seeing["vision"]}))
    for model, error in (
        (tiny_embedder().artifact.path, "expected a model that takes pictures, for photo, got"),
        (folder, "image_columns: expected a model that embeds pictures, such as EmbeddingGemma 2"),
    ):
        code, _, err = run(model=model)
        assert code == cli.USAGE
        assert error in err


def test_a_number_of_tokens_that_no_picture_takes_is_refused(run: Run) -> None:
    code, _, err = run("--image_tokens=100")
    assert code == cli.USAGE
    assert "--image_tokens: invalid choice: 100" in err
