"""Boxes in completions of PaliGemma: what is read from them, and what is counted as unreadable."""

import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.model.markup import Control, Text
from beam_gemma.monitoring.result_summary import Summary
from beam_gemma.tasks.boxes import Box, box_type, read_boxes
from beam_gemma.tasks.labels import join
from tests.doubles.published_processors import our_tokenizer, published_tokenizer

CAT = "<loc0256><loc0000><loc0512><loc1023>"
MASK = "".join(f"<seg{i:03}>" for i in range(112, 128))


def written(boxes):
    """Return the completion that PaliGemma writes for boxes."""
    return " ; ".join(
        "".join(f"<loc{n:04}>" for n in box.locations)
        + "".join(f"<seg{n:03}>" for n in box.segment)
        + f" {box.label}"
        for box in boxes
    )


def labels():
    """Return texts that can be labels: what neither separates entries nor is a token."""
    texts = st.text(max_size=12) | st.sampled_from(
        ["a;b", "café", "猫", "x; y", "<loc12>", "1 > 0"]
    )
    return texts.map(str.strip).filter(
        lambda label: not re.search(r"(^|\s);(\s|$)|;$|<loc\d{4}>|<seg\d{3}>", label)
    )


LOCATIONS = st.tuples(*[st.integers(0, 1023)] * 4).map(
    lambda n: (min(n[0], n[2]), min(n[1], n[3]), max(n[0], n[2]), max(n[1], n[3]))
)
SEGMENTS = st.just(()) | st.lists(st.integers(0, 127), min_size=16, max_size=16).map(tuple)


@given(st.lists(st.tuples(labels(), LOCATIONS, SEGMENTS), max_size=5))
def test_boxes_are_read_as_they_were_written(values):
    boxes = [Box(*value) for value in values]
    assert read_boxes(written(boxes)) == (boxes, 0)


def test_corners_are_in_pixels_of_the_picture():
    (box,), _ = read_boxes(f"{CAT} cat")
    assert box.in_pixels(height=200, width=1024) == {
        "label": "cat",
        "y_min": 50.0,
        "x_min": 0.0,
        "y_max": 100.0,
        "x_max": 1023.0,
        "segment": [],
    }


def test_a_box_is_a_value_of_its_type():
    (box,), _ = read_boxes(f"{CAT}{MASK} cat")
    value = box.in_pixels(height=30, width=20)
    assert value["segment"] == list(range(112, 128))
    plain = box_type(with_mask=False)
    assert pa.array([[value], None, []], plain).to_pylist() == [[value], None, []]
    masked = value | {"mask": b"png"}
    assert pa.array([[masked]], box_type(with_mask=True)).to_pylist() == [[masked]]


@pytest.mark.parametrize(
    ("completion", "names", "num_unreadable"),
    [
        ("", [], 0),
        (" ; ", [], 0),
        ("no cat", [], 1),
        (f"{CAT} cat", ["cat"], 0),
        (f"{CAT} cat ; {CAT} black dog\n", ["cat", "black dog"], 0),
        (f"{CAT} cat;{CAT}dog;", ["cat", "dog"], 0),
        # The separator is missing.
        (f"{CAT} cat {CAT} dog", ["cat", "dog"], 0),
        (f"{CAT}{MASK} {CAT}{MASK} dog", ["", "dog"], 0),
        # A name with a semicolon is one name, unless spaces are around it.
        (f"{CAT} cat; black", ["cat; black"], 0),
        (f"{CAT} cat ; dog", ["cat"], 1),
        # Too few or too many locations or segments.
        ("<loc0001><loc0002><loc0003> cat", [], 1),
        (f"<loc0001>{CAT} cat ; {CAT} dog", ["dog"], 1),
        (f"{CAT}<seg001> cat", [], 1),
        (f"{CAT}{MASK}<seg001> cat", [], 1),
        (f"{MASK}{CAT} cat", ["cat"], 1),
        (f"{CAT} cat {MASK}", [], 1),
        # A completion that was cut off.
        (f"{CAT} cat ; <loc0001><loc0002>", ["cat"], 1),
        (f"{CAT} cat ; <loc00", ["cat"], 1),
        # The name comes first.
        (f"cat {CAT} ; {CAT} dog", ["", "dog"], 1),
        # Corners in the wrong order, and numbers that are no token.
        ("<loc0512><loc0000><loc0256><loc1023> cat", [], 1),
        ("<loc0256><loc1023><loc0512><loc0000> cat", [], 1),
        ("<loc0256><loc0000><loc0512><loc1024> cat", [], 1),
        (f"{CAT}{MASK.replace('127', '128')} cat", [], 1),
        ("<LOC0256><loc0000><loc0512><loc1023> cat", [], 2),
        (f"{CAT} 黒い猫 🐈", ["黒い猫 🐈"], 0),
    ],
)
def test_what_is_no_box_is_counted(completion, names, num_unreadable):
    boxes, counted = read_boxes(completion)
    assert [box.label for box in boxes] == names
    assert counted == num_unreadable


def test_completions_show_places_as_transformers_does():
    published = published_tokenizer("paligemma")
    tokenizer = our_tokenizer("paligemma")
    text = f"{CAT}{MASK} the hat ; {CAT}cat <loc0001>\n"
    ids = tokenizer.encode(tokenizer.split(text), add_bos=False)
    assert len(ids) < len(text) / 2
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) == text
    assert published.decode(ids, skip_special_tokens=True) == text
    assert b"<seg127>" in tokenizer.vocabulary()


def test_places_in_rows_are_text_unless_they_are_allowed():
    tokenizer = our_tokenizer("paligemma")
    place = tokenizer.control_pieces["<loc0001>"]
    assert place not in tokenizer.encode([Text("<loc0001>")])
    assert place in tokenizer.encode(tokenizer.split("<loc0001>"))
    label = (Control("<loc0001>"), Text(" cat"), Control("<loc0002>"))
    joined = join(tokenizer, [Text("where: ")], label)
    assert tokenizer.decode(joined.token_ids[joined.start :]) == "<loc0001> cat<loc0002>"
    alone = join(tokenizer, [Text("where")], [Control("<loc0001>")])
    assert alone.num_label_tokens == 1


def test_a_summary_counts_what_is_unreadable():
    columns = {"num_unreadable_boxes": [2, None, 0, 1], "error": [None, "x", None, None]}
    batch = pa.RecordBatch.from_pydict(columns)
    summary = Summary.of(batch) + Summary.of(batch)
    assert summary.unreadable_boxes == 6
    assert Summary.from_dict(summary.as_dict()) == summary
