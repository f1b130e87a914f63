"""Models that call functions: their vocabularies and chat templates, and sessions that write calls.

The templates declare functions as the published ones of Gemma 4 and FunctionGemma do, in few lines
of their own: the keys of a schema in the order of their names, types in capitals, and each string
between two control pieces.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beam_gemma.model.call_pieces import FUNCTION_GEMMA, GEMMA_4, CallPieces
from beam_gemma.model.tokenizer import Tokenizer
from tests.doubles.fake_models import STATES
from tests.doubles.fakes import FakeSession, fake_signature
from tests.doubles.reference import CLASSES, MODELS, SHAPE, VOCAB, draw_weights
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

GEMMA_4_MARKERS = (
    "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", '<|"|>', "<|channel>", "<channel|>",
)  # fmt: skip
FUNCTION_GEMMA_MARKERS = (
    "<start_function_declaration>", "<end_function_declaration>", "<start_function_call>",
    "<end_function_call>", "<start_function_response>", "<escape>",
)  # fmt: skip
TEMPLATE = """\
{%- set quote = 'QUOTE' -%}
{%- macro shown(value) -%}
    {%- if value is string -%}{{ quote + value + quote }}
    {%- elif value is boolean -%}{{ "true" if value else "false" }}
    {%- elif value is mapping -%}{ {{- schema(value) -}} }
    {%- elif value is sequence -%}[
        {%- for item in value -%}{{ shown(item) ~ ("" if loop.last else ",") }}{%- endfor -%} ]
    {%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{%- macro schema(keys) -%}
    {%- for key, value in keys | dictsort -%}
        {{ key }}:{{ shown(value | upper if key == "type" and value is string else value) }}
        {{- "" if loop.last else "," -}}
    {%- endfor -%}
{%- endmacro -%}
{%- set is_first = messages[0].role in ["system", "developer"] -%}
{{ bos_token }}
{%- if tools or is_first -%}
    {{ "OPENSYSTEM\\n" ~ (messages[0].content | trim if is_first else "") -}}
    {%- for tool in tools or [] -%}
        {%- set function = tool["function"] -%}
        {%- set description = quote ~ function.description ~ quote -%}
        DECLAREdeclaration:{{ function.name }}{description:{{ description }}
        {%- if function.parameters %},parameters:{{ shown(function.parameters) }}{% endif -%}
        }DECLARED
    {%- endfor -%}
    {{ "CLOSE\\n" }}
{%- endif -%}
{%- for message in (messages[1:] if is_first else messages) -%}
    {{ "OPEN" ~ ("model" if message.role == "assistant" else message.role) ~ "\\n" -}}
    {{ message.content | trim }}CLOSE{{ "\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "OPENmodel\\n" }}{%- endif -%}
"""


def _template(quote: str, system: str, turn: Sequence[str], declaration: Sequence[str]) -> str:
    source = TEMPLATE
    for name, piece in {
        "DECLARED": declaration[1],
        "DECLARE": declaration[0],
        "OPENSYSTEM": turn[0] + system,
        "OPEN": turn[0],
        "CLOSE": turn[1],
        "QUOTE": quote,
    }.items():
        source = source.replace(name, piece)
    return source


GEMMA_4_TEMPLATE = _template(GEMMA_4.quote, "system", GEMMA_4_MARKERS[:2], GEMMA_4_MARKERS[2:4])
FUNCTION_GEMMA_TEMPLATE = _template(
    FUNCTION_GEMMA.quote,
    "developer",
    ("<start_of_turn>", "<end_of_turn>"),
    FUNCTION_GEMMA_MARKERS[:2],
)
MARKERS = {"Gemma 4": GEMMA_4_MARKERS, "FunctionGemma": FUNCTION_GEMMA_MARKERS}
FAMILIES: dict[str, tuple[CallPieces, Tokenizer, str]] = {
    name: (pieces, Tokenizer(tiny_tokenizer_model(MARKERS[name])), template)
    for name, pieces, template in (
        ("Gemma 4", GEMMA_4, GEMMA_4_TEMPLATE),
        ("FunctionGemma", FUNCTION_GEMMA, FUNCTION_GEMMA_TEMPLATE),
    )
}
"""Control pieces of calls, tokenizer and chat template, by the name of the family."""
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": 'The weather of a "place".',
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "A town", "maxLength": 12},
            "Days": {"type": "integer", "minimum": 1, "maximum": 14},
            "units": {"type": "string", "enum": ["metric", "imperial"]},
            "hours": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
            "at": {
                "type": "object",
                "properties": {"sea": {"type": "boolean"}, "note": {"type": ["string", "null"]}},
                "required": ["sea"],
            },
        },
        "required": ["place", "units"],
    },
}
STOP: dict[str, Any] = {"name": "stop", "description": "End it."}


def ids_of(tokenizer: Tokenizer, markup: str) -> list[int]:
    """Return the token ids of text with control pieces."""
    return tokenizer.encode(tokenizer.split(markup), add_bos=False)


def session_that_says(tokenizer: Tokenizer, ids: Sequence[int]) -> FakeSession:
    """Return a session that completes any prompt of one length with these tokens, then ends."""
    ids = [*ids, tokenizer.eos_token_id]
    prompt_length = None

    def next_token(tokens: tuple[int, ...]) -> int:
        nonlocal prompt_length
        prompt_length = prompt_length or len(tokens)
        return ids[min(len(tokens) - prompt_length, len(ids) - 1)]

    signature = fake_signature(
        states=STATES, optional_inputs=(), vocab_size=tokenizer.vocab_size, max_model_len=1000
    )
    return FakeSession(signature, num_blocks=500, next_token=next_token)


def save_tool_model(family: str, folder: Path) -> Path:
    """Write a tiny model of a family as a Hugging Face folder, with its vocabulary and template."""
    _, _, template = FAMILIES[family]
    markers = MARKERS[family]
    shape = {**SHAPE, **MODELS["gemma_mha"], "vocab_size": VOCAB + len(markers)}
    config_class, model_class = CLASSES["gemma"]
    model = model_class._from_config(config_class(**shape), attn_implementation="eager")
    draw_weights(model).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model(markers))
    (folder / "chat_template.jinja").write_text(template)
    return folder
