"""A model handler without a model: the real engine over a session that computes a function."""

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from beam_gemma.engine import Engine, EngineConfig
from beam_gemma.generate import GenerateSettings, Generator
from beam_gemma.handlers import GemmaModelHandler
from beam_gemma.progress import METER
from beam_gemma.prompt import Text
from beam_gemma.prompt_encoder import PromptEncoder
from beam_gemma.signature import FULL, PagedState
from beam_gemma.tokenizer import Tokenizer
from tests.fakes import FakeSession, fake_signature
from tests.tiny_tokenizer import tiny_tokenizer_model

TOKENIZER = Tokenizer(tiny_tokenizer_model())
A_ID = TOKENIZER.encode([Text("a")], add_bos=False)[0]
STATES = (PagedState(group=FULL, layers=(0,), num_key_value_heads=1, head_dim=8),)


def next_letter(tokens):
    """Return the id of a letter that follows from all tokens so far."""
    return A_ID + sum(tokens) % 26


def completion_of(prompt, max_tokens=3):
    """Return what the fake model says to a raw prompt."""
    ids = TOKENIZER.encode([Text(prompt)])
    start = len(ids)
    for _ in range(max_tokens):
        ids.append(next_letter(ids))
    return TOKENIZER.decode(ids[start:])


def fake_generator(settings, *, chat_template=None, session=None, on_result=METER.add):
    """Return a generator over the fake model."""
    signature = fake_signature(
        states=STATES, optional_inputs=(), vocab_size=TOKENIZER.vocab_size, max_model_len=200
    )
    session = session or FakeSession(signature, num_blocks=2000, next_token=next_letter)
    encoder = PromptEncoder(
        TOKENIZER,
        settings,
        chat_template=chat_template,
        max_tokens=settings.max_prompt(session.signature.max_model_len),
    )
    config = EngineConfig(eos_token_ids=(TOKENIZER.eos_token_id,))
    engine = Engine(session, config, on_step=on_result)
    return Generator(engine, encoder, settings, on_result=on_result)


class FakeHandler(GemmaModelHandler):
    """Loads the fake model."""

    def __init__(self, settings: GenerateSettings) -> None:
        super().__init__("fake", settings)

    def load_model(self) -> Generator:
        return fake_generator(self.settings)


def local_pipeline(*flags):
    """Return a pipeline for the in-process runner; no other engine is looked for."""
    options = PipelineOptions(["--runner=DirectRunner", "--prism_location=none", *flags])
    return beam.Pipeline(options=options)
