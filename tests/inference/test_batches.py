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

from beam_gemma.batches import by_group, joined
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
