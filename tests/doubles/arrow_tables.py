"""Strategies: tables of any columns, for round trips.

Nulls and string views are not among them: PyArrow can write or read neither inside of lists.
"""

import datetime as dt
import decimal

import pyarrow as pa
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NAMES = st.text("abcäé .{}\"'\\/=\n", min_size=1, max_size=4)
EPOCH = dt.datetime(1970, 1, 1)
YEARS = st.datetimes(dt.datetime(1800, 1, 1), dt.datetime(2200, 1, 1))


def integers(bits):
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


JSON_LEAVES = {
    pa.string(): TEXT,
    pa.int64(): integers(64),
    pa.float64(): st.floats(allow_nan=False, allow_infinity=False),
    pa.bool_(): st.booleans(),
}
LEAVES = JSON_LEAVES | {
    pa.large_string(): TEXT,
    pa.dictionary(pa.int32(), pa.string()): TEXT,
    pa.binary(): st.binary(max_size=8),
    pa.large_binary(): st.binary(max_size=8),
    pa.binary(3): st.binary(min_size=3, max_size=3),
    pa.int8(): integers(8),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float32(): st.floats(width=32, allow_nan=False),
    pa.decimal128(20, 4): st.decimals(-(10**15), 10**15, places=4),
    pa.decimal256(60, 2): st.integers(0, 10**57).map(lambda i: decimal.Decimal(i) / 4),
    pa.date32(): st.dates(),
    pa.time64("us"): st.times(),
    pa.timestamp("us"): YEARS,
    pa.timestamp("ms", "UTC"): YEARS.map(lambda at: at.replace(microsecond=0, tzinfo=dt.UTC)),
    pa.timestamp("us", "Asia/Tokyo"): YEARS.map(lambda at: at.replace(tzinfo=dt.UTC)),
    pa.timestamp("ns"): st.integers(-(2**60), 2**60),
    pa.duration("us"): st.timedeltas(dt.timedelta(-(10**5)), dt.timedelta(10**5)),
}


def kinds(leaves):
    """Return types, nested ones among them."""
    return st.recursive(
        st.sampled_from(list(leaves)),
        lambda inner: st.one_of(
            inner.map(pa.list_),
            st.lists(st.tuples(NAMES, inner), min_size=1, max_size=3, unique_by=lambda f: f[0]).map(
                pa.struct
            ),
            *([inner.map(pa.large_list), inner.map(map_of)] if leaves is LEAVES else []),
        ),
        max_leaves=4,
    )


def map_of(kind):
    return pa.map_(pa.string(), kind)


def values(kind):
    """Return values of a type, or nulls."""
    if kind in LEAVES:
        return st.none() | LEAVES[kind]
    if pa.types.is_struct(kind):
        fields = {field.name: values(field.type) for field in kind}
        return st.none() | st.fixed_dictionaries(fields)
    if pa.types.is_map(kind):
        items = st.dictionaries(TEXT, values(kind.item_type), max_size=3)
        return st.none() | items.map(lambda pairs: list(pairs.items()))
    return st.none() | st.lists(values(kind.value_type), max_size=3)


@st.composite
def tables(draw, leaves=LEAVES, min_rows=0):
    """Return a table."""
    fields = st.tuples(NAMES, kinds(leaves))
    schema = pa.schema(draw(st.lists(fields, min_size=1, max_size=4, unique_by=lambda f: f[0])))
    row = st.tuples(*(values(field.type) for field in schema))
    rows = draw(st.lists(row, min_size=min_rows, max_size=12))
    columns = [pa.array([each[i] for each in rows], field.type) for i, field in enumerate(schema)]
    return pa.Table.from_arrays(columns, schema=schema)
