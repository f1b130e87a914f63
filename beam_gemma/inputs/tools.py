"""Functions that a model may call, as OpenAI declares them, and their check.

A function is `{"type": "function", "function": {"name": ..., "description": ..., "parameters":
...}}`, or the inner object alone. `parameters` is a JSON Schema of an object.
"""

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from beam_gemma.errors import OptionsError, nearest
from beam_gemma.inputs.decoder_prompt import Decoder
from beam_gemma.inputs.traced_text import ROW, TracedText
from beam_gemma.model.call_pieces import call_pieces

ToolChoice = Literal["auto", "required"]
TOOL_KEYS = ("type", "function")
FUNCTION_KEYS = ("name", "description", "parameters", "strict", "response", "return")
"""Keys of a function. `strict` is OpenAI's and has no effect; `response` and `return` describe the
result, as the chat templates of Gemma and the functions of transformers have it."""
NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
"""Names that OpenAI allows."""


def checked_tools(tools: Any, subject: str = "tools") -> list[dict[str, Any]]:
    """Return tools in OpenAI's form, each with its `function`.

    Args:
        tools: A list of tools, or of bare functions.
        subject: What messages call the list.

    Raises:
        OptionsError: something is no tool; the message names its place.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not tools:
        raise OptionsError(
            f"{subject}: expected a list of at least one function, got {reprlib.repr(tools)}"
        )
    found = [_tool(tool, f"{subject}[{index}]") for index, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in found]
    for name in names:
        if names.count(name) > 1:
            raise OptionsError(f"{subject}: expected each name once, got {name!r} twice")
    return found


def check_calls(
    control_pieces: Iterable[str], template: str | None, decoder: Decoder | None
) -> None:
    """Refuse a model that cannot be told of functions, or has no control pieces to call them.

    Args:
        control_pieces: The tokenizer's control pieces.
        template: Text of the chat template; None for prompts without one.
        decoder: The decoder of a model whose encoder reads the prompts; None for others.

    Raises:
        OptionsError: the model is such a one.
    """
    faults = {
        "an encoder-decoder": decoder is not None,
        "a prompt without a chat template": template is None,
        "one without control pieces for calls": call_pieces(control_pieces) is None,
    }
    if got := [fault for fault, is_so in faults.items() if is_so]:
        raise OptionsError(
            "tools: expected a chat with a model that calls functions, such as Gemma 4 or "
            f"FunctionGemma, got {got[0]}"
        )


def traced(value: Any) -> Any:
    """Return what a tool holds as a chat template sees it: its texts are data, as those of rows."""
    if isinstance(value, str):
        return TracedText(value, ROW)
    if isinstance(value, Mapping):
        return {TracedText(key, ROW): traced(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [traced(inner) for inner in value]
    return value


def containers_in(value: Any) -> Iterator[Any]:
    """Yield the mappings and lists that a tool is made of."""
    if isinstance(value, Mapping | list):
        yield value
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from containers_in(inner)


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts that a tool holds, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def _tool(tool: Any, place: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise OptionsError(f"{place}: expected a function, got {reprlib.repr(tool)}")
    if "function" not in tool:
        return {"type": "function", "function": _function(tool, place)}
    _check_keys(tool, TOOL_KEYS, place)
    if tool.get("type", "function") != "function":
        raise OptionsError(f"{place}.type: expected function, got {reprlib.repr(tool['type'])}")
    return {"type": "function", "function": _function(tool["function"], f"{place}.function")}


def _function(function: Any, place: str) -> dict[str, Any]:
    if not isinstance(function, Mapping):
        raise OptionsError(
            f"{place}: expected a name, description and parameters, got {reprlib.repr(function)}"
        )
    _check_keys(function, FUNCTION_KEYS, place)
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise OptionsError(
            f"{place}.name: expected at most 64 letters, digits, _ and -, got {reprlib.repr(name)}"
        )
    description = function.get("description", "")
    if not isinstance(description, str):
        raise OptionsError(f"{place}.description: expected a text, got {reprlib.repr(description)}")
    parameters = function.get("parameters")
    if parameters is None:
        return {key: value for key, value in function.items() if key != "parameters"}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise OptionsError(
            f"{place}.parameters: expected a JSON Schema of type object, got "
            f"{reprlib.repr(parameters)}"
        )
    return dict(function)


def _check_keys(mapping: Mapping[Any, Any], known: Sequence[str], place: str) -> None:
    for key in mapping:
        if key not in known:
            raise OptionsError(
                f"{place}: expected the keys {', '.join(known)}, got {reprlib.repr(key)}"
                f"{nearest(str(key), known)}"
            )
