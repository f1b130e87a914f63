"""Prompts of chats as the published templates write them, down to the tokens.

`gemma1_and_2.jinja` is the template of the instruction-tuned Gemma 1 and 2 and CodeGemma,
`gemma3.jinja` that of Gemma 3 and MedGemma (see `tests/data/README.md`).
"""

from pathlib import Path

import pytest

from beam_gemma.errors import RecordError
from beam_gemma.inputs.chat_template import GEMMA_CHAT_TEMPLATE, ChatTemplate
from beam_gemma.inputs.prompt_encoder import PromptEncoder, PromptSettings
from beam_gemma.model.markup import Control, Text
from tests.doubles.fake_models import TOKENIZER

FOLDER = Path(__file__).parents[1] / "data/chat_templates"
TEMPLATES = {
    "gemma1_and_2": (FOLDER / "gemma1_and_2.jinja").read_text(),
    "gemma3": (FOLDER / "gemma3.jinja").read_text(),
    "built in": GEMMA_CHAT_TEMPLATE,
}
CHAT = [
    {"role": "user", "content": "knock knock"},
    {"role": "assistant", "content": "who is there"},
    {"role": "user", "content": "gemma\n"},
]
# The example of ai.google.dev/gemma/docs/formatting, with the turn that the model is to take.
RENDERED = """\
<bos><start_of_turn>user
{}knock knock<end_of_turn>
<start_of_turn>model
who is there<end_of_turn>
<start_of_turn>user
gemma<end_of_turn>
<start_of_turn>model
"""


def encoder(name, **settings):
    return PromptEncoder(
        TOKENIZER,
        PromptSettings(messages_column="chat", **settings),
        chat_template=TEMPLATES[name],
        max_tokens=1000,
    )


@pytest.mark.parametrize("name", TEMPLATES)
class TestEveryTemplate:
    def test_a_conversation_is_the_published_one(self, name):
        assert encoder(name)({"chat": CHAT}).text == RENDERED.format("")

    def test_system_text_stands_at_the_head_of_the_first_turn(self, name):
        """Gemma 1 and 2 refuse a system role, Gemma 3 writes it there itself."""
        expected = RENDERED.format("answer in rhyme\n\n")
        assert encoder(name, system="answer in rhyme")({"chat": CHAT}).text == expected
        own = [{"role": "system", "content": "answer in rhyme"}, *CHAT]
        assert encoder(name, system="never mind")({"chat": own}).text == expected

    def test_turns_are_control_tokens_and_all_else_is_text(self, name):
        pieces = TOKENIZER.control_pieces
        start, end = pieces["<start_of_turn>"], pieces["<end_of_turn>"]
        expected = [TOKENIZER.bos_token_id]
        for role, content in (("user", "hi"), ("model", "<end_of_turn>"), ("user", "a")):
            text = TOKENIZER.encode([Text(f"{role}\n{content}")], add_bos=False)
            newline = TOKENIZER.encode([Text("\n")], add_bos=False)
            expected += [start, *text, end, *newline]
        expected += [start, *TOKENIZER.encode([Text("model\n")], add_bos=False)]
        chat = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "<end_of_turn>"},
            {"role": "user", "content": "a"},
        ]
        prompt = encoder(name)({"chat": chat})
        assert list(prompt.token_ids) == expected
        assert prompt.parts[0] == Control("<bos>")

    @pytest.mark.parametrize("roles", [["user", "user"], ["assistant", "user"]])
    def test_roles_that_do_not_alternate_end_that_row(self, name, roles):
        chat = [{"role": role, "content": "x"} for role in roles]
        with pytest.raises(RecordError, match="alternate"):
            encoder(name)({"chat": chat})


def test_the_built_in_template_is_the_published_one_for_any_text():
    texts = ["", " ", " two  words ", "<b>bold</b>\n\n", "{{ x }}", "a\u00a0"]
    ours, theirs = (
        ChatTemplate(TEMPLATES[name], TOKENIZER.control_pieces)
        for name in ("built in", "gemma1_and_2")
    )
    for text in texts:
        for answer in texts:
            chat = [{"role": "user", "content": text}, {"role": "assistant", "content": answer},
                    {"role": "user", "content": "?"}]  # fmt: skip
            assert ours.render(chat) == theirs.render(chat)
