"""Messages on calls of functions in a conversation: those that call, and those with results.

A message of the assistant may have `tool_calls`, as OpenAI writes them: each is `{"id": ...,
"type": "function", "function": {"name": ..., "arguments": ...}}`, whose arguments are an object or
its text. A message of the role `tool` has a function's result as its text, and `tool_call_id` or
`name` to say which. A chat template sees all of this as it is, and its texts are data.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from beam_gemma.errors import RecordError, nearest

CALL_KEYS = ("id", "type", "function")
FUNCTION_KEYS = ("name", "arguments")
RESULT_KEYS = ("name", "tool_call_id")


def call_keys(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a message says of calls beside its role and content; nothing for most messages.

    Keys without a value are left out, since a table has all keys in each message.

    Raises:
        RecordError: something is no call, or stands in a message of another role.
    """
    calls = message.get("tool_calls")
    if message["role"] == "tool":
        names = {key: message[key] for key in RESULT_KEYS if message.get(key) is not None}
        if not all(isinstance(name, str) for name in names.values()):
            _refuse("messages of the role tool with a text as name and tool_call_id", message)
        return names
    if calls in (None, []):
        return {}
    if message["role"] not in ("assistant", "model"):
        _refuse("tool_calls in messages of the assistant alone", message)
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        _refuse("tool_calls as a list", calls)
    return {"tool_calls": [_call(call) for call in calls]}


def _call(call: Any) -> dict[str, Any]:
    found = _object(call, CALL_KEYS, "each of tool_calls")
    if found.get("type", "function") != "function" or not isinstance(found.get("id", ""), str):
        _refuse("each of tool_calls with the type function, and a text as id", call)
    function = _object(found.get("function"), FUNCTION_KEYS, "a call's function")
    arguments = function.get("arguments")
    if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping | str):
        _refuse("a call's function with a name, and arguments as an object or a text", call)
    return {**found, "function": function}


def _object(value: Any, known: Sequence[str], what: str) -> dict[str, Any]:
    """Return an object without keys that have no value."""
    if not isinstance(value, Mapping):
        _refuse(f"{what} as an object", value)
    for key in value:
        if key not in known:
            _refuse(f"{what} with the keys {', '.join(known)}", key, nearest(str(key), known))
    return {key: inner for key, inner in value.items() if inner is not None}


def _refuse(expected: str, got: Any, hint: str = "") -> NoReturn:
    raise RecordError(f"messages: expected {expected}, got {reprlib.repr(got)}{hint}")
