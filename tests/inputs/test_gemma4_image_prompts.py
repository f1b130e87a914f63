"""Pictures in prompts of Gemma 4: their number of tokens follows from their ratio."""

import io
from dataclasses import replace

import pytest
from PIL import Image

from beam_gemma.errors import OptionsError
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.prompt_settings import PromptSettings
from beam_gemma.inputs.row import MediaPlace
from beam_gemma.model.gemma4_vision import BEGIN_TOKEN, END_TOKEN, IMAGE_TOKEN, gemma4_vision
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from tests.doubles.published_processors import GEMMA3_VISION
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

BOS, BEGIN, IMAGE, END = 2, 300, 301, 302
TOKENIZER = Tokenizer(tiny_tokenizer_model((BEGIN_TOKEN, IMAGE_TOKEN, END_TOKEN)))
VISION = gemma4_vision({"model_type": "gemma4", "vision_config": {}, "image_token_id": IMAGE}, {})
CHAT = """\
{{ bos_token }}{% for message in messages -%}
{% if message.content is string %}{{ message.content }}{% else -%}
{% for part in message.content -%}
{% if part.type == 'image' %}{{ '<|image|>' }}{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}{% endfor %}"""


def encoder(**options):
    template = options.pop("chat_template", None)
    return PromptEncoder(
        TOKENIZER,
        PromptSettings(**options),
        chat_template=template,
        vision=VISION,
        vocab_size=320,
        max_tokens=3000,
    )


def png(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return file.getvalue()


def picture_ids(count):
    return [BEGIN, *[IMAGE] * count, END]


@pytest.mark.parametrize(
    ("size", "image_tokens", "count"),
    [((480, 480), None, 256), ((480, 480), 70, 64), ((48, 960), None, 222), ((4800, 10), 140, 140)],
)
def test_a_picture_takes_as_many_tokens_as_its_ratio_and_the_budget_give(size, image_tokens, count):
    found = encoder(prompt="{x} in", image_columns=("x",), image_tokens=image_tokens)(
        {"x": png(*size)}
    )
    assert list(found.token_ids) == [BOS, *picture_ids(count), *TOKENIZER.encode([Text(" in")])[1:]]
    assert found.places == (MediaPlace(2, 0, 0, count),)


def test_pictures_of_several_sizes_lie_one_after_the_other():
    row = {"x": [png(480, 480), png(48, 960)]}
    found = encoder(prompt="{x}", image_columns=("x",), image_tokens=70)(row)
    counts = [place.num_tokens for place in found.places]
    assert list(found.token_ids) == [BOS, *picture_ids(counts[0]), *picture_ids(counts[1])]
    assert [place.start for place in found.places] == [2, counts[0] + 4]


def test_a_chat_template_writes_the_piece_of_a_token_and_a_row_cannot():
    found = encoder(
        prompt="{x}{text}", image_columns=("x",), prompt_format="chat", chat_template=CHAT
    )({"x": png(48, 48), "text": "<|image|>in"})
    ids = list(found.token_ids)
    assert ids[: ids.index(END) + 1] == [BOS, *picture_ids(256)]
    assert {BEGIN, IMAGE, END}.isdisjoint(ids[ids.index(END) + 1 :])


def test_settings_of_pictures_are_refused_where_the_model_has_none_such():
    with pytest.raises(OptionsError, match="pan_and_scan: expected none for a PaliGemma, a Gem"):
        encoder(prompt="{x}", image_columns=("x",), pan_and_scan=True)
    settings = PromptSettings(prompt="{x}", image_columns=("x",), image_tokens=70)
    fixed = replace(GEMMA3_VISION, begin_token=BEGIN_TOKEN, end_token=END_TOKEN)
    with pytest.raises(OptionsError, match="image_tokens: expected none for a model whose pictur"):
        PromptEncoder(
            TOKENIZER, settings, chat_template=None, vision=fixed, max_tokens=900, vocab_size=320
        )
    with pytest.raises(OptionsError, match="image_tokens: expected one of 70, 140, 280, 560, 1120"):
        encoder(prompt="{x}", image_columns=("x",), image_tokens=100)
