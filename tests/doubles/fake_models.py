"""A model handler without a model: the real engine over a session that computes a function."""

import os
import threading
import time
import uuid

import apache_beam as beam

from beam_gemma.beam_internals import without_prism
from beam_gemma.engine.engine import Engine
from beam_gemma.inference.handlers import GemmaGenerateModelHandler
from beam_gemma.inference.task_handler import BATCH_ROWS
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import PagedState
from beam_gemma.model.layer_types import FULL
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.monitoring.progress import METER
from beam_gemma.runtime.limits import EngineConfig, Limits
from beam_gemma.tasks.generate import Generator, constraint_of
from tests.doubles.fakes import FakeSession, fake_signature
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

TOKENIZER = Tokenizer(tiny_tokenizer_model())
A_ID = TOKENIZER.encode([Text("a")], add_bos=False)[0]
STATES = (PagedState(group=FULL, layers=(0,), num_key_value_heads=1, head_dim=8),)
SIGNATURE = fake_signature(
    states=STATES, optional_inputs=(), vocab_size=TOKENIZER.vocab_size, max_model_len=200
)
NEWLINE_ID = TOKENIZER.encode([Text("\n")], add_bos=False)[0]
SLOTS = 20
STEP_SECS, START_SECS = 0.005, 0.5


def next_letter(tokens):
    """Return the id of a letter that follows from all tokens so far."""
    return A_ID + sum(tokens) % 26


def uneven_letter(tokens):
    """Return a letter, or the end once a completion has the length that its prompt asks for."""
    start = tokens.index(NEWLINE_ID) + 1
    length = 4 + 7 * sum(tokens[:start]) % 33
    return next_letter(tokens) if len(tokens) - start < length else TOKENIZER.eos_token_id


def completion_of(prompt, max_tokens=3):
    """Return what the fake model says to a raw prompt."""
    ids = TOKENIZER.encode([Text(prompt)])
    start = len(ids)
    for _ in range(max_tokens):
        ids.append(next_letter(ids))
    return TOKENIZER.decode(ids[start:])


def fake_encoder(
    settings, chat_template=None, tokenizer=TOKENIZER, max_model_len=SIGNATURE.max_model_len
):
    """Return what makes prompts for the fake model."""
    return PromptEncoder(
        tokenizer,
        settings,
        chat_template=chat_template,
        max_tokens=settings.max_prompt(max_model_len),
        enable_thinking=settings.thinking,
    )


def fake_generator(
    settings,
    *,
    chat_template=None,
    session=None,
    tokenizer=TOKENIZER,
    on_result=METER.add,
    **engine_options,
):
    """Return a generator over the fake model, or over another session."""
    session = session or FakeSession(SIGNATURE, num_blocks=2000, next_token=next_letter)
    max_model_len = session.signature.max_model_len
    encoder = fake_encoder(settings, chat_template, tokenizer, max_model_len)
    config = EngineConfig(eos_token_ids=(tokenizer.eos_token_id,), **engine_options)
    engine = Engine(session, config, on_step=on_result)
    constraint = constraint_of(settings, tokenizer, config.eos_token_ids)
    return Generator(engine, encoder, settings, constraint=constraint, on_result=on_result)


class FakeHandler(GemmaGenerateModelHandler):
    """Starts an engine over the fake model."""

    def __init__(self, settings, **options) -> None:
        super().__init__("fake", settings, **options)

    def artifact(self):
        return object.__new__(Artifact)  # there is no folder

    def encoder(self, _):
        return fake_encoder(self.settings)

    def _start(self) -> Generator:
        return fake_generator(self.settings)


class SlowSession(FakeSession):
    """Computes in milliseconds, and the first time not before all who have met have submitted."""

    def run(self, feeds, *, with_logits=False):
        time.sleep(STEP_SECS if self.steps else START_SECS)
        return super().run(feeds, with_logits=with_logits)


class UnevenHandler(FakeHandler):
    """Completes prompts that end with a newline, each to a length of its own, slowly."""

    def __init__(self, settings, *, batch_rows=BATCH_ROWS, callers=None, loads=None) -> None:
        """Describe the batches.

        Args:
            settings: Of the task.
            batch_rows: Rows per Beam batch.
            callers: A folder and how many threads meet there to begin.
            loads: A folder that gets a file each time a model is loaded.
        """
        super().__init__(settings, limits=Limits(max_num_seqs=SLOTS))
        self._batch_rows = batch_rows
        self._callers = callers
        self._loads = loads

    def batch_elements_kwargs(self):
        sizes = {"min_batch_size": self._batch_rows, "max_batch_size": self._batch_rows}
        return {**super().batch_elements_kwargs(), **sizes}

    def run_inference(self, batch, model, inference_args=None):
        if self._callers is not None:
            meet(*self._callers)
        return super().run_inference(batch, model, inference_args)

    def _start(self) -> Generator:
        if self._loads is not None:
            (self._loads / uuid.uuid4().hex).touch()
        session = SlowSession(SIGNATURE, num_blocks=2000, next_token=uneven_letter)
        return fake_generator(self.settings, session=session, max_num_seqs=SLOTS)


def meet(folder, num_callers):
    """Wait until so many threads of this machine have come; processes start seconds apart."""
    (folder / f"{os.getpid()}-{threading.get_ident()}").touch()
    while len(list(folder.iterdir())) < num_callers:
        time.sleep(0.01)


def local_pipeline(*flags):
    """Return a pipeline for the in-process runner; no other engine is looked for."""
    return beam.Pipeline(options=without_prism(["--runner=DirectRunner", *flags]))
