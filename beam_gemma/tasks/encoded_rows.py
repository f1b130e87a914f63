"""Encoded rows: the request of a row as JSON, carried to the model in a column of its own.

A job over a table needs a row's request before the model does, for the key by which it merges equal
requests. It encodes the row then, and the model reads the carried request instead of encoding the
row again. A request names pictures by their digests; their files are in a column of their own.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from beam_gemma.errors import RecordError
from beam_gemma.inputs.row import Row
from beam_gemma.tasks.row_keys import ENCODED, FILES

T = TypeVar("T")


def request_of(row: Row, identify: Callable[[Row], Any]) -> bytes:
    """Return a row's request as JSON, or its error if it makes none.

    Args:
        row: The row.
        identify: Encodes a row and returns the identity of its request, as JSON values.
    """
    try:
        identity = identify(row)
    except RecordError as error:
        identity = {"error": str(error)}
    return json.dumps(identity).encode()


def request_in(
    row: Row, encode: Callable[[Row], T], restore: Callable[[Any, Sequence[bytes]], T]
) -> T:
    """Return a row's request: the one that it carries, or else the one it is encoded to.

    Args:
        row: The row.
        encode: Encodes a row.
        restore: Returns the request of an identity and of the files of the row's pictures.

    Raises:
        RecordError: the row makes no request.
    """
    if isinstance(row, str) or ENCODED not in row:
        return encode(row)
    identity = json.loads(row[ENCODED])
    if isinstance(identity, dict):
        raise RecordError(identity["error"])
    return restore(identity, row.get(FILES) or ())
