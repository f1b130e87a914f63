"""Charts: round axes, and shapes whose sizes are the numbers."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.monitoring.charts import BASE, Bin, amount, duration, histogram, over_time, ticks


@given(st.floats(1e-6, 1e12))
def test_an_axis_has_a_few_round_numbers(top):
    found = ticks(top)
    assert found[0] == 0
    assert found[-1] >= top * (1 - 1e-9)
    assert 3 <= len(found) <= 7
    assert re.fullmatch(r"[125]e[+-]\d+", f"{found[1]:.0e}")


@pytest.mark.parametrize(
    ("secs", "steps"),
    [(4, [0, 1, 2, 3, 4]), (290, [0, 60, 120, 180, 240, 300]), (7000, [0, 1800, 3600, 5400, 7200])],
)
def test_an_axis_of_time_has_whole_units(secs, steps):
    assert ticks(secs, whole=True) == steps


@given(st.floats(1, 1e8))
def test_an_axis_of_time_is_never_crowded(secs):
    assert 2 <= len(ticks(secs, whole=True)) <= 7


@pytest.mark.parametrize(
    ("secs", "text"),
    [
        (0, "0 s"),
        (1.5, "1.5 s"),
        (60, "1 min"),
        (341, "5 min 41 s"),
        (3600, "1 h"),
        (5400, "1 h 30 min"),
    ],
)
def test_times_in_words(secs, text):
    assert duration(secs) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (20, "20"), (5000, "5,000"), (15000, "15k"), (2.5e6, "2.5M")],
)
def test_amounts_in_words(value, text):
    assert amount(value) == text


def test_bars_are_as_high_as_their_numbers():
    bins = [Bin(0, 4, 10), Bin(4, 8, 30), Bin(8, None, 0)]
    titles, _, tops, _ = zip(*histogram(bins, unit="tokens", counted="rows").bars, strict=True)
    heights = [BASE - y for y in tops]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.2)
    assert heights[2] == 0
    assert titles == (
        "0 to 3 tokens: 10 rows", "4 to 7 tokens: 30 rows", "8 or more tokens: 0 rows"
    )  # fmt: skip


def test_a_line_has_a_step_for_each_value():
    chart = over_time([0, 1, 3], [50, 100], unit="percent", top=100)
    points = [tuple(map(float, point.split(","))) for point in chart.line.split()]
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = points
    assert (x1, y0) == (x2, y1)
    assert y2 == y3
    assert x3 - x2 == pytest.approx(2 * (x1 - x0), abs=0.2)
    assert BASE - y2 == pytest.approx(2 * (BASE - y0), abs=0.2)
