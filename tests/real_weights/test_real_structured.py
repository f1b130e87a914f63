"""Structured output of the real Gemma 3 270M: always valid, however little room there is."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.tasks.generate import GenerateSettings
from benchmarks.extraction import Extraction, schemas
from tests.doubles.real_model import real_artifact, real_checkpoint

pytestmark = [pytest.mark.weights, pytest.mark.timeout(600)]

DATA = Path(__file__).parents[1] / "data"
CHOSEN = json.loads((DATA / "choices.json").read_text())
"""Prompt, choices, and those that transformers' tokens lead to (tests/data/make_choices.py)."""
REVIEWS = pq.read_table(DATA / "sst2_sample.parquet").slice(0, len(CHOSEN["completions"]))
PROMPT = "Review: {sentence}\nAs JSON: "


@pytest.fixture(scope="module")
def extraction() -> Iterator[Extraction]:
    extraction = Extraction(real_artifact(real_checkpoint()), PROMPT, REVIEWS.to_pylist())
    with closing(extraction.engine):
        yield extraction


@pytest.mark.parametrize("name", schemas())
def test_every_text_is_valid(extraction: Extraction, name: str) -> None:
    """With room for some, and with none beyond the shortest text; greedy and drawn.

    The engine runs all of them at once, for a step takes about as long for one row as for several.
    """
    run = partial(extraction.run, name, schemas()[name])
    run(num_rows=0)  # makes the schema's constraint, which the threads share
    with ThreadPoolExecutor() as threads:
        futures = [
            threads.submit(run, max_tokens=64, num_rows=6),
            threads.submit(run, spare_tokens=0, num_rows=2),
            threads.submit(run, spare_tokens=4, num_rows=3, sampling={"temperature": 1.5}),
        ]
        turns = [future.result() for future in futures]
    assert [len(turn.results) for turn in turns] == [6, 2, 3]
    assert [turn.problems for turn in turns] == [[]] * len(turns)
    assert len({result["completion"] for result in turns[0].results}) > 1


def test_choices_are_those_of_a_greedy_way_through_the_model(extraction: Extraction) -> None:
    """At each token, transformers' most likely one of all that some choice goes on with."""
    structured = StructuredOutput(choices=tuple(CHOSEN["choices"]))
    settings = GenerateSettings(
        prompt=CHOSEN["prompt"], sampling=SamplingParams(max_tokens=16), structured=structured
    )
    generate = extraction.generator(settings, extraction.constraint(structured))
    completions = [result["completion"] for result in generate(REVIEWS.to_pylist())]
    assert completions == CHOSEN["completions"]
    assert len(set(completions)) > 1
