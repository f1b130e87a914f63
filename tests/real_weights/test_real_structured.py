"""Structured output of the real Gemma 3 270M: always valid, however little room there is."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.model.artifact import Artifact
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.tasks.generate import GenerateSettings
from benchmarks.extraction import Extraction, schemas
from tests.doubles.real_model import real_artifact, real_checkpoint
from tests.doubles.reference import real_model

pytestmark = [pytest.mark.weights, pytest.mark.timeout(600)]

REVIEWS = pq.read_table(Path(__file__).parents[1] / "data/sst2_sample.parquet").slice(0, 24)
PROMPT = "Review: {sentence}\nAs JSON: "
CHOICES = ("positive", "negative", "very positive", "very negative", "mixed", "mixed, but kind")


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return real_artifact(real_checkpoint())


@pytest.fixture(scope="module")
def extraction(artifact: Artifact) -> Iterator[Extraction]:
    extraction = Extraction(artifact, PROMPT, REVIEWS.to_pylist())
    with closing(extraction.engine):
        yield extraction


@pytest.mark.parametrize("name", schemas())
def test_every_text_is_valid(extraction: Extraction, name: str) -> None:
    """With room for some, and with none beyond the shortest text; greedy and drawn."""
    schema = schemas()[name]
    turns = [
        extraction.run(name, schema, max_tokens=64, num_rows=6),
        extraction.run(name, schema, spare_tokens=0, num_rows=2),
        extraction.run(name, schema, spare_tokens=4, num_rows=3, sampling={"temperature": 1.5}),
    ]
    assert [turn.problems for turn in turns] == [[]] * len(turns)
    assert len({result["completion"] for result in turns[0].results}) > 1


def test_choices_are_those_of_a_greedy_way_through_the_model(
    artifact: Artifact, extraction: Extraction
) -> None:
    """At each token, transformers' most likely one of all that some choice goes on with."""
    prompt = "Review: {sentence}\nSentiment of this review: "
    structured = StructuredOutput(choices=CHOICES)
    settings = GenerateSettings(
        prompt=prompt, sampling=SamplingParams(max_tokens=16), structured=structured
    )
    generate = extraction.generator(settings, extraction.constraint(structured))
    rows = REVIEWS.to_pylist()
    completions = [result["completion"] for result in generate(rows)]
    tokenizer = extraction.tokenizer
    prompts = [tokenizer.encode(tokenizer.split(prompt.format(**row))) for row in rows]
    pieces = {
        token_id: data
        for token_id, data in enumerate(tokenizer.vocabulary())
        if data and any(data in choice.encode() for choice in CHOICES)
    }
    pieces |= dict.fromkeys(artifact.eos_token_ids, b"")
    assert completions == greedy(real_model(real_checkpoint()), prompts, pieces)
    assert len(set(completions)) > 1


@torch.no_grad()
def greedy(model: torch.nn.Module, prompts: list[list[int]], pieces: dict[int, bytes]) -> list[str]:
    """Return the choices that the most likely tokens lead to; an end token has no bytes."""
    ids = [list(prompt) for prompt in prompts]
    done = [b""] * len(prompts)
    open_rows = list(range(len(prompts)))
    while open_rows:
        rows = [torch.tensor(ids[row]) for row in open_rows]
        # What stands behind the last token of a row changes nothing before it.
        hidden = model.model(torch.nn.utils.rnn.pad_sequence(rows, True)).last_hidden_state
        last = torch.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
        ended = []
        for row, logits in zip(open_rows, model.lm_head(last), strict=True):
            left = [
                c[len(done[row]) :] for c in map(str.encode, CHOICES) if c.startswith(done[row])
            ]
            allowed = [
                token_id
                for token_id, data in pieces.items()
                if (any(rest.startswith(data) for rest in left) if data else b"" in left)
            ]
            token_id = allowed[int(logits[allowed].argmax())]
            ids[row].append(token_id)
            done[row] += pieces[token_id]
            if not pieces[token_id]:
                ended.append(row)
        open_rows = [row for row in open_rows if row not in ended]
    return [text.decode() for text in done]
