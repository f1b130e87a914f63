"""One engine for a machine: its steps stay full, its death is heard of, its errors are its own."""

import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.cli.plan import Job
from beam_gemma.cli.run import FAILURE, counters, run_pipeline
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import ArtifactError, EngineError
from beam_gemma.inference.handlers import GemmaGenerateModelHandler
from beam_gemma.inference.transforms import Generate
from beam_gemma.jobs.publish import Output
from beam_gemma.tables.open_table import open_source
from beam_gemma.tasks.generate import GenerateSettings
from tests.doubles.fake_models import SLOTS, UnevenHandler, local_pipeline
from tests.doubles.workers_path import NO_TORCH, WORKERS_PATH

SETTINGS = GenerateSettings(prompt_column="text", sampling=SamplingParams(max_tokens=40))
NUM_ROWS = 512
SMALL = 32
"""Rows of a Beam batch that is as small beside 20 slots as 100 rows are beside 64."""


def run_job(handler, *flags):
    """Complete some rows; return the job's counters."""
    texts = [f"row {i}\n" for i in range(NUM_ROWS)]
    batches = pa.table({"text": texts}).to_batches(max_chunksize=16)
    pipeline = local_pipeline(*flags)
    _ = pipeline | beam.Create(batches).with_output_types(pa.RecordBatch) | Generate(handler)
    result = pipeline.run()
    result.wait_until_finish()
    return counters(result)


def occupancy(counts):
    return counts["decode_rows"] / counts["decode_slots"]


@pytest.mark.parametrize(
    ("mode", "num_workers", "batch_rows"),
    [("in_memory", 1, 4096), ("multi_threading", 4, SMALL), ("multi_processing", 4, SMALL)],
    ids=["in process", "threads", "processes"],
)
def test_steps_are_full_whatever_the_bundles(tmp_path, monkeypatch, mode, num_workers, batch_rows):
    """Of all steps, those of the end included, where fewer rows are left than slots."""
    monkeypatch.setenv("PYTHONPATH", WORKERS_PATH)
    (tmp_path / "callers").mkdir()
    (tmp_path / "loads").mkdir()
    callers = (tmp_path / "callers", num_workers)
    handler = UnevenHandler(
        SETTINGS, batch_rows=batch_rows, callers=callers, loads=tmp_path / "loads"
    )
    flags = [f"--direct_running_mode={mode}", f"--direct_num_workers={num_workers}"]
    counts = run_job(handler, *flags)
    assert counts["rows_ok"] == NUM_ROWS
    assert len(list((tmp_path / "loads").iterdir())) == 1
    assert counts["decode_slots"] % SLOTS == 0
    assert counts["decode_rows"] == counts["completion_tokens"]
    assert occupancy(counts) >= 0.9


def test_one_thread_waits_for_the_slowest_row_of_each_batch():
    """What the two ways above are for; it also shows that the bar is not met by chance."""
    counts = run_job(UnevenHandler(SETTINGS, batch_rows=SMALL))
    assert counts["decode_rows"] == counts["completion_tokens"]
    assert occupancy(counts) < 0.8


@pytest.fixture
def owner(monkeypatch):
    """A process that runs an engine; give its handler and process."""
    handler = UnevenHandler(SETTINGS)
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    monkeypatch.syspath_prepend(NO_TORCH)
    process = spawn.Process(target=own, args=(handler, ready))
    process.start()
    assert ready.wait(60)
    yield handler, process
    process.kill()
    process.join()


def own(handler, ready):
    """Load a model for this machine, and serve it until this process is killed."""
    _model = handler.load_model()
    ready.set()
    signal.pause()


def batch_of(num_rows):
    return pa.record_batch({"text": [f"row {i}\n" for i in range(num_rows)]})


def complete(handler, model, num_rows):
    (result,) = handler.run_inference([batch_of(num_rows)], model)
    return result.inference.to_pylist()


def test_death_of_the_owner_is_heard_at_once_and_the_next_engine_is_announced(owner, caplog):
    handler, process = owner
    model = handler.load_model()
    before = complete(handler, model, 3)
    assert [row["error"] for row in before] == [None] * 3
    killed = []
    killer = threading.Timer(0.3, lambda: (killed.append(time.monotonic()), process.kill()))
    killer.start()
    with pytest.raises(EngineError, match=r"the process that runs it .* has died"):
        complete(handler, model, 1000)  # takes much longer than 0.3 s
    assert time.monotonic() - killed[0] < 5  # without the socket, it would be 30 s of silence
    process.join()
    caplog.clear()
    # As Beam keeps it for the next bundle.
    assert complete(handler, model, 3) == before
    (warning,) = (message for message in caplog.messages if message.startswith("engine: "))
    assert f"process {process.pid}, which ran it for this machine, has died" in warning
    assert f"process {os.getpid()} loads the model anew" in warning


def test_death_of_the_owner_between_two_calls_loses_nothing(owner):
    handler, process = owner
    model = handler.load_model()
    before = complete(handler, model, 3)
    process.kill()
    process.join()
    assert complete(handler, model, 3) == before


def test_error_of_loading_is_the_callers_own_and_no_seat_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    handler = GemmaGenerateModelHandler(f"{tmp_path}/missing")
    for _ in range(2):
        with pytest.raises(ArtifactError, match="missing"):
            handler.load_model()
    (folder,) = tmp_path.iterdir()
    assert list(folder.iterdir()) == []


def test_error_of_loading_in_worker_processes_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", WORKERS_PATH)
    flags = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    pipeline = local_pipeline(*flags)
    handler = GemmaGenerateModelHandler(f"{tmp_path}/missing", SETTINGS)
    _ = pipeline | beam.Create([{"text": "a"}, {"text": "b"}]) | Generate(handler)
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "in.parquet")
    source = open_source(f"{tmp_path}/in.parquet")
    job = Job(
        source=source, handler=handler, output=object.__new__(Output), options=pipeline.options
    )
    assert run_pipeline(pipeline, job) == FAILURE
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: .*missing: expected a model folder.*\n", err)
