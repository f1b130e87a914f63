"""String formats of JSON Schema as regular languages, and their Arrow types.

Dates exist in the calendar, leap years included. A `time` is in UTC, since Arrow's type has no
zone. A `date-time` may be in any zone; its year is 1000 to 8999, so that no zone offset moves it
out of the years that Python and BigQuery support.
"""

import functools
from dataclasses import dataclass

import pyarrow as pa

from beam_gemma.structured.grammar import Language
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


# All six take half a second, which only a job whose schema has a format should spend.
_language = functools.cache(parse_regex)


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

FORMATS = {
    name: Format(regex, kind)
    for name, regex, kind in (
        ("date", DATE, pa.date32()),
        ("date-time", f"{DATE_OF_ANY_ZONE}T{TIME_OF_DAY}{ZONE}", TIMESTAMP),
        ("time", f"{TIME_OF_DAY}Z", TIME),
        ("uuid", f"{HEX}{{8}}-({HEX}{{4}}-){{3}}{HEX}{{12}}", pa.string()),
        ("email", rf"{ATOM}(\.{ATOM})*@({DOMAIN_LABEL}\.)+[A-Za-z]{{2,}}", pa.string()),
        ("ipv4", rf"({BYTE}\.){{3}}{BYTE}", pa.string()),
    )
}
"""Formats by name. Their texts need no escapes in JSON."""
