"""Sounds in prompts: their tokens, their places, and settings that contradict the model."""

import io
import json

import numpy as np
import pytest
import soundfile

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.prompt_settings import PromptSettings
from beam_gemma.inputs.row import MediaFile, MediaPlace, Prompt
from beam_gemma.model.gemma4_vision import BEGIN_TOKEN, END_TOKEN, IMAGE_TOKEN
from beam_gemma.model.markup import Text
from beam_gemma.model.sound_settings import GEMMA4_PIECES, read_sound_config
from beam_gemma.model.tokenizer import Tokenizer
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

BOS, BEGIN, AUDIO, END = 2, 300, 301, 302
PIECES = tuple(GEMMA4_PIECES[key] for key in ("begin_token", "audio_token", "end_token"))
TOKENIZER = Tokenizer(tiny_tokenizer_model((*PIECES, BEGIN_TOKEN, IMAGE_TOKEN, END_TOKEN)))
SOUND = read_sound_config(
    {
        "model_type": "gemma4",
        "audio_config": {"model_type": "gemma4_audio"},
        "audio_token_id": AUDIO,
    },
    {},
)
CHAT = """\
{{ bos_token }}{% for message in messages -%}
{% if message.content is string %}{{ message.content }}{% else -%}
{% for part in message.content -%}
{% if part.type == 'audio' %}{{ '<|audio|>' }}{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}{% endfor %}"""


def encoder(sound=SOUND, chat_template=None, **options):
    return PromptEncoder(
        TOKENIZER,
        PromptSettings(**options),
        chat_template=chat_template,
        sound=sound,
        vocab_size=320,
        max_tokens=3000,
    )


def wav(secs, seed=0):
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(16_000 * secs))
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.float32), 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def sound_ids(count):
    return [BEGIN, *[AUDIO] * count, END]


def text_ids(text):
    return TOKENIZER.encode([Text(text)])[1:]


def test_a_sound_takes_25_tokens_a_second_where_the_template_names_it():
    found = encoder(prompt="the {x} in", audio_columns=("x",))({"x": wav(2)})
    ids = [BOS, *text_ids("the "), *sound_ids(50), *text_ids(" in")]
    assert list(found.token_ids) == ids
    assert found.places == (MediaPlace(ids.index(AUDIO), 0, 0, 50),)
    assert found.files == (MediaFile(wav(2), "audio"),)
    assert found.text == "the <|audio>[sound]<audio|> in"


def test_sounds_that_a_template_does_not_name_come_first_in_their_order():
    found = encoder(prompt="{t}", audio_columns=("y", "x"))(
        {"t": "in", "x": wav(1), "y": [wav(0.5, 1), wav(1)]}
    )
    assert list(found.token_ids) == [
        BOS, *sound_ids(13), *sound_ids(25), *sound_ids(25), *text_ids("in")
    ]  # fmt: skip
    assert [place.file for place in found.places] == [0, 1, 1]


def test_a_long_sound_is_an_error_or_is_split():
    with pytest.raises(RecordError, match=r"^column 'x': expected a sound of at most 30 s, got 31"):
        encoder(prompt="{x}", audio_columns=("x",))({"x": wav(31)})
    found = encoder(prompt="{x}", audio_columns=("x",), split_audio=True)({"x": wav(31)})
    assert [(place.file, place.view) for place in found.places] == [(0, 0), (0, 1)]
    assert list(found.token_ids) == [BOS, *sound_ids(388), *sound_ids(388)]


def test_parts_of_conversations_stand_for_sounds_or_bring_them():
    settings = {"messages_column": "chat", "audio_columns": ("x",), "chat_template": CHAT}
    content = [
        {"type": "text", "text": "the "},
        {"type": "audio", "audio": wav(0.2, 5)},
        {"type": "audio"},
    ]
    row = {"chat": [{"role": "user", "content": content}], "x": wav(1)}
    found = encoder(**settings)(row)
    assert list(found.token_ids) == [BOS, *text_ids("the "), *sound_ids(5), *sound_ids(25)]
    with pytest.raises(RecordError, match=r"as many parts of type audio .* which are 2, got 1$"):
        encoder(**settings)(row | {"x": [wav(1)] * 2})


def test_what_a_row_writes_is_text():
    found = encoder(prompt="{x}{t}", audio_columns=("x",))({"t": "<|audio|>", "x": wav(1)})
    assert list(found.token_ids).count(AUDIO) == 25


def test_a_request_has_the_digest_of_its_sound_in_place_of_the_file():
    found = encoder(prompt="{x} in", audio_columns=("x",))({"x": wav(1)})
    identity = json.loads(json.dumps(found.identity))
    back = Prompt.of_identity(identity, [b"another", wav(1)])
    assert (back.token_ids, back.places, back.files) == (found.token_ids, found.places, found.files)
    with pytest.raises(RecordError, match="expected the files of 1 beside the request"):
        Prompt.of_identity(identity, [b"another"])
    assert MediaFile(b"x").digest != MediaFile(b"x", "audio").digest


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "expected a sound, got null"),
        ([], "expected a sound, got null"),
        (3, "expected bytes, a path or URI, a struct {bytes, path}, a struct {array, sampling_"),
        ({"array": ["a"], "sampling_rate": 8000}, "expected an array of samples from -1 to 1"),
        ({"array": [0.5], "sampling_rate": 0}, "expected a sampling rate from 4,000 to"),
        ("a.wav", "expected the bytes of a sound, got a path or URI, 'a.wav'"),
        ({"error": "expected a file that is there, got none"}, "expected a file that is there"),
        (b"text", "expected"),
        ([wav(1), b"x"], "expected"),
    ],
)
def test_a_bad_value_is_an_error_that_names_the_column(value, said):
    with pytest.raises(RecordError) as caught:
        encoder(prompt="{x}", audio_columns=("x",))({"x": value})
    name = "column 'x', sound 2" if isinstance(value, list) and len(value) > 1 else "column 'x'"
    assert str(caught.value).startswith(f"{name}: {said}")


def test_a_null_may_stand_for_no_sound():
    found = encoder(prompt="{x}in", audio_columns=("x",), allow_missing_audio=True)({"x": None})
    assert list(found.token_ids) == [BOS, *text_ids("in")]


@pytest.mark.parametrize(
    ("sound", "options", "said"),
    [
        (None, {"prompt": "{x}", "audio_columns": ("x",)}, "column 'x': expected no sounds, as"),
        (None, {"prompt": "in", "split_audio": True}, "split_audio: expected no sounds, as"),
        (SOUND, {"prompt_column": "x", "audio_columns": ("x",)}, "column 'x': expected once"),
        (
            SOUND,
            {"prompt": "in", "audio_columns": ("x",), "image_columns": ("x",)},
            "column 'x': expected once",
        ),
        (
            SOUND,
            {"prefix_column": "a", "suffix_column": "b", "audio_columns": ("x",)},
            "prefix_column: expected no columns of pictures or sounds",
        ),
    ],
)
def test_contradictions_are_refused(sound, options, said):
    with pytest.raises(OptionsError) as caught:
        encoder(sound, **options)
    assert str(caught.value).startswith(said)
