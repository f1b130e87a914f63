"""The way of a table: every row comes back once, in its place, or the job stops and says why."""

import json

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.cli.run import counters
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import BalanceError, FailuresError, OptionsError, StorageError
from beam_gemma.inference.handlers import GemmaEmbedModelHandler
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.jobs import infer_table
from beam_gemma.jobs.infer_table import InferTable, num_ranges
from beam_gemma.jobs.publish import Columns, Output
from beam_gemma.jobs.shards import Layout
from beam_gemma.jobs.write_table import WriteOutput, WriteTable
from beam_gemma.tables.file_sink import open_sink
from beam_gemma.tables.lease import Lease, Standing, take
from beam_gemma.tables.open_table import ReadTable, open_source
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.text_encoder import EmbedSettings
from tests.doubles.fake_models import FakeHandler, completion_of, local_pipeline
from tests.doubles.leases import hold
from tests.doubles.tables import RICH, assert_same_schema, rich_table, text_of, write_parquet

SETTINGS = GenerateSettings(
    prompt_column="text",
    sampling=SamplingParams(max_tokens=2),
    logprob=True,
    token_ids=True,
    truncate="left",
)
THREADS = ["--direct_running_mode=multi_threading", "--direct_num_workers=3"]
FACTS = {
    "job": "j",
    "started": "2026-01-01T00:00:00+00:00",
    "tasks": [{"task": "generate", "settings": {}}],
}
REMOTE = Lease.of_this_process("a", is_remote=True)
SEEN = []


class Watching(FakeHandler):
    """Notes what reaches inference."""

    def run_inference(self, batch, *args):
        SEEN.extend(tuple(example.schema.names) for example in batch)
        return super().run_inference(batch, *args)


def job(folder, settings=SETTINGS, *, num_shards=2, prefixes=("",), **options):
    """Return the source and the output of a job over `in.parquet` of a folder, with its leases."""
    source = open_source(f"{folder}/in.parquet")
    tasks = tuple(Columns(prefix, settings.result_schema) for prefix in prefixes)
    fields = [field for task in tasks for field in task.in_files]
    output = Output(
        sink=open_sink(f"{folder}/out.parquet"),
        layout=Layout.of(source, settings.result_schema, num_shards=num_shards),
        schema=pa.schema([*source.schema, *fields], source.schema.metadata),
        tasks=tasks,
        facts={**FACTS, "tasks": FACTS["tasks"] * len(tasks)},
        **options,
    )
    for sink in output.sinks:
        hold(sink)
    return source, output


def run(source, output, handler, *flags):
    """Run a job; return its counters and the table that it has written, in the order of files."""
    pipeline = local_pipeline(*flags)
    rows = pipeline | ReadTable(source)
    answers = rows | InferTable(handler, num_rows=source.num_rows)
    _ = (rows, (answers,)) | WriteOutput(output)
    counts = counters(pipeline.run())
    return counts, pa.concat_tables(map(pq.read_table, output.sink.earlier()))


@pytest.mark.parametrize("flags", [[], THREADS], ids=["in process", "threads"])
@pytest.mark.parametrize("num_shards", [1, 2, 7])
def test_files_to_files_keep_every_row_column_type_and_place(tmp_path, flags, num_shards):
    table = rich_table(range(300))
    write_parquet(tmp_path / "in.parquet", table, rows_per_group=70)
    source, output = job(tmp_path, num_shards=num_shards)
    _, back = run(source, output, FakeHandler(SETTINGS), *flags)
    assert back["key"].to_pylist() == list(range(300))
    assert text_of(back.select(RICH.names)) == text_of(table)
    assert_same_schema(back.schema, output.schema)
    sizes = [pq.read_metadata(path).num_rows for path in output.sink.earlier()]
    assert len(sizes) == num_shards
    assert max(sizes) - min(sizes) <= 1
    for text, made in zip(back["text"].to_pylist(), back["completion"].to_pylist(), strict=True):
        assert made == completion_of(text, 2)
    assert sorted(path.name for path in tmp_path.glob("*.work")) == []


def test_a_job_gives_the_same_bytes_however_it_is_run(tmp_path):
    files = []
    for name, flags in (("a", []), ("b", THREADS)):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "in.parquet", rich_table(range(200)), rows_per_group=30)
        source, output = job(tmp_path / name)
        run(source, output, FakeHandler(SETTINGS), *flags)
        files.append([p.read_bytes() for p in sorted((tmp_path / name).glob("out-*"))])
    assert files[0] == files[1]


