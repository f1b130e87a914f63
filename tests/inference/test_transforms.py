"""Generate: what kind of rows goes in comes out, and none is lost on the way."""

import json
import typing
from collections import defaultdict

import apache_beam as beam
import pyarrow as pa
import pydantic
import pytest
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import OptionsError
from beam_gemma.inference.handlers import GemmaGenerateModelHandler
from beam_gemma.inference.transforms import Generate
from beam_gemma.jobs.infer_table import InferTable
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.versions import versions
from tests.doubles.dataflow_service import display_of
from tests.doubles.fake_models import FakeHandler, completion_of, local_pipeline
from tests.doubles.tables import RICH, assert_same_schema, rich_table, text_of

SETTINGS = GenerateSettings(
    prompt_column="text",
    sampling=SamplingParams(max_tokens=2),
    logprob=True,
    token_ids=True,
    truncate="left",
)
FOUND = []
EXTRACTED = defaultdict(list)


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


SCHEMA = {
    "type": "object",
    "properties": {
        "day": {"type": "string", "format": "date"},
        "at": {"type": ["string", "null"], "format": "date-time"},
        "sizes": {"type": "array", "items": {"type": ["integer", "null"]}, "maxItems": 2},
        "of": {
            "type": "array",
            "items": {"type": "object", "properties": {"name": {"enum": ["a", "b"]}}},
            "maxItems": 2,
        },
        "by_name": {
            "propertyNames": {"enum": ["a", "b"]},
            "additionalProperties": {"type": "object", "properties": {"n": {"type": "integer"}}},
        },
    },
    "required": ["day", "at", "sizes", "by_name"],
}
EXTRACTING = GenerateSettings(prompt_column="text", sampling=SamplingParams(max_tokens=100))


class Found(pydantic.BaseModel):
    name: typing.Literal["a", "b"]
    sure: bool | None


def plain(value):
    """Return a value with dicts for the Rows and named tuples in it."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value


def test_values_of_a_schema_are_dicts_in_dicts_rows_in_rows_and_typed_in_batches():
    texts = [f"t{i}" for i in range(5)]
    batch = pa.RecordBatch.from_pydict({"text": [*texts, None]})
    named = RowTypeConstraint.from_fields([("text", str)])
    with local_pipeline() as pipeline:
        dicts = pipeline | "Dicts" >> beam.Create([{"text": text} for text in texts])
        rows = pipeline | "Rows" >> beam.Create([beam.Row(text=text) for text in texts])
        rows |= "Named" >> beam.Map(lambda row: row).with_output_types(named)
        batches = pipeline | "Batches" >> beam.Create([batch]).with_output_types(pa.RecordBatch)
        for name, kind in (("d", dicts), ("r", rows), ("b", batches)):
            found = kind | name >> Generate(FakeHandler(EXTRACTING), schema=SCHEMA)
            _ = found | f"Keep {name}" >> beam.Map(keep_as, name)
    of_dicts = {row["text"]: row["extracted"] for row in EXTRACTED["d"]}
    of_rows = {row.text: plain(row.extracted) for row in EXTRACTED["r"]}
    (of_batch,) = EXTRACTED["b"]
    assert sorted(of_dicts) == texts
    assert of_rows == of_dicts
    values = of_batch.column("extracted").to_pylist(maps_as_pydicts="strict")
    assert values == [*(of_dicts[text] for text in texts), None]
    kind = of_batch.schema.field("extracted").type
    assert kind.field("day").type == pa.date32()
    assert kind.field("at").type == pa.timestamp("us", "UTC")
    assert of_batch.column("error").to_pylist()[:5] == [None] * 5


def test_a_schema_may_be_a_class_and_stays_apart_from_others():
    handler = FakeHandler(EXTRACTING)
    other = handler.with_schema(Found)
    assert other.settings.result_schema.field("extracted").type == pa.struct(
        {"name": pa.string(), "sure": pa.bool_()}
    )
    assert handler.settings.structured is None
    assert other._key != handler._key
    with pytest.raises(OptionsError, match="schema: expected a handler without structured output"):
        Generate(other, schema=SCHEMA)
    with pytest.raises(OptionsError, match="#/typ: "):
        Generate(handler, schema={"typ": "null"})


def keep_as(result, name):
    EXTRACTED[name].append(result)


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
        Generate(GemmaGenerateModelHandler("model"))


def test_what_is_generated_is_kept_before_it_goes_on():
    pipeline = local_pipeline()
    _ = pipeline | beam.Create([{"text": "a"}]) | Generate(FakeHandler(SETTINGS))
    names = [part.full_label for part in pipeline.transforms_stack[0].parts]
    steps = [
        part.full_label.rpartition("/")[2] for part in pipeline.transforms_stack[0].parts[-1].parts
    ]
    assert names[-1] == "Generate"
    assert steps == ["Check", "Spread", "Infer", "Merge", "Keep"]


def test_streams_are_refused():
    pipeline = beam.Pipeline(runner="FnApiRunner")
    rows = (
        pipeline
        | beam.io.ReadFromPubSub(topic="projects/a-project/topics/a-topic")
        | beam.Map(json.loads)
    )
    for transform in (
        Generate(FakeHandler(SETTINGS)),
        InferTable(FakeHandler(SETTINGS)),
    ):
        with pytest.raises(OptionsError) as caught:
            rows | type(transform).__name__ >> transform
        assert str(caught.value) == (
            "rows: expected a PCollection that ends, got the stream PCollection[Map(loads).None]; "
            "have it written to a table, and read that"
        )


def test_a_step_shows_its_task_model_and_versions_but_no_prompt():
    handler = FakeHandler(GenerateSettings(prompt="secret {text}"))
    pipeline = beam.Pipeline(runner="FnApiRunner")
    _ = pipeline | beam.Create([{"text": "t"}]) | Generate(handler)
    steps = pipeline.to_runner_api().components.transforms.values()
    (shown,) = [display_of(step) for step in steps if step.unique_name == "Generate/Check"]
    assert shown.items() >= {"task": "generate", "model": "fake", **versions()}.items()
    assert "secret" not in str(shown)
