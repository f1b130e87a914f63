"""What names a row's request, and what else a result depends on: each as much as it must."""

from dataclasses import replace

import pyarrow as pa
import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.inference.handlers import (
    GemmaClassifyModelHandler,
    GemmaEmbedModelHandler,
    GemmaGenerateModelHandler,
)
from beam_gemma.inference.rows import rows_of
from beam_gemma.model.artifact import Artifact
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.moderate import ModerateSettings, Policy
from beam_gemma.tasks.questions import ClassifySettings
from beam_gemma.tasks.row_keys import ROW_KEY
from beam_gemma.tasks.text_encoder import EmbedSettings
from tests.conftest import TinyModel
from tests.doubles.fake_models import FakeHandler

GENERATE = GenerateSettings(prompt="Say {text}", max_prompt_tokens=30, truncate="right")
CLASSIFY = ClassifySettings(prompt="{text}", labels=(" yes", " {other}"))


def requests(handler, artifact, *rows):
    encode = handler.request_encoder(artifact)
    return [encode(row) for row in rows]


def test_a_prompt_is_what_names_its_row(tiny_gemma3: TinyModel) -> None:
    artifact = tiny_gemma3.artifact
    handler = GemmaGenerateModelHandler(str(artifact.path), GENERATE)
    a, same, other, null, null_again = requests(
        handler,
        artifact,
        {"text": "a", "unused": 1},
        {"text": "a", "unused": 2},
        {"text": "b"},
        {"text": None},
        {"text": None},
    )
    assert a == same
    assert null == null_again
    assert len({a, other, null}) == 3
    # The template is known by what it renders.
    written = GemmaGenerateModelHandler(str(artifact.path), replace(GENERATE, prompt="Say a"))
    assert requests(written, artifact, {}) == [a]


def test_a_cut_prompt_is_not_the_short_one(tiny_gemma3: TinyModel) -> None:
    artifact = tiny_gemma3.artifact
    handler = GemmaGenerateModelHandler(str(artifact.path), GENERATE)
    encode = handler.encoder(artifact)
    cut = encode({"text": "a" * 100})
    kept = "a" * next(n for n in range(100) if encode({"text": "a" * n}).token_ids == cut.token_ids)
    long, short = requests(handler, artifact, {"text": "a" * 100}, {"text": kept})
    assert long != short


def test_labels_are_part_of_a_question(tiny_gemma3: TinyModel) -> None:
    artifact = tiny_gemma3.artifact
    rows = [{"text": "a", "other": "no"}, {"text": "a", "other": "maybe"}, {"text": "a"}]
    handler = GemmaClassifyModelHandler(str(artifact.path), CLASSIFY)
    no, maybe, missing = requests(handler, artifact, *rows)
    assert len({no, maybe, missing}) == 3
    swapped = replace(CLASSIFY, labels=CLASSIFY.labels[::-1])
    assert requests(GemmaClassifyModelHandler(str(artifact.path), swapped), artifact, rows[0]) != [
        no
    ]


def test_the_place_of_a_label_in_its_tokens_is_part_of_a_question(tiny_gemma3: TinyModel) -> None:
    """The same tokens ask something else where less of them is the label."""
    artifact = tiny_gemma3.artifact
    one = ClassifySettings(prompt="{text}x", labels=("y", "z"))
    two = ClassifySettings(prompt="{text}", labels=("xy", "xz"))
    first, second = (
        requests(GemmaClassifyModelHandler(str(artifact.path), settings), artifact, {"text": "a"})
        for settings in (one, two)
    )
    assert first != second


def test_every_policy_is_part_of_a_request(tiny_gemma3: TinyModel) -> None:
    artifact = tiny_gemma3.artifact
    policies = (Policy(name="a", guideline="No."), Policy(name="b", guideline="Never."))
    settings = ModerateSettings(policies=policies, prompt_column="text")
    both, one = (
        requests(GemmaClassifyModelHandler(str(artifact.path), s), artifact, {"text": "x"})
        for s in (settings, replace(settings, policies=policies[:1]))
    )
    assert both != one


def test_texts_to_embed(two_sided) -> None:
    artifact: Artifact = two_sided[1]
    handler = GemmaEmbedModelHandler(str(artifact.path), EmbedSettings(text_column="text"))
    a, same, b = requests(handler, artifact, {"text": "a", "n": 1}, {"text": "a"}, {"text": "b"})
    assert a == same != b


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        (GENERATE, {"sampling": SamplingParams(max_tokens=7)}),
        (GENERATE, {"sampling": SamplingParams(stop_token_ids=(3,))}),
        (GENERATE, {"sampling": SamplingParams(temperature=1.0)}),
        (GENERATE, {"stop": ("x",)}),
        (GENERATE, {"logprob": True}),
        (GENERATE, {"truncate": None}),
        (GENERATE, {"prompt": None, "prefix_column": "a", "suffix_column": "b"}),
        (CLASSIFY, {"label_norm": "tokens"}),
        (CLASSIFY, {"logliks": True}),
    ],
)
def test_what_changes_results_is_a_parameter(settings, change) -> None:
    assert replace(settings, **change).parameters != settings.parameters


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        (GENERATE, {"prompt": "Answer {text}"}),
        (GENERATE, {"system": "Be brief.", "max_prompt_tokens": None}),
        (GENERATE, {"sampling": SamplingParams(seed=7, top_k=3, top_p=0.5)}),
        (GENERATE, {"truncate": "left", "key_column": "id"}),
        (CLASSIFY, {"prompt": "{text}?", "labels": ("a", "b"), "num_fewshot": 3}),
    ],
)
def test_what_a_request_shows_or_greedy_choice_ignores_is_none(settings, change) -> None:
    assert replace(settings, **change).parameters == settings.parameters


def test_parameters_of_draws_and_of_policies() -> None:
    drawn = replace(GENERATE, sampling=SamplingParams(temperature=0.5))
    assert drawn.is_sampled
    assert not any(settings.is_sampled for settings in (GENERATE, CLASSIFY))
    reseeded = replace(drawn, sampling=replace(drawn.sampling, seed=7))
    assert reseeded.parameters != drawn.parameters
    moderate = ModerateSettings(policies=(Policy(name="harassment"),), prompt_column="text")
    assert replace(moderate, threshold=0.6).parameters != moderate.parameters
    renamed = (Policy(name="x", guideline="No."),)
    assert replace(moderate, policies=renamed).parameters != moderate.parameters


def test_a_given_row_key_is_what_draws_depend_on() -> None:
    settings = GenerateSettings(
        prompt_column="text", sampling=SamplingParams(max_tokens=8, temperature=50.0)
    )
    handler = FakeHandler(settings)
    columns = {"text": ["a"] * 3, ROW_KEY: ["1", "2", "1"]}
    one, two, again = handler.load_model()(rows_of(pa.record_batch(columns)))
    assert one["completion"] == again["completion"] != two["completion"]
