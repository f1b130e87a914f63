"""Pictures in prompts of Gemma 3n: the published processor's ids and pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from beam_gemma.inputs.image_processor import ImageProcessor
from beam_gemma.inputs.prompt_encoder import PromptEncoder, PromptSettings
from beam_gemma.inputs.row import MediaPlace
from beam_gemma.model.gemma3n_vision import gemma3n_vision
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from tests.doubles.gemma3n_seeing import (
    BEGIN_ID,
    END_ID,
    IMAGE_ID,
    NUM_FEATURES,
    PROCESSOR,
    VISION,
    VOCAB,
    published_processor,
)
from tests.doubles.published_processors import our_tokenizer
from tests.doubles.seeing import picture
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

TOKENIZERS = {"without pieces": Tokenizer(tiny_tokenizer_model()), "all": our_tokenizer("gemma3n")}
"""One like the published `tokenizer.model`, and one like the published `tokenizer.json`."""
RAW = {
    "model_type": "gemma3n",
    "vision_config": VISION,
    "eoi_token_id": END_ID,
    "image_token_id": IMAGE_ID,
}
CHAT = """\
{{ bos_token }}{% for message in messages -%}
{{ '<start_of_turn>' }}{% if message.content is string %}{{ message.content }}{% else -%}
{% for part in message.content -%}
{% if part.type == 'image' %}{{ '<image_soft_token>' }}{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}{% endfor %}"""


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def encoder(tokenizer: Tokenizer, **options) -> PromptEncoder:
    template = options.pop("chat_template", None)
    return PromptEncoder(
        tokenizer,
        PromptSettings(**options),
        chat_template=template,
        vision=gemma3n_vision(RAW, PROCESSOR),
        vocab_size=VOCAB,
        max_tokens=500,
    )


def published(text: str, *numbers: int) -> list[int]:
    """Return the published ids, with that of a picture in place of the end of each."""
    images = [Image.open(io.BytesIO(picture(number))) for number in numbers]
    ids = published_processor()(text=[text], images=[images])["input_ids"][0]
    assert ids.count(END_ID) == len(numbers)
    return [IMAGE_ID if token_id == END_ID else token_id for token_id in ids]


def test_ids_are_those_of_the_published_processor(tokenizer):
    row = {"x": [picture(1), picture(2)]}
    found = encoder(tokenizer, prompt="the hat\n{x} in", image_columns=("x",))(row)
    soft = "<image_soft_token>"
    assert list(found.token_ids) == published(f"the hat\n{soft}{soft} in", 1, 2)
    starts = [i + 1 for i, token_id in enumerate(found.token_ids) if token_id == BEGIN_ID]
    count = NUM_FEATURES + 1
    assert found.places == tuple(MediaPlace(s, i, 0, count) for i, s in enumerate(starts))


def test_a_chat_template_writes_the_piece_of_a_picture_and_a_row_cannot(tokenizer):
    ask = encoder(
        tokenizer,
        prompt="{x}{text}",
        image_columns=("x",),
        prompt_format="chat",
        chat_template=CHAT,
    )
    soft = "<image_soft_token>"
    found = ask({"x": picture(1), "text": "a hat"})
    assert list(found.token_ids) == published(f"<start_of_turn>{soft}a hat", 1)
    attacked = ask({"x": picture(1), "text": f"{soft}a"})
    written = [Text(part.text) for part in attacked.parts if isinstance(part, Text)]
    assert any(soft in text.text for text in written)
    assert attacked.token_ids.count(IMAGE_ID) == NUM_FEATURES + 1


def test_pixels_are_those_of_the_published_processor():
    """Colors from 0 to 1, which are not normalized."""
    vision = gemma3n_vision(RAW, PROCESSOR)
    assert vision is not None
    for size in ((40, 30), (200, 90), (96, 96)):
        file = picture(size[0], size)
        [pixels] = ImageProcessor(vision).pixels(file)
        images = published_processor().image_processor
        theirs = images(Image.open(io.BytesIO(file)))["pixel_values"][0]
        np.testing.assert_array_equal(pixels, np.rint(theirs * 255).astype(np.uint8))
        # float32
        np.testing.assert_allclose(pixels / 255, theirs, rtol=0, atol=1e-6)
