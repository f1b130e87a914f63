"""Handlers: one result for each example, in order and in its form, under Beam's own machinery."""

import pickle
import re
import tempfile

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.internal import pickler as beam_pickler
from apache_beam.ml.inference.base import KeyedModelHandler, PredictionResult, RunInference
from apache_beam.testing.util import assert_that

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import OptionsError
from beam_gemma.inference.handlers import GemmaGenerateModelHandler
from beam_gemma.inference.rows import num_rows, rows_of
from beam_gemma.inference.task_handler import BATCH_ROWS
from beam_gemma.runtime.limits import Limits
from beam_gemma.tasks.generate import GenerateSettings
from tests.doubles.fake_models import FakeHandler, completion_of, local_pipeline

SETTINGS = GenerateSettings(prompt_column="text", sampling=SamplingParams(max_tokens=3))


def batch_of(*texts):
    return pa.record_batch({"text": pa.array(texts, pa.string())})


def test_results_have_the_form_of_their_examples():
    handler = FakeHandler(SETTINGS)
    examples = ["a", {"text": "b"}, beam.Row(text="c"), batch_of("d", "e"), batch_of()]
    results = handler.run_inference(examples, handler.load_model())
    assert isinstance(results, list)
    assert all(isinstance(result, PredictionResult) for result in results)
    assert [result.example for result in results] == examples
    one, mapping, row, batch, empty = (result.inference for result in results)
    assert [r["completion"] for r in (one, mapping, row)] == [completion_of(t) for t in "abc"]
    assert batch.schema == empty.schema == SETTINGS.result_schema
    assert batch.column("completion").to_pylist() == [completion_of("d"), completion_of("e")]
    assert empty.num_rows == 0


def test_samples_of_the_engine_come_beside_the_results_of_the_last_batch():
    handler = FakeHandler(SETTINGS)
    sampled = handler.with_samples()
    batches = [batch_of("a"), batch_of("b")]
    first, last = (p.inference for p in sampled.run_inference(batches, handler.load_model()))
    assert first.pulse is None
    # Each row's first token comes with its prompt.
    assert last.pulse["samples"][-1][3] == 2 * 3
    plain = [p.inference for p in handler.run_inference(batches, handler.load_model())]
    assert [first.results, last.results] == plain
    assert (sampled._key, repr(sampled)) == (handler._key, repr(handler))


def test_one_bad_row_of_a_hundred():
    handler = FakeHandler(SETTINGS)
    rows = [{"text": None if i == 42 else f"row {i}"} for i in range(100)]
    results = [r.inference for r in handler.run_inference(rows, handler.load_model())]
    assert len(results) == 100
    assert [i for i, r in enumerate(results) if r["error"] is not None] == [42]
    assert "null" in results[42]["error"]
    assert all(
        r["completion"] == completion_of(f"row {i}") for i, r in enumerate(results) if i != 42
    )


def test_bare_run_inference_with_prompts():
    with local_pipeline() as pipeline:
        results = (
            pipeline
            | beam.Create([f"prompt {i}" for i in range(50)])
            | RunInference(FakeHandler(SETTINGS))
            | beam.Map(lambda r: (r.example, r.inference["completion"]))
        )
        assert_that(results, same({f"prompt {i}": completion_of(f"prompt {i}") for i in range(50)}))


@pytest.mark.parametrize("keyed", [{"k": "a"}, {"k": {"text": "a"}}, {"k": batch_of("a", "b")}])
def test_keyed_handler(keyed):
    with local_pipeline() as pipeline:
        results = (
            pipeline
            | beam.Create(list(keyed.items()))
            | RunInference(KeyedModelHandler(FakeHandler(SETTINGS)))
            | beam.MapTuple(lambda key, r: (key, first_completion(r.inference)))
        )
        assert_that(results, same({"k": completion_of("a")}))


def first_completion(inference):
    rows = inference.to_pylist() if isinstance(inference, pa.RecordBatch) else [inference]
    return rows[0]["completion"]


def same(wanted):
    def check(pairs):
        assert dict(pairs) == wanted
        assert len(pairs) == len(wanted)

    return check


