"""Filling a gap: the published prompt, what ends an answer, and where a long text is cut."""

import pytest

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.prompt_settings import PromptSettings
from beam_gemma.model.markup import Control, Text
from beam_gemma.model.tokenizer import ModelProto, Tokenizer
from beam_gemma.monitoring.progress import METER
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.tasks.generate import GenerateSettings, Generator
from tests.doubles.fake_models import SIGNATURE, TOKENIZER, next_letter
from tests.doubles.fakes import FakeSession
from tests.doubles.tiny_tokenizer import MARKERS, tiny_tokenizer_model

PIECES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_separator|>")
COLUMNS = {"prefix_column": "before", "suffix_column": "after"}


def code_tokenizer():
    """Return the tiny tokenizer with pieces renamed as CodeGemma renames unused ones."""
    model = ModelProto.FromString(tiny_tokenizer_model())
    spare = dict(zip((MARKERS[-1], "\n\n", "\n\n\n", "</b>"), PIECES, strict=True))
    for piece in model.pieces:
        piece.piece = spare.get(piece.piece, piece.piece)
    return Tokenizer(model.SerializeToString())


CODE = code_tokenizer()


def encoder(tokenizer=CODE, max_tokens=1000, **settings):
    settings = PromptSettings(**{**COLUMNS, **settings})
    return PromptEncoder(tokenizer, settings, chat_template="{{ x }}", max_tokens=max_tokens)


def test_the_prompt_is_the_published_one():
    """No white space is added, and a chat template plays no part."""
    prompt = encoder()({"before": "import ", "after": "\nif x:\n", "other": None})
    assert prompt.text == "<|fim_prefix|>import <|fim_suffix|>\nif x:\n<|fim_middle|>"
    assert prompt.parts[0] == Control("<|fim_prefix|>")
    ids = [CODE.bos_token_id]
    for piece, text in zip(PIECES, ("import ", "\nif x:\n", ""), strict=False):
        ids += [CODE.control_pieces[piece], *CODE.encode([Text(text)], add_bos=False)]
    assert list(prompt.token_ids) == ids


def test_either_side_may_be_empty_but_not_missing():
    assert encoder()({"before": "", "after": "x"}).text == (
        "<|fim_prefix|><|fim_suffix|>x<|fim_middle|>"
    )
    with pytest.raises(RecordError, match="'after': expected a value for the prompt, got null"):
        encoder()({"before": "x", "after": None})
    with pytest.raises(RecordError, match="'before': expected in every row"):
        encoder()({"after": "x"})


def test_markers_in_a_row_are_text_unless_allowed():
    row = {"before": "a<|file_separator|>b", "after": ""}
    separator = CODE.control_pieces["<|file_separator|>"]
    assert separator not in encoder()(row).token_ids
    assert separator in encoder(allow_special_tokens=True)(row).token_ids


@pytest.mark.parametrize("truncate", ["left", "right"])
def test_a_long_text_is_cut_far_from_the_gap(truncate):
    cut = encoder(truncate=truncate, max_tokens=20)
    before = cut({"before": "qwertyuiopasdfghjklzxcvb", "after": "x"})
    assert before.truncated
    assert "jklzxcvb<|fim_suffix|>x<" in before.text
    after = cut({"before": "x", "after": "qwertyuiopasdfghjklzxcvb"})
    assert "x<|fim_suffix|>qwertyui" in after.text
    assert len(after.token_ids) == 20


@pytest.mark.parametrize("piece", PIECES)
def test_what_marks_a_gap_or_a_file_ends_an_answer(piece):
    marker = CODE.control_pieces[piece]

    def next_token(tokens):
        return marker if len(tokens) == 9 else next_letter(tokens)

    session = FakeSession(SIGNATURE, num_blocks=100, next_token=next_token)
    settings = GenerateSettings(**COLUMNS, sampling=SamplingParams(max_tokens=20))
    engine = Engine(session, EngineConfig(eos_token_ids=(CODE.eos_token_id,)))
    generate = Generator(
        engine,
        PromptEncoder(CODE, settings, chat_template=None, max_tokens=100),
        settings,
        on_result=METER.add,
    )
    (result,) = generate([{"before": "a", "after": "b"}])
    engine.close()
    assert result["error"] is None
    assert (result["finish_reason"], len(result["completion"])) == ("stop", 3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"suffix_column": None}, "expected prefix_column and suffix_column, got one of them"),
        ({"prompt_column": "a"}, "expected one source, got prompt_column and prefix_column"),
        ({"system": "be kind"}, "expected no chat around a gap"),
        ({"prompt_format": "chat"}, "expected no chat around a gap"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, sentence):
    with pytest.raises(OptionsError, match=sentence):
        encoder(**settings)


def test_a_model_that_was_not_trained_for_it_is_refused_in_one_sentence():
    with pytest.raises(OptionsError, match=r"such as CodeGemma, got .* has no <\|fim_prefix\|>"):
        encoder(TOKENIZER)
