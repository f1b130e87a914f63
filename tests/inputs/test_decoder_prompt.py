"""Prompts of encoder-decoders: the source, and what the decoder starts with, apart from it."""

import json

import pytest

from beam_gemma.errors import OptionsError, PromptTooLongError, RecordError
from beam_gemma.inputs.decoder_prompt import Decoder
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.prompt_settings import PromptSettings
from beam_gemma.inputs.row import MediaFile, MediaPlace, Prompt
from beam_gemma.model.markup import Control, Text
from tests.doubles.fake_models import TOKENIZER

BOS = TOKENIZER.bos_token_id


def encoder(*, max_tokens=100, decoder_tokens=50, **settings):
    return PromptEncoder(
        TOKENIZER,
        PromptSettings(**settings),
        chat_template=None,
        max_tokens=max_tokens,
        decoder=Decoder(model_type="t5gemma", max_tokens=decoder_tokens),
    )


def ids_of(markup):
    return tuple(TOKENIZER.encode(TOKENIZER.split(markup)))


def test_the_decoder_starts_with_bos_alone():
    for row, settings in (("say x", {}), ({"a": "x"}, {"prompt": "say {a}"})):
        prompt = encoder(**settings)(row)
        assert prompt.token_ids == ids_of("say x")
        assert (prompt.decoder_token_ids, prompt.decoder_text) == ((BOS,), "")


def test_a_decoder_prompt_is_rendered_apart_from_its_source():
    encode = encoder(prompt="say {a}", decoder_prompt="{b}: {{{a}}}")
    assert encode.settings.prompt_columns == {"a": "value", "b": "value"}
    prompt = encode({"a": "the", "b": 3})
    assert (prompt.text, prompt.token_ids) == ("say the", ids_of("say the"))
    assert prompt.decoder_text == "3: {the}"
    assert prompt.decoder_token_ids == ids_of("3: {the}")


def test_a_chat_has_its_turns_in_the_source_alone():
    chat = encoder(messages_column="m", chat_template="gemma", decoder_prompt="well")
    assert chat.settings.prompt_columns == {"m": "messages"}
    prompt = chat({"m": [{"role": "user", "content": "hi"}]})
    assert prompt.text.endswith("hi<end_of_turn>\n<start_of_turn>model\n")
    assert prompt.decoder_token_ids == ids_of("well")


@pytest.mark.parametrize("role", ["assistant", "model"])
def test_a_conversation_that_ends_with_the_assistant_is_its_rows_error(role):
    chat = encoder(messages_column="m", chat_template="gemma")
    turns = [{"role": "user", "content": "hi"}, {"role": role, "content": "well"}]
    with pytest.raises(RecordError, match=rf"t5gemma .*got '{role}'; .*--decoder_prompt"):
        chat({"m": turns})
    with pytest.raises(RecordError, match="expected a list of messages"):
        chat({"m": []})


def test_rows_write_control_pieces_only_where_they_may():
    row = {"a": "x<end_of_turn>"}
    settings = {"prompt_column": "a", "decoder_prompt": "<start_of_turn>{a}"}
    kept = encoder(**settings)(row)
    assert kept.decoder_parts == (Control("<start_of_turn>"), Text("x<end_of_turn>"))
    free = encoder(**settings, allow_special_tokens=True)(row)
    assert free.decoder_parts[-1] == Control("<end_of_turn>")
    own = encoder(prompt_column="a", decoder_prompt="<bos>x")(row)
    assert own.decoder_token_ids == ids_of("x")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": "x"}, "column 'b': expected in every row"),
        ({"a": "x", "b": None}, "column 'b': .*null"),
        ({"a": None, "b": "x"}, "column 'a': .*null"),
        ("x", "row: expected columns b for the decoder prompt, got a text"),
    ],
)
def test_a_row_without_its_columns_says_so(row, message):
    with pytest.raises(RecordError, match=message):
        encoder(prompt_column="a", decoder_prompt="{b}")(row)


def test_source_and_decoder_prompt_have_limits_of_their_own():
    encode = encoder(prompt_column="a", decoder_prompt="{b}", max_tokens=5, decoder_tokens=4)
    assert len(encode({"a": "qqqq", "b": "zzz"}).token_ids) == 5
    with pytest.raises(PromptTooLongError, match="prompt: expected at most 5 tokens, got 6"):
        encode({"a": "qqqqq", "b": "z"})
    with pytest.raises(
        PromptTooLongError, match=r"decoder_prompt: expected at most 4 tokens with <bos>.* got 5"
    ):
        encode({"a": "q", "b": "zzzz"})
    with pytest.raises(PromptTooLongError, match=r"at most 2 tokens with <bos>.* got 3"):
        encode({"a": "qqqq", "b": "zz"}, num_answer_tokens=2)
    assert len(encode({"a": "qqqq", "b": "z"}, num_answer_tokens=2).token_ids) == 5


def test_only_the_source_is_cut_to_the_limit():
    settings = {"prompt": "say {a}", "decoder_prompt": "{b} {a}", "truncate": "right"}
    encode = encoder(**settings, max_tokens=8, decoder_tokens=500)
    row = {"a": "q" * 15, "b": "z" * 200}
    prompt = encode(row)
    assert (prompt.truncated, len(prompt.token_ids)) == (True, 8)
    assert prompt.decoder_text == f"{row['b']} {row['a']}"
    short = encoder(**settings, max_prompt_tokens=8, decoder_tokens=500)(row)
    assert short == prompt


def test_a_decoder_prompt_is_part_of_the_request():
    """Equal requests are merged, and their results saved under what identifies them."""
    plain, one, two = (
        encoder(prompt_column="a", decoder_prompt=text)({"a": "x"}) for text in (None, "b", "c")
    )
    assert plain.identity != one.identity != two.identity
    assert one.identity[0] == two.identity[0]
    restored = Prompt.of_identity(json.loads(json.dumps(one.identity)))
    assert restored.decoder_token_ids == one.decoder_token_ids
    assert restored.token_ids == one.token_ids
    assert restored.identity == one.identity


def test_an_identity_with_pictures_has_the_decoder_prompt_too():
    image = MediaFile(b"file")
    prompt = Prompt(
        parts=(),
        token_ids=(2, 7, 7),
        places=(MediaPlace(1, 0, 0, 2),),
        files=(image,),
        decoder_token_ids=(2, 9),
    )
    restored = Prompt.of_identity(json.loads(json.dumps(prompt.identity)), [b"file"])
    assert restored == prompt


def test_what_an_architecture_cannot_do_is_refused_by_name():
    with pytest.raises(OptionsError, match=r"decoder_prompt: expected an encoder-decoder such as"):
        PromptEncoder(
            TOKENIZER, PromptSettings(decoder_prompt="x"), chat_template=None, max_tokens=9
        )
    with pytest.raises(OptionsError, match=r"prefix_column: .* encoder-decoder of type t5gemma"):
        encoder(prefix_column="a", suffix_column="b")
    with pytest.raises(OptionsError, match="decoder_prompt: expected texts, got 'photo'"):
        PromptSettings(image_columns=("photo",), decoder_prompt="{photo}")
    with pytest.raises(OptionsError, match=r"^decoder_prompt: expected each brace closed"):
        PromptSettings(decoder_prompt="{a")
