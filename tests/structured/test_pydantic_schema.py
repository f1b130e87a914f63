"""Classes of Pydantic as people write them: each takes every row that its schema gives."""

import datetime as dt
import enum
import random
import re
import typing
import uuid
from decimal import Decimal
from ipaddress import IPv4Address

import pyarrow as pa
import pydantic
import pytest
import typing_extensions
from pydantic import BaseModel, ConfigDict, Field

from beam_gemma.errors import OptionsError
from beam_gemma.structured.grammar import to_regex
from beam_gemma.structured.json_schema import compile_schema, json_schema_of
from tests.doubles.schemas import check_valid, sample


class Color(enum.Enum):
    red = "red"
    green = "green"


class Level(enum.IntEnum):
    low = 1
    high = 2


class Price(BaseModel):
    """A default that is a constant."""

    amount: float = Field(ge=0)
    currency: typing.Literal["USD", "EUR", "GBP"] = "USD"
    unit: typing.Literal["piece"] = "piece"


class Cat(BaseModel):
    type: typing.Literal["cat"] = "cat"
    lives: int = Field(default=9, ge=0, le=9)


class Dog(BaseModel):
    type: typing.Literal["dog"] = "dog"
    tricks: list[str] = Field(default_factory=list, max_length=3)


class Owner(BaseModel):
    """A tagged union, whose tags have defaults."""

    name: str
    pet: Cat | Dog = Field(discriminator="type")
    others: list[typing.Annotated[Cat | Dog, Field(discriminator="type")]] = []


class Click(BaseModel):
    kind: typing.Literal["click"]
    x: int
    y: int | None = None


class Key(BaseModel):
    kind: typing.Literal["key"]
    code: str = Field(min_length=1)


class Event(BaseModel):
    """A union without a discriminator, which may be missing."""

    at: dt.datetime
    what: Click | Key | None = None


class Address(BaseModel):
    street: str
    zip: str = Field(pattern=r"^[0-9]{5}$")
    country: str = "DE"


class Person(BaseModel):
    """Models in models, with defaults that are models."""

    name: str = Field(min_length=1, max_length=20)
    born: dt.date | None
    home: Address
    work: Address | None = None
    first: Address = Address(street="Main", zip="00000")


class Order(BaseModel):
    """Lists of models, and lists of lists."""

    lines: list[Price] = Field(min_length=1, max_length=3)
    notes: list[str | None] = Field(default_factory=lambda: ["new"])
    grid: list[list[int]] = [[1]]


class Paint(BaseModel):
    """Enums, with defaults and in lists."""

    color: Color = Color.red
    level: Level = Level.low
    colors: list[Color] = [Color.green]
    maybe: Color | None = Color.green


class Ticket(BaseModel):
    """Aliases, which rows have for names."""

    model_config = ConfigDict(extra="forbid")
    id: int = Field(alias="ticketId", gt=0)
    is_open: bool = Field(default=True, validation_alias="open")
    priority: typing.Literal[1, 2, 3] = 2


class Shift(BaseModel):
    """Dates, times and spans."""

    day: dt.date = dt.date(2025, 1, 1)
    start: dt.time
    posted: dt.datetime
    length: dt.timedelta = dt.timedelta(hours=8, seconds=0.5)
    pause: dt.timedelta | None = None


class Totals(BaseModel):
    """Exact and other numbers."""

    price: Decimal
    tax: Decimal = Field(default=Decimal("0.19"), ge=0, le=1, decimal_places=2)
    sum: Decimal = Field(max_digits=6, decimal_places=2)
    rate: Decimal | None = Field(default=None, multiple_of=Decimal("0.001"))
    ratio: int | float = 1
    big: int | float | None = None
    share: float = Field(default=0.5, gt=0, lt=1)


class Steps(BaseModel):
    """Whole numbers within bounds and multiples."""

    five: int = Field(multiple_of=5)
    twelve: int = Field(default=12, multiple_of=12, ge=-100, lt=1000)
    even: int | None = Field(default=0, multiple_of=2)
    small: typing.Annotated[int, Field(ge=-3, le=3)] = 0


