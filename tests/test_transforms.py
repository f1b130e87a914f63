"""Generate: what kind of rows goes in comes out, and none is lost on the way."""

import typing

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_gemma.errors import OptionsError
from beam_gemma.generate import GenerateSettings
from beam_gemma.handlers import GemmaModelHandler
from beam_gemma.sampling import SamplingParams
from beam_gemma.transforms import Generate
from tests.fake_models import FakeHandler, completion_of, local_pipeline
from tests.tables import RICH, assert_same_schema, rich_table, text_of

SETTINGS = GenerateSettings(
    prompt_column="text",
    sampling=SamplingParams(max_tokens=2),
    logprob=True,
    token_ids=True,
    truncate="left",
)
pytestmark = pytest.mark.timeout(90)
FOUND = []


class TypedRow(typing.NamedTuple):
    key: int
    text: str


def completion(text):
    return completion_of(text, 2)


def test_dicts():
    with local_pipeline() as pipeline:
        rows = pipeline | beam.Create([{"key": i, "text": f"t{i}"} for i in range(40)])
        results = rows | Generate(FakeHandler(SETTINGS))
        assert_that(
            results | beam.Map(lambda r: (list(r)[:3], r["key"], r["completion"])),
            equal_to([(["key", "text", "completion"], i, completion(f"t{i}")) for i in range(40)]),
        )


@pytest.mark.parametrize("make", [lambda i, t: beam.Row(key=i, text=t), TypedRow])
def test_beam_rows_keep_their_schema(make):
    with local_pipeline() as pipeline:
        rows = pipeline | beam.Create([(i, f"t{i}") for i in range(20)])
        rows |= "Make" >> beam.MapTuple(make).with_output_types(
            make
            if make is TypedRow
            else RowTypeConstraint.from_fields([("key", int), ("text", str)])
        )
        results = rows | Generate(FakeHandler(SETTINGS))
        names = [name for name, _ in results.element_type._fields]
        assert names == ["key", "text", *SETTINGS.result_schema.names]
        assert_that(
            results
            | beam.Map(lambda r: (r.key, r.text, r.completion, len(r.completion_token_ids))),
            equal_to([(i, f"t{i}", completion(f"t{i}"), 2) for i in range(20)]),
        )


def test_rows_whose_type_is_not_known():
    with local_pipeline() as pipeline:
        rows = pipeline | beam.Create([beam.Row(text="a")]) | beam.Map(lambda row: row)
        results = rows | Generate(FakeHandler(SETTINGS))
        assert_that(results | beam.Map(lambda r: r.completion), equal_to([completion("a")]))


def keep(batch):
    FOUND.append(batch)


def test_batches_keep_every_row_column_and_type():
    table = rich_table(range(300))
    with local_pipeline() as pipeline:
        batches = pipeline | beam.Create(table.to_batches(max_chunksize=16)).with_output_types(
            pa.RecordBatch
        )
        results = batches | Generate(FakeHandler(SETTINGS))
        assert results.element_type is pa.RecordBatch
        _ = results | beam.Map(keep)
    back = pa.Table.from_batches(FOUND)
    assert text_of(back.select(RICH.names)) == text_of(table)
    assert_same_schema(back.schema, pa.schema([*RICH, *SETTINGS.result_schema], RICH.metadata))
    for text, made in zip(back["text"].to_pylist(), back["completion"].to_pylist(), strict=True):
        assert made == completion(text)


def test_clash_and_strings_are_refused_before_any_row_is_run():
    for element in ({"text": "a", "error": "b"}, beam.Row(text="a", completion="b"), "a", 3):
        with pytest.raises(OptionsError, match="expected"), local_pipeline() as pipeline:
            _ = pipeline | beam.Create([element]) | Generate(NeverRuns(SETTINGS))


class NeverRuns(FakeHandler):
    def run_inference(self, *_):
        raise AssertionError("a row was run")


def test_settings_without_a_source_are_refused():
    with pytest.raises(OptionsError, match="prompt_column"):
        Generate(GemmaModelHandler("model"))


def test_what_is_generated_is_kept_before_it_goes_on():
    pipeline = local_pipeline()
    _ = pipeline | beam.Create([{"text": "a"}]) | Generate(FakeHandler(SETTINGS))
    names = [part.full_label for part in pipeline.transforms_stack[0].parts]
    steps = [
        part.full_label.rpartition("/")[2] for part in pipeline.transforms_stack[0].parts[-1].parts
    ]
    assert names[-1] == "Generate"
    assert steps == ["Check", "Spread", "Infer", "Merge", "Keep"]
