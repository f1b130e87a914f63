"""Batches between steps: rows find their groups, in order, and none is left behind."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.batches import by_group, joined


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