def test_beam_batches_are_weighed_in_rows():
    batching = GemmaGenerateModelHandler("model").batch_elements_kwargs()
    assert batching["min_batch_size"] == batching["max_batch_size"] == BATCH_ROWS
    beam.BatchElements(**batching)
    weigh = batching["element_size_fn"]
    assert weigh is num_rows
    assert [weigh("abc"), weigh({"a": 1}), weigh(batch_of("a", "b", "c"))] == [1, 1, 3]
    assert [weigh(("key", "abc")), weigh(("key", batch_of("a", "b", "c")))] == [1, 3]


def test_bytes_are_those_of_the_examples():
    handler = GemmaGenerateModelHandler("model")
    assert handler.get_num_bytes(["abc", "ü"]) == 5
    assert handler.get_num_bytes([{"a": "x" * 256, "b": [1, 2.0], "c": None}]) == 256 + 16
    batch = batch_of("x" * 100)
    assert handler.get_num_bytes([batch]) == batch.nbytes >= 100


def test_handler_is_picklable_and_small():
    handler = GemmaGenerateModelHandler(
        "model", SETTINGS, device="cpu", limits=Limits(max_num_seqs=7)
    )
    for pickler in (pickle, beam_pickler):
        copy = pickler.loads(pickler.dumps(handler))
        assert repr(copy) == repr(handler)
        assert copy.settings == SETTINGS
    assert len(pickle.dumps(handler)) < 2000


def test_text_form_is_stable_and_tells_no_prompt():
    settings = GenerateSettings(prompt="the password is 1234 {text}", system="secret")
    one, two = (
        GemmaGenerateModelHandler("model", settings),
        GemmaGenerateModelHandler("model", settings),
    )
    assert str(one) == str(two) == repr(one)
    assert "model='model'" in repr(one)
    assert not re.search(r"0x[0-9a-f]+|1234|secret", repr(one))


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="inference_batch_size"):
        GemmaGenerateModelHandler("model", inference_batch_size=32)
    with pytest.raises(OptionsError, match="max_tokens"), local_pipeline() as pipeline:
        _ = (
            pipeline
            | beam.Create(["a"])
            | RunInference(FakeHandler(SETTINGS), inference_args={"max_tokens": 3})
        )


def test_row_of_a_batch_is_a_mapping():
    _, row = rows_of(pa.record_batch({"text": ["a", "b"], "n": [1, 2]}))
    assert dict(row) == {"text": "b", "n": 2}
    assert len(row) == 2
    assert "n" in row
    assert "other" not in row
    with pytest.raises(KeyError):
        row["other"]


@pytest.mark.parametrize("large_model", [True, False])
def test_one_model_for_a_machine_or_for_each_process(large_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    handler = FakeHandler(SETTINGS, large_model=large_model)
    _model = handler.load_model()
    assert len(list(tmp_path.iterdir())) == large_model


def test_value_that_python_cannot_hold_fails_its_row_alone():
    days = pa.array([0, 10**8], pa.int32()).cast(pa.date32())
    batch = pa.record_batch({"visit": pa.StructArray.from_arrays([days], ["day"])})
    handler = FakeHandler(GenerateSettings(prompt="On {visit}", sampling=SETTINGS.sampling))
    (result,) = handler.run_inference([batch], handler.load_model())
    good, bad = result.inference.to_pylist()
    assert good["error"] is None
    assert bad["completion"] is None
    assert "column 'visit': expected a value that Python can hold" in bad["error"]


def test_metrics_count_rows_and_tokens():
    pipeline = local_pipeline()
    rows = [{"text": "abc"}, {"text": None}, {"text": "de"}]
    _ = pipeline | beam.Create(rows) | RunInference(FakeHandler(SETTINGS))
    metrics = (
        pipeline.run().metrics().query(beam.metrics.MetricsFilter().with_namespace("beam_gemma"))
    )
    counters = {m.key.metric.name: m.result for m in metrics["counters"]}
    assert counters["rows_in"] == 3
    assert counters["rows_ok"] == 2
    assert counters["rows_failed"] == 1
    assert counters["completion_tokens"] == 6
    assert counters["decode_rows"] == 4
    assert counters["decode_slots"] == 2 * 64
    assert 0 < counters["used_cache"] < counters["cache"]
    distributions = {m.key.metric.name: m.result for m in metrics["distributions"]}
    assert distributions["num_prompt_tokens"].sum == counters["prompt_tokens"] > 0
