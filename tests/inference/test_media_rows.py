"""Rows with pictures outside of tables: files are read, requests carry them, and results agree."""

import io
from collections import ChainMap

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.testing.util import assert_that, equal_to
from PIL import Image

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.inference import task_handler
from beam_gemma.inference.carried_rows import RowCarrier, rows_of_bytes
from beam_gemma.inference.handlers import GemmaClassifyModelHandler, GemmaGenerateModelHandler
from beam_gemma.inference.media_files import ImageReading, MediaReading
from beam_gemma.inference.media_rows import files_of, in_parts, with_files
from beam_gemma.inference.rows import num_bytes, weight
from beam_gemma.inference.transforms import Classify, Generate
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.questions import ClassifySettings
from beam_gemma.tasks.row_keys import ENCODED, FILES, REQUEST_KEY
from tests.doubles.fake_models import local_pipeline
from tests.doubles.seeing import picture, seeing_folder

SEES = GenerateSettings(
    prompt="{photo} is",
    image_columns=("photo",),
    sampling=SamplingParams(max_tokens=3),
    logprob=True,
)
SPEAKS = GenerateSettings(messages_column="chat")


@pytest.fixture(scope="module")
def model():
    return seeing_folder()


@pytest.fixture
def reading(tmp_path):
    """A folder with two pictures, from which paths start."""
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return MediaReading(image=ImageReading(allow_local=True, folder=str(tmp_path)))


def ways_of(number):
    """Return a row with the same picture in each form that a value may have."""
    data, name = picture(number), f"{number}.png"
    values = (
        data, Image.open(io.BytesIO(data)), name, {"bytes": None, "path": name},
        {"bytes": data, "path": None}, [data], [{"uri": name, "version": None}],
    )  # fmt: skip
    return [{"photo": value} for value in values]


def told(results):
    return [(row["completion"], row["logprob"], row["error"]) for row in results]


def test_all_forms_of_a_picture_have_the_same_result(model, reading):
    handler = GemmaGenerateModelHandler(model, SEES, large_model=False, image_reading=reading.image)
    rows = [row for number in range(2) for row in ways_of(number)]
    rows += [{"photo": "none.png"}, {"photo": None}, {"photo": 3}]
    loaded = handler.load_model()
    found = told([result.inference for result in handler.run_inference(rows, loaded)])
    half = len(ways_of(0))
    assert [len(set(found[i : i + half])) for i in (0, half)] == [1, 1]
    assert found[0] != found[half]
    assert found[0][2] is None
    errors = [error for _, _, error in found[2 * half :]]
    assert all(error.startswith("column 'photo': expected ") for error in errors), errors
    # Not even here are files read that nobody has allowed.
    strict = GemmaGenerateModelHandler(model, SEES, large_model=False)
    refused = [strict.run_inference([row], loaded)[0].inference for row in ways_of(0)[2:4]]
    assert all("no folder for paths" in row["error"] for row in refused)


def test_transforms_take_pictures(model, reading):
    names = [f"{number % 2}.png" for number in range(6)]
    handler = GemmaGenerateModelHandler(model, SEES, large_model=False, image_reading=reading.image)
    wanted = {
        name: handler.run_inference([{"photo": name}], handler.load_model())[0].inference["logprob"]
        for name in names
    }
    settings = ClassifySettings(prompt="{photo}", image_columns=("photo",), labels=("a", "b"))
    judge = GemmaClassifyModelHandler(
        model, settings, large_model=False, image_reading=reading.image
    )
    with local_pipeline() as pipeline:
        rows = pipeline | beam.Create([{"photo": name} for name in names])
        said = rows | Generate(handler) | beam.Map(lambda row: (row["photo"], row["logprob"]))
        assert_that(said, equal_to([(name, wanted[name]) for name in names]))
        labels = rows | Classify(judge) | beam.Map(lambda row: (row["photo"], row["error"]))
        assert_that(labels, equal_to([(name, None) for name in names]), label="labels")


