"""Embeddings of pictures: computed once, kept within bounds, never lost before a step has them."""

from dataclasses import replace

import numpy as np
import pytest

from beam_gemma.engine.media_store import MediaStore, check_encoder
from beam_gemma.engine.sequence import Picture, Sound
from beam_gemma.errors import ArtifactError
from tests.doubles.fakes import (
    NUM_IMAGE_TOKENS,
    FakeEncoder,
    fake_picture,
    fake_signature,
    soft_ids,
)

ONE = NUM_IMAGE_TOKENS * 8 * 4
"""Bytes of the embeddings of one picture."""


def pictures(*numbers):
    return [fake_picture(number, 0) for number in numbers]


def test_equal_pictures_are_computed_once_and_new_ones_together():
    store = MediaStore({Picture: (encoder := FakeEncoder())})
    features = store.prepare(pictures(1, 2, 1))
    assert encoder.batches == [2]
    for picture in pictures(1, 2):
        assert features[picture.digest][:, 0].tolist() == soft_ids(picture.values)
    assert features.keys() == {p.digest for p in pictures(1, 2)}
    store.prepare(pictures(2, 3, 1, 4))
    assert encoder.batches == [2, 2]
    store.prepare(pictures(4, 1))
    assert encoder.batches == [2, 2], "nothing is left to compute"
    assert (store.num_computed[Picture], store.num_reused[Picture]) == (4, 5)


def test_each_kind_is_computed_by_its_own_session():
    class Ears(FakeEncoder):
        def encode(self, frames):
            self.batches.append(len(frames))
            return [np.full((len(each), 8), each.sum(), np.float32) for each in frames]

    store = MediaStore({Picture: (eyes := FakeEncoder()), Sound: (ears := Ears())})
    clips = [Sound(0, bytes([n]), np.full((n, 4), n, np.float32), n) for n in (1, 2)]
    features = store.prepare([*pictures(1), clips[0], *pictures(2), clips[1], clips[0]])
    assert (eyes.batches, ears.batches) == ([2], [2])
    assert features[clips[1].digest].tolist() == [[16.0] * 8] * 2
    assert store.num_computed == {Picture: 2, Sound: 2}
    assert store.num_reused == {Picture: 0, Sound: 1}


def test_what_was_needed_longest_ago_goes_first():
    store = MediaStore({Picture: (encoder := FakeEncoder())}, max_bytes=3 * ONE)
    for number in (1, 2, 3, 1, 4):
        store.prepare(pictures(number))
    assert store.num_bytes == 3 * ONE
    encoder.batches.clear()
    store.prepare(pictures(1))
    store.prepare(pictures(3))
    assert encoder.batches == [], "only picture 2 is gone"
    store.prepare(pictures(2))
    assert encoder.batches == [1]


def test_a_step_gets_all_of_its_pictures_whatever_the_bound():
    store = MediaStore({Picture: (encoder := FakeEncoder())}, max_bytes=2 * ONE)
    store.prepare(pictures(1, 2))
    features = store.prepare(pictures(3, 4, 1, 5))
    assert features.keys() == {p.digest for p in pictures(3, 4, 1, 5)}
    assert store.num_bytes == 4 * ONE
    store.prepare(pictures(6))
    assert store.num_bytes == 2 * ONE
    encoder.batches.clear()
    store.prepare(pictures(5, 6))
    assert encoder.batches == []


def test_a_failure_changes_nothing():
    store = MediaStore({Picture: (encoder := FakeEncoder())}, max_bytes=2 * ONE)
    store.prepare(pictures(1, 2))
    encoder.fails = lambda pixels: pixels[0, 0, 0] == 3
    with pytest.raises(RuntimeError, match="the tower is gone"):
        store.prepare(pictures(4, 3))
    assert (store.num_computed[Picture], store.num_reused[Picture], store.num_bytes) == (
        2,
        0,
        2 * ONE,
    )
    encoder.batches.clear()
    store.prepare(pictures(1, 2))
    assert encoder.batches == []


def test_embeddings_that_a_decoder_cannot_take_are_refused():
    decoder = fake_signature(optional_inputs=("inputs_embeds", "span_ends"))
    check_encoder(FakeEncoder.signature, decoder)
    with pytest.raises(ArtifactError, match=r"takes them, .*no embeddings.*export the model again"):
        check_encoder(FakeEncoder.signature, fake_signature())
    with pytest.raises(ArtifactError, match=r"\(8, 'float32'\), got \(8, 'bfloat16'\)"):
        check_encoder(replaced(dtype="bfloat16"), decoder)
    with pytest.raises(ArtifactError, match=r"\(8, 'float32'\), got \(9, 'float32'\)"):
        check_encoder(replaced(hidden_size=9), decoder)


def replaced(**changes):
    return replace(FakeEncoder.signature, **changes)


def test_kept_embeddings_are_those_that_were_computed():
    store = MediaStore({Picture: FakeEncoder()})
    first = store.prepare(pictures(1))
    again = store.prepare(pictures(2, 1))
    [picture] = pictures(1)
    np.testing.assert_array_equal(first[picture.digest], again[picture.digest])