def test_rows_are_conserved_by_key_and_counted(tmp_path):
    bad = {7, 100, 512}
    rows = [{"key": i, "text": None if i in bad else f"r{i}"} for i in range(1024)]
    write_parquet(tmp_path / "in.parquet", pa.Table.from_pylist(rows), rows_per_group=250)
    settings = GenerateSettings(prompt_column="text", sampling=SamplingParams(max_tokens=1))
    errors = open_sink(f"{tmp_path}/bad.parquet")
    source, output = job(tmp_path, settings, errors=errors)
    counts, back = run(source, output, FakeHandler(settings))
    assert counts["rows_read"] == counts["rows_written"] == 1024
    assert (counts["written_ok"], counts["written_failed"]) == (1021, 3)
    assert back["key"].to_pylist() == list(range(1024))
    assert {row["key"] for row in back.to_pylist() if row["error"] is not None} == bad
    apart = pa.concat_tables(map(pq.read_table, errors.earlier()))
    assert_same_schema(apart.schema, output.schema)
    assert set(apart["key"].to_pylist()) == bad
    record = json.loads((tmp_path / "_out.run.json").read_text())
    assert record["rows"] == 1024
    assert record["tasks"][0]["results"]["failed"] == 3
    assert record["tasks"][0]["duplicate_rows"] == 2  # the rows without a text all fail alike


def test_without_failed_rows_their_table_is_empty(tmp_path):
    write_parquet(tmp_path / "in.parquet", rich_table(range(5)))
    errors = open_sink(f"{tmp_path}/bad.parquet")
    source, output = job(tmp_path, errors=errors)
    run(source, output, FakeHandler(SETTINGS))
    (path,) = errors.earlier()
    assert pq.read_table(path).num_rows == 0


def test_no_rows_make_a_whole_output(tmp_path):
    write_parquet(tmp_path / "in.parquet", rich_table([]))
    source, output = job(tmp_path)
    counts, back = run(source, output, FakeHandler(SETTINGS))
    assert counts.get("rows_written", 0) == back.num_rows == 0
    assert_same_schema(back.schema, output.schema)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_rows_ask_alike_is_asked_once_unless_it_is_drawn(tmp_path, temperature):
    rows = [{"key": i, "text": f"text {i % 10}", "other": i} for i in range(500)]
    write_parquet(tmp_path / "in.parquet", pa.Table.from_pylist(rows), rows_per_group=60)
    settings = GenerateSettings(
        prompt_column="text", sampling=SamplingParams(max_tokens=3, temperature=temperature)
    )
    source, output = job(tmp_path, settings)
    counts, back = run(source, output, FakeHandler(settings))
    assert counts["rows_in"] == (10 if temperature == 0 else 500)
    assert counts["duplicate_rows"] == 500 - counts["rows_in"]
    assert back["key"].to_pylist() == list(range(500))
    if temperature == 0:
        wanted = [completion_of(row["text"]) for row in rows]
        assert back["completion"].to_pylist() == wanted


def test_several_tasks_over_one_read(tmp_path):
    write_parquet(tmp_path / "in.parquet", rich_table(range(100)), rows_per_group=30)
    source, output = job(tmp_path, prefixes=("short_", "long_"))
    pipeline = local_pipeline()
    rows = pipeline | ReadTable(source)
    longer = GenerateSettings(
        prompt_column="text",
        sampling=SamplingParams(max_tokens=5),
        logprob=True,
        token_ids=True,
        truncate="left",
    )
    answers = tuple(
        rows | f"Infer{tag}" >> InferTable(FakeHandler(s), num_rows=100)
        for tag, s in enumerate((SETTINGS, longer))
    )
    _ = (rows, answers) | WriteOutput(output)
    pipeline.run()
    back = pa.concat_tables(map(pq.read_table, output.sink.earlier()))
    assert back["key"].to_pylist() == list(range(100))
    for text, short, long in zip(
        *(back[n].to_pylist() for n in ("text", "short_completion", "long_completion")), strict=True
    ):
        assert (short, long) == (completion_of(text, 2), completion_of(text, 5))
    assert len(json.loads((tmp_path / "_out.run.json").read_text())["tasks"]) == 2


def test_more_failures_than_allowed_publish_nothing(tmp_path):
    rows = [{"key": i, "text": None if i % 2 else f"r{i}"} for i in range(40)]
    write_parquet(tmp_path / "in.parquet", pa.Table.from_pylist(rows))
    source, output = job(tmp_path, max_error_fraction=0.4)
    with pytest.raises(FailuresError, match=r"at most 0\.4 .*got 20 of 40: 20 x column 'text'"):
        run(source, output, FakeHandler(SETTINGS))
    assert output.sink.earlier() == []


