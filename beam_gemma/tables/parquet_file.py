"""Open Parquet files as they are meant, where PyArrow would read them otherwise or not at all."""

from io import BufferedIOBase

import pyarrow as pa
import pyarrow.parquet as pq

from beam_gemma.tables.parquet_schema import widened, with_inner

MAGIC = b"PAR1"
ARROW_SCHEMA, UNUSED = b"ARROW:schema", b"ARROW:unused"
"""Key of the Arrow types that a writer had, and a key of the same length that nothing reads."""


def open_parquet(stream: BufferedIOBase, *, is_bare: bool = False) -> pq.ParquetFile:
    """Open a Parquet file.

    Timestamps of 96 bits are read in microseconds, which is what Spark writes with them: as
    nanoseconds, years before 1678 and after 2261 would become other years.

    Args:
        stream: The file.
        is_bare: Whether to read the types of Parquet alone, not those that Arrow's writers note
            beside them. Lists of a fixed size are plain lists then, the only ones that PyArrow
            reads nulls of, and dictionaries are their values, as PyArrow reads an inner dictionary
            within one row group alone.
    """
    metadata = None
    if is_bare:
        footer = _footer(stream).replace(ARROW_SCHEMA, UNUSED)
        metadata = pq.read_metadata(pa.BufferReader(MAGIC + footer))
    return pq.ParquetFile(stream, metadata=metadata, coerce_int96_timestamp_unit="us")


def has_fixed_lists(kind: pa.DataType) -> bool:
    """Return whether a type has lists of a fixed size, in whatever depth."""
    if pa.types.is_fixed_size_list(kind):
        return True
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return any(map(has_fixed_lists, inner))


def has_inner_dictionary(kind: pa.DataType) -> bool:
    """Return whether a type has a dictionary inside a list, a struct or a map."""
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return any(pa.types.is_dictionary(one) or has_inner_dictionary(one) for one in inner)


def read_type(kind: pa.DataType, *, has_nulls: bool) -> pa.DataType:
    """Return the type in which a column of a file is read.

    Args:
        kind: The column's type in the file.
        has_nulls: Whether the file may have nulls in the column.
    """
    return widened(_with_plain_lists(kind) if has_nulls and has_fixed_lists(kind) else kind)


def may_have_nulls(metadata: pq.FileMetaData, column: str) -> bool:
    """Return whether a column may have nulls, on any level, by the statistics of a file."""
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        for i in range(group.num_columns if group.num_rows else 0):
            chunk = group.column(i)
            if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}."):
                known = chunk.statistics
                if known is None or not known.has_null_count or known.null_count:
                    return True
    return False


def _with_plain_lists(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_fixed_size_list(kind):
        value = kind.value_field
        return pa.list_(value.with_type(_with_plain_lists(value.type)))
    return with_inner(kind, _with_plain_lists)


def _footer(stream: BufferedIOBase) -> bytes:
    """Return a file's metadata with its length and the mark at its end."""
    stream.seek(-8, 2)
    length = int.from_bytes(stream.read(4), "little") + 8
    stream.seek(-length, 2)
    return stream.read(length)