class Labels(BaseModel):
    """Maps."""

    tags: dict[str, str]
    counts: dict[str, int] = {"a": 1}
    by_color: dict[Color, list[int]] | None = None
    by_number: dict[int, float] = Field(default_factory=dict)
    models: dict[typing.Annotated[str, Field(pattern="^[a-z]+$")], Price] = {}


class Ids(BaseModel):
    """Texts in a form."""

    id: uuid.UUID
    host: IPv4Address = IPv4Address("127.0.0.1")
    site: pydantic.HttpUrl = pydantic.HttpUrl("https://example.com")
    link: pydantic.AnyUrl | None = None
    code: typing.Annotated[str, Field(pattern=r"^[A-Z]{3}-\d{4}$")] = "ABC-0001"


class Base(BaseModel):
    id: int
    source: str = Field(default="web", examples=["web"], json_schema_extra={"x-order": 1})


class Derived(Base):
    """What a class inherits, and annotations of other tools."""

    model_config = ConfigDict(json_schema_extra={"example": {"id": 1}, "propertyOrdering": ["id"]})
    point: tuple[float, float] = (0.0, 0.0)
    flag: bool | None = True
    old: str = Field(default="", deprecated=True)


class Stop(BaseModel):
    op: typing.Literal["stop"] = "stop"


class Wait(BaseModel):
    op: typing.Literal["wait"] = "wait"
    secs: int = 1


class Both(BaseModel):
    op: typing.Literal["both"] = "both"
    parts: list[Stop | Wait]


class Plan(BaseModel):
    """Unions in unions, of classes with no properties but a tag."""

    steps: list[Stop | Wait | Both]
    last: Stop = Stop()


class Names(pydantic.RootModel[list[Address]]):
    """A class that is a list."""


class Options(typing_extensions.TypedDict, total=False):
    size: typing_extensions.Required[int]
    name: str


class Config(BaseModel):
    """A mapping whose keys may be missing, and a default that is not allowed itself."""

    options: Options
    retries: int = None
    wait: float = Field(default=None, ge=0)


MODELS = [
    Price, Owner, Event, Person, Order, Paint, Ticket, Shift, Totals, Steps, Labels, Ids, Derived,
    Plan, Names, Config,
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_class_takes_every_row_of_its_schema(model):
    rng = random.Random(17)
    schema = json_schema_of(model)
    found = compile_schema(schema)
    texts = [sample(found.language, rng, most=2) for _ in range(200)]
    array = pa.array([found.parse(text) for text in texts], found.type)
    rows = array.to_pylist(maps_as_pydicts="strict")
    for text, row in zip(texts, rows, strict=True):
        check_valid(schema, text)
        model.model_validate(row)
        model.model_validate_json(text)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (pydantic.NaiveDatetime, "expected times in a zone, got NaiveDatetime; take datetime"),
        (dict[float, str], "expected keys of a dict that are text or whole numbers, got number"),
        (
            typing.Annotated[Decimal, Field(max_digits=5)],
            "expected decimal_places beside max_digits, got none; set both",
        ),
        (
            typing.Annotated[Decimal, Field(decimal_places=2, multiple_of=Decimal("0.1"))],
            "expected one of multiple_of and decimal_places, got both; set one",
        ),
    ],
)
def test_what_a_schema_cannot_say_is_refused(kind, message):
    with pytest.raises(OptionsError) as error:
        json_schema_of(pydantic.create_model("Odd", value=kind))
    assert str(error.value) == f"json_schema: {message}"


def test_a_field_that_is_none_where_it_is_left_out_may_be_left_out():
    language = to_regex(compile_schema(Event).language)
    assert re.fullmatch(language, '{"at":"2025-01-01T00:00:00Z"}')
    assert not re.fullmatch(to_regex(compile_schema(Price).language), '{"amount":1}')