@pytest.mark.parametrize("lose", [True, False], ids=["lost", "doubled"])
def test_rows_that_are_lost_or_doubled_on_the_way_publish_nothing(tmp_path, monkeypatch, lose):
    write_parquet(tmp_path / "in.parquet", rich_table(range(40)), rows_per_group=10)
    source, output = job(tmp_path)
    split = Layout.split

    def careless(layout, position, batch):
        if position == 20:
            return split(layout, 20, batch.slice(1)) if lose else [*split(layout, 20, batch)] * 2
        return split(layout, position, batch)

    monkeypatch.setattr(Layout, "split", careless)
    with pytest.raises(BalanceError, match="rows: expected"):
        run(source, output, FakeHandler(SETTINGS))
    assert output.sink.earlier() == []


def test_results_that_are_lost_publish_nothing(tmp_path, monkeypatch):
    write_parquet(tmp_path / "in.parquet", rich_table(range(40)), rows_per_group=10)
    source, output = job(tmp_path)
    spread = infer_table.spread
    monkeypatch.setattr(infer_table, "spread", lambda *args: spread(*args).slice(1))
    with pytest.raises(BalanceError, match="results: expected one for each"):
        run(source, output, FakeHandler(SETTINGS))
    assert output.sink.earlier() == []


def test_what_a_task_does_not_use_goes_around_it(tmp_path):
    """Wide rows meet their results in the last shuffle; requests hold the used columns alone."""
    SEEN.clear()
    write_parquet(tmp_path / "in.parquet", rich_table(range(40)))
    source, output = job(tmp_path)
    run(source, output, Watching(SETTINGS))
    assert set(SEEN) == {("__request_key", "__positions", "__encoded")}


def test_each_row_is_encoded_once(tmp_path, monkeypatch):
    encode, encoded = PromptEncoder.__call__, []

    def counting(encoder, row, **options):
        encoded.append(row["text"])
        return encode(encoder, row, **options)

    monkeypatch.setattr(PromptEncoder, "__call__", counting)
    table = rich_table(range(40))
    write_parquet(tmp_path / "in.parquet", table)
    source, output = job(tmp_path)
    _, written = run(source, output, FakeHandler(SETTINGS))
    assert sorted(encoded) == sorted(table["text"].to_pylist())
    assert written.num_rows == 40
    assert written["completion"].null_count < 40


@pytest.mark.parametrize(
    ("num_rows", "wanted"), [(0, 1), (63, 1), (640, 10), (10**5, 64), (10**6, 244), (10**9, 1024)]
)
def test_ranges_grow_with_the_table(num_rows, wanted):
    assert num_ranges(num_rows) == wanted


def test_no_step_before_the_sink_sees_rows_and_results_together(tmp_path):
    """So a sink that fails is tried again from what a shuffle holds, never from the model."""
    write_parquet(tmp_path / "in.parquet", rich_table(range(5)))
    source, output = job(tmp_path)
    pipeline = local_pipeline()
    rows = pipeline | ReadTable(source)
    answers = rows | "Infer" >> InferTable(FakeHandler(SETTINGS), num_rows=5)
    _ = (rows, (answers,)) | "Write" >> WriteOutput(output)
    labels = [part.full_label for part in pipeline.transforms_stack[0].parts[-1].parts]
    after = labels[labels.index("Write/Group") :]
    assert [label.rpartition("/")[2] for label in after][:2] == ["Group", "Stage"]
    assert all(isinstance(part, beam.PCollection) for part in answers.results)


def test_of_two_pipelines_that_write_one_table_the_last_publishes(tmp_path, all_tasks_model):
    """Python pipelines hold a lease from when they are built, and tell of another job's."""
    write_parquet(tmp_path / "in.parquet", pa.table({"text": ["a", "b"]}))
    handler = GemmaEmbedModelHandler(
        all_tasks_model, EmbedSettings(text_column="text"), large_model=False
    )
    uri = f"{tmp_path}/out.parquet"

    def build():
        pipeline = local_pipeline()
        table = ReadTable(f"{tmp_path}/in.parquet")
        write = WriteTable(uri, table, {"gist": handler})
        rows = pipeline | table
        _ = (rows, {"gist": rows | InferTable(handler)}) | write
        return pipeline

    first, second = build(), build()
    with pytest.raises(StorageError, match="expected the lease of this job, got a job of process"):
        first.run()
    second.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "_out.run.json", "in.parquet", "out-00000-of-00001.parquet"
    ]  # fmt: skip
    for path in tmp_path.glob("*out*"):
        path.unlink()
    take(f"{tmp_path}/_out.parquet.work", REMOTE, up_to=Standing.ENDED)
    with pytest.raises(OptionsError, match=r"no other job that writes it, got a job that .*; wait"):
        build()
