"""Batches between steps: rows find their groups, in order, and none is left behind."""

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.runners.worker.data_plane import (
    ClosableOutputStream,
    TimeBasedBufferingClosableOutputStream,
)
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma import batches
from beam_gemma.batches import RecordBatchCoder, by_group, held_in, joined
from beam_gemma.errors import StorageError
from beam_gemma.inference.transforms import Generate
from beam_gemma.tables.open_table import ReadTable, open_source
from beam_gemma.tasks.generate import GenerateSettings
from tests.doubles.fake_models import FakeHandler, local_pipeline
from tests.doubles.tables import rich_table, write_parquet


@given(st.lists(st.integers(0, 6), max_size=40))
def test_every_row_is_in_its_group_in_order(groups: list[int]) -> None:
    batch = pa.record_batch({"row": pa.array(range(len(groups)), pa.int64())})
    found = {g: rows["row"].to_pylist() for g, rows in by_group(np.array(groups, np.int64), batch)}
    assert found == {g: [i for i, own in enumerate(groups) if own == g] for g in set(groups)}


@given(st.lists(st.lists(st.sampled_from("ab"), max_size=4), min_size=1, max_size=5))
def test_batches_are_joined_whatever_is_in_them(lists: list[list[str]]) -> None:
    kind = pa.dictionary(pa.int8(), pa.string())
    batches = [
        pa.record_batch({"label": pa.array(own, pa.string()).dictionary_encode().cast(kind)})
        for own in lists
    ]
    batch = joined(batches)
    assert batch.schema == batches[0].schema
    assert batch["label"].to_pylist() == [word for own in lists for word in own]


@pytest.mark.parametrize("made", ["rows", "table"])
def test_elements_are_sent_whole(tmp_path, monkeypatch, made: str) -> None:
    """A stream that is also sent from time to time cuts elements in two; see `send_whole`."""
    monkeypatch.setattr(worker_handlers, "DATA_BUFFER_TIME_LIMIT_MS", 10_000)
    pipeline = local_pipeline()
    if made == "table":
        path = write_parquet(tmp_path / "in.parquet", rich_table([1]))
        _ = pipeline | ReadTable(open_source(str(path)))
    else:
        handler = FakeHandler(GenerateSettings(prompt_column="text"))
        _ = pipeline | beam.Create([{"text": "a"}]) | Generate(handler)
    limit = worker_handlers.DATA_BUFFER_TIME_LIMIT_MS
    stream = ClosableOutputStream.create(None, None, limit)
    assert not isinstance(stream, TimeBasedBufferingClosableOutputStream)


CODER = RecordBatchCoder()


def batch_of(*sizes: int) -> pa.RecordBatch:
    """Return rows with so many bytes each."""
    values = [bytes([number]) * size for number, size in enumerate(sizes)]
    return pa.record_batch({"raw": pa.array(values, pa.large_binary()), "size": sizes})


def test_large_batches_of_a_job_are_held_in_files_until_its_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(batches, "FILE_BYTES", 1 << 20)
    folder = tmp_path / "work" / "held"
    small, large = batch_of(100), batch_of(1 << 18, 5, 1 << 18)
    plain = CODER.encode(large)
    with held_in(str(folder)):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert CODER.decode(CODER.encode(small)).equals(small)
        assert not list(folder.iterdir())
        references = [CODER.encode(large.slice(1)) for _ in range(9)]
        assert max(map(len, references)) < 50
        assert 1 < len(list(folder.iterdir())) < 9
        assert all(CODER.decode(reference).equals(large.slice(1)) for reference in references)
        assert CODER.decode(plain).equals(large)
        kept = CODER.decode(references[0])
    assert not folder.exists()
    assert kept.equals(large.slice(1))  # the file is gone, what was read of it is not
    assert CODER.encode(large) == plain


def test_held_batches_take_no_memory_until_they_are_looked_at(tmp_path) -> None:
    with held_in(str(tmp_path / "held")):
        reference = CODER.encode(batch_of(1 << 24))
        before = pa.total_allocated_bytes()
        found = CODER.decode(reference)
        assert pa.total_allocated_bytes() - before < 1 << 16
        assert found["size"].to_pylist() == [1 << 24]


def test_a_folder_that_cannot_be_written_is_named(tmp_path) -> None:
    with held_in(str(tmp_path / "held")):
        (tmp_path / "held").rmdir()
        with pytest.raises(StorageError, match=r"held: expected to hold .* bytes of rows, got"):
            CODER.encode(batch_of(1 << 20))


def test_the_size_of_a_batch_is_known_without_encoding_it(monkeypatch) -> None:
    monkeypatch.setattr(RecordBatchCoder, "encode", None)
    assert CODER.estimate_size(batch_of(1000)) >= 1000
