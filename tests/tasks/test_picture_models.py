"""Tasks over rows with pictures on tiny models that see, against transformers from the files on."""

import functools
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import Gemma3Processor, PaliGemmaProcessor, ShieldGemma2Processor

from beam_gemma.cli import run as cli
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import NORMAL, Tokenizer, parsed_model
from beam_gemma.runtime.limits import Limits
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.tasks.classify import Classifier
from beam_gemma.tasks.encoded_rows import request_of
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.moderate import PICTURE_POLICIES, ModerateSettings, Policy
from beam_gemma.tasks.open_model import (
    open_classifier,
    open_generator,
    prompt_encoder,
    question_encoders,
    start_engine,
)
from beam_gemma.tasks.picture_policies import PICTURE_GUIDELINES
from beam_gemma.tasks.questions import ClassifySettings, QuestionEncoder, Shot
from beam_gemma.tasks.row_keys import ENCODED, FILES
from export.__main__ import export
from export.checkpoints.tokenizer_model import sentencepiece_model
from pipelines import generate as pipeline
from tests.doubles.once import exporter_digest, kept
from tests.doubles.published_processors import image_processor, published_tokenizer
from tests.doubles.vision_models import (
    NUM_IMAGE_TOKENS,
    save_vision_checkpoint,
    tiny_vision_model,
    vision_tokenizer_model,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
MAX_TOKENS = 6
MODELS = ("gemma3", "paligemma", "paligemma2")
# `_CHAT_TEMPLATE` of transformers' conversion of ShieldGemma 2, which its checkpoint comes with.
SHIELD_GEMMA_2 = """{{ bos_token }}
{%- for message in messages -%}
    {%- if message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {{ '<start_of_turn>user\\n' }}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ 'You are a policy expert trying to help determine whether a generated or real \
image is in' }}
                {{ ' violation of the safety policy below. Your decision must very clearly follow \
the specific'}}
                {{ ' language used in the safety policy and should not include any interpretation \
outside of the' }}
                {{ ' safety policy.\\n\\n' }}
                {{ '<BEGIN_SAFETY_POLICY>\\n' }}
                {{ item['text'] + '\\n' }}
                {{ '</END_SAFETY_POLICY>\\n\\n' }}
                {{ 'Does the image violate the above policy? Your Answer must start with \\'Yes\\' \
or \\'No\\'.' }}
                {{ '<end_of_turn>\\n' }}
            {%- endif -%}
        {%- endfor -%}
        {{'<start_of_turn>model\\n'}}
    {%- else -%}
        {{ raise_exception("Conversation messages must contain iterable content") }}
    {%- endif -%}
{%- endfor -%}
"""


@functools.cache
def model_of(name):
    """Return the reference, and the folder that was exported from its checkpoint."""
    reference = tiny_vision_model(name).eval()

    def make(folder: Path) -> None:
        template = SHIELD_GEMMA_2 if name == "shieldgemma2" else None
        checkpoint = save_vision_checkpoint(
            reference, folder / "checkpoint", chat_template=template
        )
        export(checkpoint, folder / "model", tasks=["generate", "classify"])

    folder = kept(f"picture-tasks-{name}-{exporter_digest()}", make)
    return reference, Artifact.open(folder / "model")


@functools.cache
def processor_of(name):
    """Return the published processor of a model."""
    images = image_processor(model_of(name)[1].vision)
    if name.startswith("paligemma"):
        return PaliGemmaProcessor(images, published_tokenizer("paligemma"))
    tokenizer = published_tokenizer("gemma3")
    if name == "shieldgemma2":
        return ShieldGemma2Processor(
            images, tokenizer, chat_template=SHIELD_GEMMA_2, image_seq_length=NUM_IMAGE_TOKENS
        )
    return Gemma3Processor(images, tokenizer, image_seq_length=NUM_IMAGE_TOKENS)


def picture(number):
    """Return the file of a picture; each has another size, and a few have colours of their own."""
    rng = np.random.default_rng(number)
    values = rng.integers(0, 256, (30 + 9 * number, 90 - 7 * number, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, ("PNG", "WEBP", "BMP")[number % 3], lossless=True)
    return file.getvalue()


def rows_of(name, number=10):
    """Return rows with no, one and several pictures, which share some."""
    most = 1 if name.startswith("paligemma") else 3
    return [
        {
            "text": "the thing "[: 2 + i % 9] + "abcdefgh"[i % 8],
            "photo": [picture((i + k) % 5) for k in range(i % (most + 1) if most > 1 else 1)],
        }
        for i in range(number)
    ]


def inputs_of(name, text, files):
    """Return what the published processor makes of a text behind pictures."""
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    piece = "<image>" if name.startswith("paligemma") else "<start_of_image>"
    images = {"images": [pictures]} if pictures else {}
    inputs = processor_of(name)(text=[piece * len(pictures) + text], return_tensors="pt", **images)
    if name.startswith("paligemma"):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        inputs.pop("labels", None)
    return inputs


def generated(name, row):
    """Return transformers' tokens after a row, and their log-probability."""
    inputs = inputs_of(name, row["text"], row["photo"])
    with torch.no_grad():
        output = model_of(name)[0].generate(
            **inputs,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    logits = torch.stack(output.logits)[:, 0].double().log_softmax(dim=-1)
    return tokens.tolist(), float(logits[range(len(tokens)), tokens].sum())


def settings_of(**fields):
    fields = {
        "prompt": "{text}",
        "image_columns": ("photo",),
        "allow_missing_images": True,
    } | fields
    fields = {"sampling": SamplingParams(max_tokens=MAX_TOKENS)} | fields
    return GenerateSettings(**fields)


@pytest.mark.parametrize("name", MODELS)
def test_completions_are_those_of_transformers(name):
    generate = open_generator(model_of(name)[1], settings_of(logprob=True, token_ids=True), "cpu")
    rows = rows_of(name)
    results = generate(rows)
    for row, result in zip(rows, results, strict=True):
        tokens, logprob = generated(name, row)
        ends = tokens[-1:] == [1]
        assert result["completion_token_ids"] == (tokens[:-1] if ends else tokens)
        assert result["logprob"] == pytest.approx(logprob, abs=2e-4)
        prompt = inputs_of(name, row["text"], row["photo"])["input_ids"]
        assert result["num_prompt_tokens"] == prompt.shape[1]
    assert len({round(r["logprob"], 2) for r in results}) > 3, "rows differ"
    assert [generate([row])[0] for row in reversed(rows)] == results[::-1]
    counts = generate.take_counts()
    assert counts["pictures"] == 5


def test_64_rows_of_a_whole_job_are_completed_as_by_transformers(monkeypatch, tmp_path):
    """Rows of no picture to three, of which several share some, from one file to another."""
    rows = rows_of("gemma3", 64)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    flags = {
        "model": model_of("gemma3")[1].path,
        "input": tmp_path / "in.parquet",
        "output": tmp_path / "out.parquet",
        "prompt": "{text}",
        "image_column": "photo",
        "max_tokens": MAX_TOKENS,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += ["--allow_missing_images", "--token_ids"]
    monkeypatch.setattr(sys, "argv", ["pipelines.generate", *words])
    assert cli.exit_code(pipeline.main) == 0
    [shard] = tmp_path.glob("out-*.parquet")
    results = pq.read_table(shard).to_pylist()
    for row, result in zip(rows, results, strict=True):
        assert result["photo"] == row["photo"]
        tokens, _ = generated("gemma3", row)
        assert result["completion_token_ids"] == (tokens[:-1] if tokens[-1:] == [1] else tokens)


@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
def test_carried_requests_give_the_same_results(name):
    settings, artifact = settings_of(token_ids=True), model_of(name)[1]
    encode, generate = prompt_encoder(artifact, settings), open_generator(artifact, settings, "cpu")
    rows = rows_of(name)
    carried = [
        {ENCODED: request_of(row, lambda row: encode(row).identity), FILES: row["photo"]}
        for row in rows
    ]
    assert generate(carried) == generate(rows)


@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
def test_structured_output_beside_pictures(name):
    artifact, rows = model_of(name)[1], rows_of(name, 6)
    for structured, column in (
        (StructuredOutput(choices=("cat", "dog", "the hat")), "completion"),
        (StructuredOutput(regex="[a-c]{2,4}"), "completion"),
    ):
        results = open_generator(artifact, settings_of(structured=structured), "cpu")(rows)
        assert {r["error"] for r in results} == {None}
        for result in results:
            text = result[column]
            assert text in ("cat", "dog", "the hat") or set(text) <= set("abc")
    schema = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    settings = settings_of(
        structured=StructuredOutput(json_schema=schema), sampling=SamplingParams(max_tokens=40)
    )
    for result in open_generator(artifact, settings, "cpu")(rows):
        assert isinstance(result["extracted"]["n"], bool)


def logliks_of(name, prompt, files, labels):
    """Return the log-likelihood of each label in transformers' model."""
    tokenizer = Tokenizer(vision_tokenizer_model(name))
    totals = []
    for label in labels:
        inputs = inputs_of(name, prompt, files)
        ids = inputs["input_ids"]
        more = torch.tensor([tokenizer.encode([Text(label)], add_bos=False)])
        inputs["input_ids"] = torch.cat([ids, more], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        # The tokens of a label see those before them: PaliGemma's processor gives them the type 1.
        kinds = torch.full_like(more, int(name.startswith("paligemma")))
        inputs["token_type_ids"] = torch.cat([inputs["token_type_ids"], kinds], dim=1)
        with torch.no_grad():
            logits = model_of(name)[0](**inputs).logits[0].double().log_softmax(dim=-1)
        places = range(ids.shape[1] - 1, ids.shape[1] - 1 + more.shape[1])
        totals.append(float(logits[list(places), more[0]].sum()))
    return totals


@pytest.mark.parametrize("name", MODELS)
def test_labels_are_scored_as_transformers_scores_them(name):
    labels = ("cat", "the hat", "dog")
    settings = ClassifySettings(
        prompt="{text}:", image_columns=("photo",), allow_missing_images=True, labels=labels,
        logliks=True,
    )  # fmt: skip
    classify = open_classifier(model_of(name)[1], settings, "cpu")
    rows = rows_of(name, 6)
    for row, result in zip(rows, classify(rows), strict=True):
        wanted = logliks_of(name, f"{row['text']}:", row["photo"], labels)
        assert result["logliks"] == pytest.approx(wanted, abs=2e-4)
        assert result["label_index"] == int(np.argmax(wanted))


def test_shots_with_pictures():
    """As one prompt in which the pictures of the shots come before that of the row."""
    artifact, labels = model_of("gemma3")[1], ("cat", "dog")
    shots = tuple(Shot(row={"text": "abc"[i], "photo": picture(i)}, label=i) for i in (0, 1))
    settings = ClassifySettings(
        prompt="{photo}{text}:", image_columns=("photo",), labels=labels, shots=shots,
        fewshot_delimiter="\n", logliks=True,
    )  # fmt: skip
    rows = [{"text": "the", "photo": picture(number)} for number in (2, 3)]
    results = open_classifier(artifact, settings, "cpu")(rows)
    for row, result in zip(rows, results, strict=True):
        place = "<start_of_image>"
        text = f"a:cat\n{place}b:dog\n{place}the:"
        files = [shots[0].row["photo"], shots[1].row["photo"], row["photo"]]
        inputs = processor_of("gemma3")(
            text=[place + text], images=[[Image.open(io.BytesIO(f)) for f in files]]
        )
        encoder = question_encoders(artifact, settings)[0]
        assert list(encoder(row).prompt.token_ids) == inputs["input_ids"][0]
        assert result["error"] is None
    encode = question_encoders(artifact, settings)[0]
    carried = [
        {ENCODED: request_of(r, lambda r: [encode(r).identity]), FILES: [r["photo"]]} for r in rows
    ]
    assert open_classifier(artifact, settings, "cpu")(carried) == results


@functools.cache
def shield_tokenizer():
    """Return the tiny tokenizer with the words `Yes` and `No` as tokens of their own."""
    pieces = parsed_model(vision_tokenizer_model("shieldgemma2")).pieces
    names = [piece.piece for piece in pieces]
    kinds = [piece.type for piece in pieces]
    # The id behind the last piece is that of a picture's tokens.
    more = ("<image_soft_token>", "Y", "N", "Ye", "Yes", "No")
    names += more
    kinds += [kinds[-1], *[NORMAL] * 5]
    scores = [-float(i) for i in range(len(names))]
    return Tokenizer(sentencepiece_model(names, scores, kinds))


def shield(policies):
    """Return a classifier on the tiny ShieldGemma 2, and its encoders."""
    artifact = model_of("shieldgemma2")[1]
    settings = ModerateSettings(policies=policies, image_columns=("photo",))
    encoders = [
        QuestionEncoder(
            shield_tokenizer(),
            question,
            chat_template=artifact.chat_template,
            max_model_len=2000,
            vision=artifact.vision,
            vocab_size=artifact.config.vocab_size,
        )
        for question in settings.questions_for(None)
    ]
    engine = start_engine(artifact, "score", "cpu", Limits())
    classify = Classifier(
        engine, encoders, settings, vision=artifact.vision, on_result=lambda _: None
    )
    return classify, encoders


def test_scores_of_pictures_are_those_of_shield_gemma_2(monkeypatch):
    reference, artifact = model_of("shieldgemma2")
    yes, no = (shield_tokenizer().encode([Text(a)], add_bos=False)[0] for a in ("Yes", "No"))
    monkeypatch.setattr(reference, "yes_token_index", yes)
    monkeypatch.setattr(reference, "no_token_index", no)
    # Short guidelines, as the tiny model takes few tokens.
    policies = tuple(Policy(name=name, guideline=f"no {name[0]}") for name in PICTURE_POLICIES)
    instruction = "beam_gemma.tasks.picture_policies._INSTRUCTION"
    monkeypatch.setattr(instruction, "the policy:\n{guideline}\nyes or no?")
    classify, encoders = shield(policies)
    rows = [{"photo": picture(number)} for number in range(5)]
    results = classify(rows)
    for row, result in zip(rows, results, strict=True):
        wanted = []
        for encode in encoders:
            ids = torch.tensor([encode(row).prompt.token_ids])
            pixels = image_processor(artifact.vision)(
                images=[[Image.open(io.BytesIO(row["photo"]))]], return_tensors="pt"
            )["pixel_values"]
            with torch.no_grad():
                output = reference(
                    input_ids=ids,
                    pixel_values=pixels,
                    attention_mask=torch.ones_like(ids),
                    token_type_ids=(ids == artifact.vision.image_token_id).long(),
                )
            wanted.append(float(output.probabilities[0, 0]))
        assert result["error"] is None
        assert result["scores"] == pytest.approx(wanted, abs=1e-5)
        assert result["violations"] == [
            name for name, score in zip(PICTURE_POLICIES, wanted, strict=True) if score >= 0.5
        ]
    assert np.std([r["scores"] for r in results]) > 1e-3


def test_the_prompt_of_a_policy_is_that_of_the_published_processor():
    artifact = model_of("shieldgemma2")[1]
    assert artifact.chat_template == SHIELD_GEMMA_2
    policies = (
        *(Policy(name=n) for n in PICTURE_POLICIES),
        Policy(name="own", guideline="No {x}."),
    )
    settings = ModerateSettings(policies=policies, image_columns=("photo",))
    encoders = [
        QuestionEncoder(
            Tokenizer(vision_tokenizer_model("shieldgemma2")),
            question,
            chat_template=artifact.chat_template,
            max_model_len=5000,
            vision=artifact.vision,
            vocab_size=artifact.config.vocab_size,
        )
        for question in settings.questions_for(artifact.chat_template)
    ]
    processor = processor_of("shieldgemma2")
    assert processor.policy_definitions == PICTURE_GUIDELINES
    published = processor(
        images=[Image.open(io.BytesIO(picture(1)))], custom_policies={"own": "No {x}."}
    )["input_ids"]
    for encode, ids in zip(encoders, published, strict=True):
        prompt = encode({"photo": picture(1)}).prompt
        ids = [i for i in ids if i != 0]
        # The processor's tokenizer adds a second <bos> to that of the template.
        assert ids[:2] == [2, 2]
        assert list(prompt.token_ids) == ids[1:]


def test_a_model_folder_judges_pictures_by_its_own_template():
    artifact = model_of("shieldgemma2")[1]
    settings = ModerateSettings(policies=(Policy(name="violence"),), image_columns=("photo",))
    (question,) = settings.questions_for(artifact.chat_template)
    (built_in,) = settings.questions_for(None)
    assert question.prompt.startswith('<bos><start_of_turn>user\n{"photo"}<start_of_turn>user\n')
    assert built_in.prompt.startswith('<start_of_turn>user\n{"photo"}You are a policy expert')
    assert json.dumps(PICTURE_GUIDELINES["violence"])[1:-1] in question.prompt
    assert math.isclose(settings.threshold, 0.5)
