"""String formats of JSON Schema as regular languages, and their Arrow types.

Dates exist in the calendar, leap years included. A `time` is in UTC, since Arrow's type has no
zone. A `date-time` may be in any zone; its year is 1000 to 8999, so that no zone offset moves it
out of the years that Python and BigQuery support. A `duration` has days, hours, minutes and whole
seconds. A `uri` is an address on the web, at most 2,083 characters long.
"""

import functools
import math
from dataclasses import dataclass

import pyarrow as pa

from beam_gemma.structured.grammar import (
    Chars,
    Concat,
    Language,
    Literal,
    OneOf,
    Repeat,
    each_once,
    parts_of,
)
from beam_gemma.structured.regex import parse_regex

TIME = pa.time64("us")
TIMESTAMP = pa.timestamp("us", "UTC")


@dataclass(frozen=True, slots=True)
class Format:
    """The valid strings of a format, and their Arrow type."""

    regex: str
    type: pa.DataType

    @property
    def language(self) -> Language:
        """The strings as a language."""
        return _language(self.regex)

    @property
    def lengths(self) -> tuple[int, int | None]:
        """Lengths of the shortest and of the longest string; None means no limit."""
        return _lengths(self.regex)


# All take half a second, which only a job whose schema has a format should spend.
_language = functools.cache(parse_regex)


@functools.cache
def _lengths(regex: str) -> tuple[int, int | None]:
    found: dict[int, tuple[float, float]] = {}
    for part in each_once(_language(regex)):
        inner = [found[id(each)] for each in parts_of(part)]
        lows, highs = ([each[end] for each in inner] for end in (0, 1))
        match part:
            case Concat():
                found[id(part)] = sum(lows), sum(highs)
            case OneOf():
                found[id(part)] = min(lows), max(highs)
            case Repeat(_, least, most):
                found[id(part)] = lows[0] * least, highs[0] * (math.inf if most is None else most)
            case Literal(text):
                found[id(part)] = len(text), len(text)
            case Chars():
                found[id(part)] = 1, 1
    shortest, longest = found[id(_language(regex))]
    return int(shortest), None if longest == math.inf else int(longest)


def _days(years: str, leap_years: str) -> str:
    long_month = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    short_month = "(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    february = "02-(0[1-9]|1[0-9]|2[0-8])"
    return f"(({years})-({long_month}|{short_month}|{february})|({leap_years})-02-29)"


DATE = _days(
    years="000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3}",
    leap_years="[0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00",
)
DATE_OF_ANY_ZONE = _days(
    years="[1-8][0-9]{3}",
    leap_years="[1-8][0-9](0[48]|[2468][048]|[13579][26])|([2468][048]|[1357][26])00",
)
TIME_OF_DAY = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
ZONE = "(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
ATOM = r"[A-Za-z0-9_+-]+"
DOMAIN_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
HEX = "[0-9A-Fa-f]"
COUNT = "(0|[1-9][0-9]{0,4})"
SECONDS, MINUTES = f"{COUNT}S", f"{COUNT}M({COUNT}S)?"
CLOCK = f"T({COUNT}H({MINUTES})?|{MINUTES}|{SECONDS})"
HOST_LABEL = "[a-z0-9](-?[a-z0-9]){0,30}"
URI_CHARACTER = f"([A-Za-z0-9._~!$&'()*+,;=:@/-]|%{HEX}{{2}})"
URI = (
    rf"https?://({HOST_LABEL}\.){{1,4}}[a-z]{{2,12}}(:[1-9][0-9]{{0,3}})?"
    rf"(/{URI_CHARACTER}{{0,300}})?(\?{URI_CHARACTER}{{0,150}})?(#{URI_CHARACTER}{{0,50}})?"
)

FORMATS = {
    name: Format(regex, kind)
    for name, regex, kind in (
        ("date", DATE, pa.date32()),
        ("date-time", f"{DATE_OF_ANY_ZONE}T{TIME_OF_DAY}{ZONE}", TIMESTAMP),
        ("time", f"{TIME_OF_DAY}Z", TIME),
        ("uuid", f"{HEX}{{8}}-({HEX}{{4}}-){{3}}{HEX}{{12}}", pa.string()),
        ("email", rf"{ATOM}(\.{ATOM})*@({DOMAIN_LABEL}\.)+[A-Za-z]{{2,}}", pa.string()),
        ("duration", f"P({COUNT}D({CLOCK})?|{CLOCK})", pa.string()),
        ("uri", URI, pa.string()),
        ("ipv4", rf"({BYTE}\.){{3}}{BYTE}", pa.string()),
    )
}
"""Formats by name. Their texts need no escapes in JSON."""
