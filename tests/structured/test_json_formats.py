"""Strings of a format: real days, times of day, points in time, and others."""

import datetime as dt
import ipaddress
import re
import uuid

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.structured.grammar import to_regex
from beam_gemma.structured.json_formats import FORMATS
from beam_gemma.structured.json_values import arrow_value

REGEX = {name: re.compile(to_regex(found.language)) for name, found in FORMATS.items()}


def is_text(name: str, text: str) -> bool:
    return REGEX[name].fullmatch(text) is not None


def reads(read, text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True


def days(years):
    """Return the texts of all days of some years, and of some that there are not."""
    return [f"{y:04d}-{m:02d}-{d:02d}" for y in years for m in range(14) for d in range(33)]


def test_dates_are_the_days_that_python_has() -> None:
    texts = days([0, 1, 4, 99, 100, 400, 1900, 1999, 2000, 2023, 2024, 9996, 9999])
    texts += [f"{year:04d}-02-29" for year in range(10_000)]
    for text in texts:
        assert is_text("date", text) == reads(dt.date.fromisoformat, text), text
    for text in ("2024-1-01", "20240101", "2024-01-01 ", "-2024-01-01", "2024-W01-1", "2024-01-0²"):
        assert not is_text("date", text)


def test_points_in_time_are_of_years_that_every_zone_leaves_in_python() -> None:
    for year in range(10_000):
        for day in ("02-28", "02-29", "12-31"):
            text = f"{year:04d}-{day}"
            is_day = 1000 <= year <= 8999 and reads(dt.date.fromisoformat, text)
            assert is_text("date-time", f"{text}T00:00:00Z") == is_day, text
    kind = FORMATS["date-time"].type
    for text in ("1000-01-01T00:00:00+23:59", "8999-12-31T23:59:59.999999-23:59"):
        assert is_text("date-time", text)
        (found,) = pa.array([arrow_value(text, kind)], kind).to_pylist()
        assert found == dt.datetime.fromisoformat(text)


@pytest.mark.parametrize(
    ("text", "is_time"),
    [
        ("00:00:00Z", True),
        ("23:59:59.999999Z", True),
        ("12:30:00.5Z", True),
        ("24:00:00Z", False),
        ("12:60:00Z", False),
        ("12:00:60Z", False),
        ("12:00Z", False),
        ("12:00:00.Z", False),
        ("12:00:00.1234567Z", False),
        ("12:00:00", False),
        ("12:00:00z", False),
    ],
)
def test_times_of_day(text: str, is_time: bool) -> None:
    assert is_text("time", text) == is_time
    assert is_text("date-time", f"2024-02-29T{text}") == is_time


def test_zones() -> None:
    for zone in ("Z", "+00:00", "-11:30", "+23:59"):
        assert is_text("date-time", f"2024-02-29T12:00:00{zone}")
    for zone in ("+24:00", "+1:00", "+01:60", "+0100", "+01", "z", ""):
        assert not is_text("date-time", f"2024-02-29T12:00:00{zone}")


@given(st.times(), st.dates(dt.date(1000, 1, 1), dt.date(8999, 12, 31)))
def test_times_and_dates_come_back_from_arrow(time: dt.time, date: dt.date) -> None:
    point = dt.datetime.combine(date, time, dt.UTC)
    texts = {
        "date": date.isoformat(),
        "time": f"{time.isoformat()}Z",
        "date-time": point.isoformat(),
    }
    for (name, text), value in zip(texts.items(), (date, time, point), strict=True):
        kind = FORMATS[name].type
        assert is_text(name, text)
        assert pa.array([arrow_value(text, kind)], kind).to_pylist() == [value]


@given(st.uuids())
def test_uuids(value: uuid.UUID) -> None:
    assert is_text("uuid", str(value))
    assert is_text("uuid", str(value).upper())
    assert not is_text("uuid", value.hex)
    assert not is_text("uuid", f"{value}0")


@pytest.mark.parametrize(
    ("text", "is_duration"),
    [
        ("P3D", True),
        ("PT0S", True),
        ("P1DT2H3M4S", True),
        ("PT36H", True),
        ("PT5M10S", True),
        ("P", False),
        ("PT", False),
        ("P1DT", False),
        ("PT1H5S", False),
        ("PT0.5S", False),
        ("P1Y", False),
        ("P01D", False),
    ],
)
def test_durations(text: str, is_duration: bool) -> None:
    """Those of RFC 3339 whose length is certain: a month or a year has no fixed one."""
    assert is_text("duration", text) == is_duration


@pytest.mark.parametrize(
    ("text", "is_uri"),
    [
        ("https://example.com", True),
        ("http://a.b-c.co.uk:8080/d/e_f.html?g=h&i=%C3%A9#j", True),
        ("ftp://example.com", False),
        ("https://example", False),
        ("https://-a.de", False),
        ("https://xn--a.de", False),
        ("https://a.de/b c", False),
        ("https://a.de/%zz", False),
        ("https://a.de/é", False),
    ],
)
def test_addresses_on_the_web(text: str, is_uri: bool) -> None:
    assert is_text("uri", text) == is_uri


def test_lengths_of_formats() -> None:
    lengths = {name: found.lengths for name, found in FORMATS.items()}
    assert lengths["date"] == (10, 10)
    assert lengths["ipv4"] == (7, 15)
    assert lengths["email"] == (6, None)
    assert lengths["uri"][1] <= 2083


def test_addresses_of_ipv4() -> None:
    for number in range(300):
        for text in (f"{number}.0.0.1", f"10.0.{number}.255", f"1.2.3.{number:02d}"):
            assert is_text("ipv4", text) == reads(ipaddress.IPv4Address, text), text
    assert not is_text("ipv4", "1.2.3")


@pytest.mark.parametrize(
    ("text", "is_email"),
    [
        ("a@b.de", True),
        ("john.o-k+x_1@mail.example-2.co.uk", True),
        ("a@b", False),
        ("a.@b.de", False),
        (".a@b.de", False),
        ("a..b@c.de", False),
        ("a@-b.de", False),
        ("a@b-.de", False),
        ("a@b..de", False),
        ("@b.de", False),
        ("a b@c.de", False),
        ("a@b.d3", False),
    ],
)
def test_emails(text: str, is_email: bool) -> None:
    assert is_text("email", text) == is_email
