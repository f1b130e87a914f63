"""Published chat templates, what transformers renders of them, and parts as text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from beam_gemma.inputs.chat_template import GEMMA_CHAT_TEMPLATE
from beam_gemma.model.markup import Control, Part

FOLDER = Path(__file__).parents[1] / "data/chat_templates"
TEMPLATES = {
    **{path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))},
    "built in": GEMMA_CHAT_TEMPLATE,
}


def hugging_face(
    source: str, conversation: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> str:
    """Return the prompt of a conversation, which continues a last message of the assistant."""
    continues = conversation[-1]["role"] in ("assistant", "model")
    rendered, _ = render_jinja_template(
        conversations=[conversation],
        chat_template=source,
        tools=tools,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    return rendered[0]


def markup(parts: Iterable[Part]) -> str:
    """Return parts as one text."""
    return "".join(part.piece if isinstance(part, Control) else part.text for part in parts)
