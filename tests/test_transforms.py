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
from beam_gemma.launch import counters
from beam_gemma.records import ReadRecords, open_source
from beam_gemma.sampling import SamplingParams
from beam_gemma.sinks import WriteRecords, open_sink
from beam_gemma.transforms import Generate
from tests.fake_models import FakeHandler, completion_of, local_pipeline
from tests.tables import RICH, assert_same_schema, rich_table, text_of, write_parquet

SETTINGS = GenerateSettings(
    prompt_column="text",
    sampling=SamplingParams(max_tokens=2),
    logprob=True,
    token_ids=True,
    truncate="left",
)
pytestmark = pytest.mark.timeout(90)


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


@pytest.mark.parametrize(
    "flags", [[], ["--direct_running_mode=multi_threading", "--direct_num_workers=3"]]
)
def test_files_to_files_keep_every_row_column_and_type(tmp_path, flags):
    table = rich_table(range(300))
    write_parquet(tmp_path / "in.parquet", table, rows_per_group=70)
    source = open_source(f"{tmp_path}/in.parquet")
    sink = open_sink(f"{tmp_path}/out.parquet", num_shards=2)
    schema = pa.schema([*source.schema, *SETTINGS.result_schema], source.schema.metadata)
    with local_pipeline(*flags) as pipeline:
        batches = pipeline | ReadRecords(source) | Generate(FakeHandler(SETTINGS))
        assert batches.element_type is pa.RecordBatch
        _ = batches | WriteRecords(sink, schema)
    back = pa.concat_tables(map(pa.parquet.read_table, sink.shards()))
    assert text_of(back.select(RICH.names)) == text_of(table)
    assert_same_schema(back.schema, schema)
    for key, text, made in zip(
        *(back[n].to_pylist() for n in ("key", "text", "completion")), strict=True
    ):
        assert text == f"row {key}"
        assert made == completion(text)


def test_4096_rows_are_conserved_by_key_and_counted(tmp_path):
    bad = {7, 100, 2048}
    rows = [{"key": i, "text": None if i in bad else f"r{i}"} for i in range(4096)]
    write_parquet(tmp_path / "in.parquet", pa.Table.from_pylist(rows), rows_per_group=1000)
    source = open_source(f"{tmp_path}/in.parquet")
    sink = open_sink(f"{tmp_path}/out.parquet")
    settings = GenerateSettings(prompt_column="text", sampling=SamplingParams(max_tokens=1))
    schema = pa.schema([*source.schema, *settings.result_schema])
    pipeline = local_pipeline()
    batches = pipeline | ReadRecords(source) | Generate(FakeHandler(settings))
    _ = batches | WriteRecords(sink, schema)
    counts = counters(pipeline.run())
    assert counts["rows_read"] == counts["rows_in"] == counts["rows_written"] == 4096
    assert counts["rows_failed"] == 3
    assert counts["rows_ok"] == 4093
    back = pa.concat_tables(map(pa.parquet.read_table, sink.shards())).to_pylist()
    assert sorted(row["key"] for row in back) == list(range(4096))
    assert {row["key"] for row in back if row["error"] is not None} == bad


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
