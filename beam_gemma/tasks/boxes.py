"""Boxes that PaliGemma writes into a completion: what is where in a row's picture.

An entry is four tokens from `<loc0000>` to `<loc1023>` (y_min, x_min, y_max and x_max in 1,024ths
of the picture's height or width), after `segment` also 16 tokens from `<seg000>` to `<seg127>` (the
mask inside the box, see `mask_decoder.py`), and a label. A semicolon is between entries. Tokens and
their order are documented at `configs/proj/paligemma` of google-research/big_vision.
"""

import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

LOCATION_PIECE = "<loc0000>"
"""Piece that only vocabularies of models with boxes have."""
NUM_LOCATIONS = 1024
NUM_SEGMENT_TOKENS = 16
NUM_SEGMENT_CODES = 128
_LOC, _SEG = r"<loc[0-9]{4}>", r"<seg[0-9]{3}>"
_SPACE_BEFORE_TOKEN = re.compile(rf"\s+(?={_LOC}|{_SEG})")
_BETWEEN_ENTRIES = re.compile(
    rf"(?:^|(?<=\s));(?=\s|$)|;(?={_LOC})|;\s*$|(?<!<loc[0-9]{{4}}>)(?={_LOC})"
)
_ENTRY = re.compile(
    rf"(?P<locations>(?:{_LOC}){{4}})(?P<segment>(?:{_SEG}){{{NUM_SEGMENT_TOKENS}}})?"
    rf"(?P<label>(?:(?!{_LOC}|{_SEG}).)*)",
    re.DOTALL,
)
_NUMBER = re.compile("[0-9]+")


@dataclass(frozen=True, slots=True)
class Box:
    """An object in a picture: its label, its corners, and the tokens of its mask."""

    label: str
    locations: tuple[int, ...]
    """y_min, x_min, y_max and x_max in 1,024ths of the picture's height or width."""
    segment: tuple[int, ...] = ()
    """Codes of the mask's tokens; empty if the model wrote none."""

    def in_pixels(self, *, height: int, width: int) -> dict[str, Any]:
        """Return the box as a value of `box_type`, without its mask, for a picture of that size."""
        y_min, x_min, y_max, x_max = self.locations
        return {
            "label": self.label,
            "y_min": y_min / NUM_LOCATIONS * height,
            "x_min": x_min / NUM_LOCATIONS * width,
            "y_max": y_max / NUM_LOCATIONS * height,
            "x_max": x_max / NUM_LOCATIONS * width,
            "segment": list(self.segment),
        }


def box_type(*, with_mask: bool) -> pa.DataType:
    """Return the type of a row's boxes in a table."""
    corners = [(name, pa.float64()) for name in ("y_min", "x_min", "y_max", "x_max")]
    mask = [("mask", pa.binary())] if with_mask else []
    fields = [("label", pa.string()), *corners, ("segment", pa.list_(pa.int64())), *mask]
    return pa.list_(pa.struct(fields))


def read_boxes(completion: str) -> tuple[list[Box], int]:
    """Return the boxes of a completion, and the number of its entries that are none.

    An entry is no box if it has not four locations, has them in a wrong order or after its label,
    or has a wrong number of segment tokens.
    """
    entries = _BETWEEN_ENTRIES.split(_SPACE_BEFORE_TOKEN.sub("", completion))
    read = [_box(entry) for entry in entries if entry.strip()]
    boxes = [box for box in read if box is not None]
    return boxes, len(read) - len(boxes)


def _box(entry: str) -> Box | None:
    match = _ENTRY.fullmatch(entry.strip())
    if match is None:
        return None
    locations = _numbers(match["locations"])
    segment = _numbers(match["segment"] or "")
    y_min, x_min, y_max, x_max = locations
    is_in_order = y_min <= y_max and x_min <= x_max
    is_in_range = max(locations) < NUM_LOCATIONS and max(segment, default=0) < NUM_SEGMENT_CODES
    return Box(match["label"].strip(), locations, segment) if is_in_order and is_in_range else None


def _numbers(tokens: str) -> tuple[int, ...]:
    return tuple(map(int, _NUMBER.findall(tokens)))