def test_requests_carry_pictures_to_another_process(model, reading):
    handler = GemmaGenerateModelHandler(model, SEES, large_model=False, image_reading=reading.image)
    [rows] = in_parts([*ways_of(0), {"photo": "none.png"}], SEES, reading, 1 << 30)
    carried = rows_of_bytes(handler._carrier()(rows))
    *good, bad = carried
    assert all(row[FILES] == [picture(0)] or len(row[FILES]) == 1 for row in good)
    assert FILES not in bad
    results = handler.load_model()(carried)
    assert len(set(told(results)[:-1])) == 1
    assert "none at 'none.png'" in results[-1]["error"]
    plain = RowCarrier(lambda row: row["text"], lambda _: None, SPEAKS)
    assert rows_of_bytes(plain([{"text": "a"}])) == [{ENCODED: b'"a"'}]
    encoded = {ENCODED: b"x", REQUEST_KEY: b"k", FILES: [b"1", b"2"]}
    assert rows_of_bytes(plain([encoded])) == [encoded]


def test_files_in_conversations_are_read(reading):
    def said(*contents):
        return [{"role": "user", "content": list(contents)}, {"role": "model", "content": "so"}]

    text, place = {"type": "text", "text": "a"}, {"type": "image"}
    path, data = {"type": "image", "path": "0.png"}, {"type": "image", "image": picture(1)}
    rows = [{"chat": said(text, path, place, data), "id": 7}, {"chat": said(text)}, {"chat": None}]
    odd = [
        {"chat": 3},
        {"chat": [3]},
        {"chat": [{"content": [3, {"type": "image", "path": 3}]}]},
        "a",
    ]
    first, *others = with_files([*rows, *odd], SPEAKS, reading)
    read = {"type": "image", "path": {"bytes": picture(0), "error": None}}
    assert first["chat"] == said(text, read, place, data)
    assert first["id"] == 7
    assert others == [*rows[1:], *odd]
    assert rows[0]["chat"][0]["content"][1] == path
    assert files_of(first, SPEAKS) == [picture(0), picture(1)]
    assert files_of(rows[1], SPEAKS) == files_of("a", SPEAKS) == []
    assert files_of({"chat": said(path, data)}, SPEAKS) == [picture(1)]


def test_few_pictures_are_held_at_once(reading):
    size = len(picture(0))
    rows = [{"photo": "0.png"}] * 7 + [{"photo": picture(1)}] * 3
    found = list(in_parts(rows, SEES, reading, 3 * size))
    assert [len(part) for part in found] == [3, 3, 4]
    assert [isinstance(row, ChainMap) for row in found[-1]] == [True, False, False, False]
    assert SEES.media_columns == ("photo",)
    assert SPEAKS.media_columns == ("chat",)
    assert not GenerateSettings(prompt="{text}").media_columns


def test_batches_of_large_rows_are_small(model):
    full, full_bytes = task_handler.BATCH_ROWS, task_handler.BATCH_BYTES
    handler = GemmaGenerateModelHandler(model, SEES, large_model=False)
    size = handler.batch_elements_kwargs()["element_size_fn"]
    assert size({"photo": b"small"}) == 1
    assert size({"photo": bytes(full_bytes // 4)}) == full // 4
    assert size({"photo": bytes(full_bytes * 2)}) == full
    assert size(("key", {"photo": bytes(full_bytes // 2)})) == full // 2 + 1
    picture_of_pillow = Image.new("RGB", (1000, 1000))
    assert num_bytes({"photo": picture_of_pillow}) == 3_000_000
    encoded = {ENCODED: [b"x" * 9], FILES: [[bytes(full_bytes // 8)]]}
    batch = pa.record_batch(encoded)
    assert full // 8 <= weight(batch, full, full_bytes) <= full // 8 + 1
    assert weight(batch.select([ENCODED]), full, full_bytes) == 1
    plain = GemmaGenerateModelHandler(model, GenerateSettings(prompt="{text}"), large_model=False)
    assert plain.batch_elements_kwargs()["element_size_fn"]({"text": "a" * 10**6}) == 1
