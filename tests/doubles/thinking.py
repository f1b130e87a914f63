"""A fake model that thinks: its vocabulary, its chat template, and a session that says a script.

The template has the turns of Gemma 4, in few lines: with thinking on, a mark in the system turn;
with thinking off, an empty thought in the prompt of a large model, and nothing in that of a small
one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from tests.doubles.fake_models import STATES
from tests.doubles.fakes import FakeSession, fake_signature
from tests.doubles.reference import MODELS, SHAPE, draw_weights
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

MARKERS = ("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>")
TOKENIZER = Tokenizer(tiny_tokenizer_model(MARKERS))
MAX_MODEL_LEN = 1500
BEGIN, END = (TOKENIZER.control_pieces[piece] for piece in ("<|channel>", "<channel|>"))
EOS = TOKENIZER.eos_token_id
SMALL_TEMPLATE = """\
{%- set has_system = messages[0].role == "system" -%}
{{ bos_token }}
{%- if enable_thinking or has_system -%}
    {{ "<|turn>system\\n" + ("<|think|>\\n" if enable_thinking else "") -}}
    {{ (messages[0].content | trim if has_system else "") + "<turn|>\\n" -}}
{%- endif -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {{ "<|turn>" + ("model" if message.role == "assistant" else message.role) + "\\n" -}}
    {{ message.content | trim + "<turn|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|turn>model\\n" -}}
{%- endif -%}
"""
LARGE_TEMPLATE = (
    SMALL_TEMPLATE
    + """\
{%- if add_generation_prompt and not enable_thinking -%}
    {{ "<|channel>thought\\n<channel|>" -}}
{%- endif -%}
"""
)
ALWAYS_BEGUN = SMALL_TEMPLATE + '{{ "<|channel>thought\\n" if enable_thinking else "" -}}\n'
"""Begins each thought in the prompt."""


def ids_of(markup: str) -> list[int]:
    """Return the token ids of text with control pieces."""
    return TOKENIZER.encode(TOKENIZER.split(markup), add_bos=False)


def text_ids(text: str) -> list[int]:
    """Return the token ids of text without control pieces."""
    return TOKENIZER.encode([Text(text)], add_bos=False)


def scripted(
    thought: Sequence[int], answer: Sequence[int], *, is_begun: bool = False, **options: Any
) -> FakeSession:
    """Return a session whose likeliest tokens are those of a thought and an answer.

    It says the same after any prompt of one length: the first prompt's.

    Args:
        thought: What the model says until a thought has ended; its last token again and again.
            Empty for no thought.
        answer: What it says then, followed by the end token.
        is_begun: Whether prompts end within a thought, so that the first token is not the
            beginning of one.
        options: Further options of the session.
    """
    prompt_length = None

    def next_token(tokens: tuple[int, ...]) -> int:
        nonlocal prompt_length
        prompt_length = prompt_length or len(tokens)
        written = tokens[prompt_length:]
        if END in written:
            written = written[len(written) - written[::-1].index(END) :]
        elif thought and (is_begun or not written or written[0] == BEGIN):
            return thought[min(len(written), len(thought) - 1)]
        return answer[len(written)] if len(written) < len(answer) else EOS

    signature = fake_signature(
        states=STATES,
        optional_inputs=(),
        vocab_size=TOKENIZER.vocab_size,
        max_model_len=MAX_MODEL_LEN,
    )
    return FakeSession(signature, num_blocks=500, next_token=next_token, **options)


def thinking_checkpoint(folder: Path) -> Path:
    """Write a tiny model with random weights; where it is to think, prompts begin the thought."""
    shape = {**SHAPE, "vocab_size": TOKENIZER.vocab_size}
    config = transformers.GemmaConfig(**shape, **MODELS["gemma_mha"])
    model = transformers.GemmaForCausalLM._from_config(config, attn_implementation="eager")
    draw_weights(model).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model(MARKERS))
    (folder / "chat_template.jinja").write_text(ALWAYS_BEGUN)
    return folder
