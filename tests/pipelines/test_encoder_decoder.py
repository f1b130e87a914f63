"""T5Gemma and T5Gemma 2 in whole jobs: what transformers computes, in any company."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Gemma3Processor

from beam_gemma import preflight
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import OptionsError
from beam_gemma.inputs.chat_template import GEMMA_CHAT_TEMPLATE
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.markup import Part, Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.open_model import open_generator
from export.__main__ import export
from tests.doubles.command_line import CommandLine
from tests.doubles.encoder_decoder_models import (
    MAX_LENGTH,
    TinyPair,
    encoder_decoder_outputs,
    save_encoder_decoder,
    tiny_pair,
)
from tests.doubles.published_processors import image_processor, published_tokenizer
from tests.doubles.seeing import picture
from tests.doubles.vision_models import NUM_IMAGE_TOKENS

ROOT = Path(__file__).parent.parent.parent
NAMES = ("t5gemma", "t5gemma2")
NUM_ROWS, NEW_TOKENS = 64, 10
PAD, EOS, BOS = 0, 1, 2
FLAGS = ("--prompt=say {text}", f"--max_tokens={NEW_TOKENS}", "--token_ids", "--logprob")


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest) -> TinyPair:
    return tiny_pair(request.param)


@pytest.fixture
def jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, capsys)


def uneven_rows(number: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Return texts of 1 to 120 letters, most of them beyond the windows."""
    rng = np.random.default_rng(5)
    letters = [*"abcdefghijklmnopqrstuvwxyz  "]
    texts = ["".join(rng.choice(letters, n)) for n in rng.integers(1, 120, number)]
    return [{"id": i, "text": text, "begin": "bcd"[: i % 4]} for i, text in enumerate(texts)]


def kind_of(pair: TinyPair) -> str:
    return pair.artifact.config.model_type


def tokenizer_of(pair: TinyPair) -> Tokenizer:
    return Tokenizer.from_file(pair.artifact.tokenizer_path)


def ids_of(pair: TinyPair, text: str) -> list[int]:
    return tokenizer_of(pair).encode([Text(text)])


@torch.no_grad()
def generated(
    pair: TinyPair, sources: Sequence[list[int]], start: Sequence[int] = (BOS,)
) -> list[list[int]]:
    """Return what transformers generates greedily from sources, with the end token."""
    longest = max(map(len, sources))
    outputs = pair.reference.generate(
        input_ids=torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in sources]),
        attention_mask=torch.tensor(
            [[1] * len(ids) + [0] * (longest - len(ids)) for ids in sources]
        ),
        decoder_input_ids=torch.tensor([list(start)] * len(sources)),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    new = [row[len(start) :] for row in outputs.tolist()]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in new]


def tokens_of(row: dict[str, Any]) -> list[int]:
    """Return the tokens of a completion, with the end token."""
    assert row["error"] is None, row
    return row["completion_token_ids"] + [EOS] * (row["finish_reason"] == "stop")


def loglik(pair: TinyPair, source: list[int], start: list[int], label: list[int]) -> float:
    """Return transformers' log-likelihood of a label's tokens after what the decoder has."""
    logits = encoder_decoder_outputs(pair.reference, source, [*start, *label[:-1]])[1]
    logprobs = torch.log_softmax(torch.tensor(logits), dim=-1)[len(start) - 1 :]
    return sum(float(logprobs[i, token]) for i, token in enumerate(label))


def test_greedy_tokens_of_64_uneven_rows_are_those_of_transformers(pair, jobs):
    rows = uneven_rows()
    bad = [{"id": 100, "text": None}, {"id": 101, "text": "x" * MAX_LENGTH}]
    table = jobs.table([bad[0], *rows, bad[1]])
    found = jobs.rows("generate", pair.artifact.path, table, *FLAGS)
    sources = [ids_of(pair, f"say {row['text']}") for row in rows]
    expected = generated(pair, sources)
    assert [tokens_of(found[row["id"]]) for row in rows] == expected
    assert len(set(map(tuple, expected))) > NUM_ROWS // 2
    assert [found[i]["num_prompt_tokens"] for i in range(NUM_ROWS)] == list(map(len, sources))
    # float32, the sum over a completion.
    for i in (0, 7, 23):
        assert found[i]["logprob"] == pytest.approx(
            loglik(pair, sources[i], [BOS], expected[i]), abs=1e-4
        )
    assert "null" in found[100]["error"]
    assert re.match(rf"prompt: expected at most {MAX_LENGTH} tokens", found[101]["error"])


def test_a_decoder_prompt_is_where_transformers_starts_too(pair, jobs):
    rows = uneven_rows(24)
    table = jobs.table(rows)
    found = jobs.rows(
        "generate", pair.artifact.path, table, *FLAGS, "--decoder_prompt=well {begin}"
    )
    for begin in {row["begin"] for row in rows}:
        alike = [row for row in rows if row["begin"] == begin]
        sources = [ids_of(pair, f"say {row['text']}") for row in alike]
        expected = generated(pair, sources, ids_of(pair, f"well {begin}"))
        assert [tokens_of(found[row["id"]]) for row in alike] == expected
    without = jobs.rows("generate", pair.artifact.path, table, *FLAGS)
    assert found != without


WAYS = {
    "few at once": ["--max_num_seqs=3", "--max_num_batched_tokens=64"],
    "alone": ["--max_num_seqs=1"],
    "threads": ["--direct_running_mode=multi_threading", "--direct_num_workers=3"],
    "processes": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
}


def test_a_row_is_worth_the_same_however_it_is_run(pair, jobs):
    rows = uneven_rows(40)
    flags = (
        *FLAGS, "--decoder_prompt={begin}", "--temperature=3", "--key_column=id", "--stop=a",
    )  # fmt: skip
    model = pair.artifact.path
    plain = jobs.rows("generate", model, jobs.table(rows), *flags)
    assert len({row["completion"] for row in plain.values()}) > 20
    turned = jobs.table(rows[::-1], "turned")
    for name, more in WAYS.items():
        if name == "processes" and pair.name != NAMES[0]:
            continue  # processes start for seconds, and the model makes no difference to them
        assert jobs.rows("generate", model, turned, *flags, *more) == plain, name


def test_equal_requests_are_computed_once_and_equal_sources_too(pair, jobs):
    asked = [("the cat", "a"), ("the cat", "a"), ("the cat", "b"), ("a tent", "a")]
    rows = [{"id": i, "text": text, "begin": begin} for i, (text, begin) in enumerate(asked)]
    flags = (*FLAGS, "--decoder_prompt={begin}")
    found = jobs.rows("generate", pair.artifact.path, jobs.table(rows), *flags)
    assert {**found[0], "id": 1} == found[1]
    assert len({found[i]["logprob"] for i in range(4)}) == 3
    (task,) = json.loads((jobs.folder / "out1/_x.run.json").read_text())["tasks"]
    assert (task["requests"], task["duplicate_rows"]) == (3, 1)
    assert task["settings"]["decoder_prompt"] == "{begin}"
    sampling = SamplingParams(max_tokens=2)
    settings = GenerateSettings(prompt="{text}", decoder_prompt="{begin}", sampling=sampling)
    generate = open_generator(pair.artifact, settings, "cpu")
    generate(rows)
    counts = generate.take_counts()
    assert (counts["sources"], counts["reused_sources"]) == (2, 2)


@pytest.mark.parametrize("norm", ["none", "tokens"])
def test_labels_are_scored_as_transformers_scores_them(pair, jobs, norm):
    rows = uneven_rows(12)
    labels = (" no", " yes indeed")
    found = jobs.rows(
        "classify", pair.artifact.path, jobs.table(rows), "--prompt=say {text}",
        "--decoder_prompt=so{begin}", f"--label={labels[0]}", f"--label={labels[1]}",
        "--logliks", f"--label_norm={norm}",
    )  # fmt: skip
    for row in rows:
        source = ids_of(pair, f"say {row['text']}")
        start = ids_of(pair, f"so{row['begin']}")
        whole = [ids_of(pair, f"so{row['begin']}{label}") for label in labels]
        assert all(ids[: len(start)] == start for ids in whole)
        own = [ids[len(start) :] for ids in whole]
        expected = [loglik(pair, source, start, ids) for ids in own]
        result = found[row["id"]]
        # float32, the sum over a label's tokens.
        assert result["logliks"] == pytest.approx(expected, abs=1e-4)
        lengths = [len(ids) if norm == "tokens" else 1 for ids in own]
        means = np.array(expected) / lengths
        assert result["label"] == labels[int(np.argmax(means))]
        assert result["num_prompt_tokens"] == len(source)


def test_examples_of_a_classification_are_in_the_source(pair, jobs):
    rows = [{"id": i, "text": f"t{i}", "kind": ["no", "yes"][i % 2]} for i in range(6)]
    flags = (
        "--prompt={text} is", "--decoder_prompt= really", "--label= no", "--label= yes",
        "--label_column=kind", "--num_fewshot=2", "--logliks",
    )  # fmt: skip
    table = jobs.table(rows)
    code, shown, err = jobs.run(
        "classify", f"--model={pair.artifact.path}", f"--input={table}",
        f"--output={jobs.folder}/x.jsonl", *flags, "--dry_run",
    )  # fmt: skip
    assert code == 0, err
    prompt = re.search(r"prompt 1, \d+ tokens:\n((?:.|\n)*?)\ndecoder prompt 1, (\d+)", shown)
    assert re.fullmatch(r"(t\d is really (no|yes)\n\n){2}t0 is", prompt[1])
    found = jobs.rows("classify", pair.artifact.path, table, *flags)
    source, start = ids_of(pair, prompt[1]), ids_of(pair, " really")
    assert len(start) == int(prompt[2])
    expected = [loglik(pair, source, start, ids_of(pair, f" really {x}")[len(start) :])
                for x in ("no", "yes")]  # fmt: skip
    assert found[0]["logliks"] == pytest.approx(expected, abs=1e-4)  # float32


def test_embeddings_are_the_mean_of_the_encoder(pair, jobs):
    rows = [*uneven_rows(12), {"id": 100, "text": None}, {"id": 101, "text": ""}]
    model = pair.artifact.path
    found = jobs.rows("embed", model, jobs.table(rows), "--text_column=text")
    for row in rows[:12]:
        source = ids_of(pair, row["text"])
        mean = encoder_decoder_outputs(pair.reference, source, [BOS])[0].mean(axis=0)
        # float32; vectors have length 1.
        np.testing.assert_allclose(
            found[row["id"]]["embedding"], mean / np.linalg.norm(mean), rtol=0, atol=2e-5
        )
        assert found[row["id"]]["num_tokens"] == len(source)
    assert "null" in found[100]["error"]
    assert found[101]["num_tokens"] == 1  # <bos>
    turned = jobs.table(rows[::-1], "turned")
    small = jobs.rows("embed", model, turned, "--text_column=text", "--max_num_batched_tokens=64")
    assert small == found


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


def test_structured_completions_are_valid(pair, jobs):
    schema = jobs.folder / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    rows = uneven_rows(8)
    table, model = jobs.table(rows), pair.artifact.path
    flags = ("--prompt_column=text", "--decoder_prompt=as JSON: ", "--max_tokens=60")
    found = jobs.rows("generate", model, table, *flags, f"--json_schema={schema}")
    for row in found.values():
        if row["error"] is None and row["finish_reason"] == "stop":
            assert set(row["extracted"]) == {"n", "ok"}
    assert any(row["finish_reason"] == "stop" for row in found.values())
    chosen = jobs.rows("generate", model, table, *flags, "--choices=yes,no,not sure")
    assert {row["completion"] for row in chosen.values()} <= {"yes", "no", "not sure"}
    matched = jobs.rows("generate", model, table, *flags, "--regex=[a-c]{3}")
    assert all(re.fullmatch("[a-c]{3}", row["completion"]) for row in matched.values())


def test_a_stop_text_ends_a_completion(pair, jobs):
    rows = uneven_rows(16)
    table, model = jobs.table(rows), pair.artifact.path
    free = jobs.rows("generate", model, table, *FLAGS)
    text = next(row["completion"] for row in free.values() if len(row["completion"]) > 1)[1]
    held = jobs.rows("generate", model, table, *FLAGS, f"--stop={text}")
    for i, row in held.items():
        whole = free[i]["completion"]
        cut = whole.find(text)
        # A completion that ends within a character leaves it out.
        assert row["completion"] == (whole if cut < 0 else whole[:cut])


def test_conversations(pair, jobs):
    said = {"role": "user", "content": "hi there"}
    rows = [
        {"id": 0, "chat": [said]},
        {"id": 1, "chat": [said, {"role": "assistant", "content": "well"}]},
    ]
    chat = ("--messages_column=chat", "--chat_template=gemma", "--system=be kind")
    found = jobs.rows(
        "generate", pair.artifact.path, jobs.table(rows), *chat, "--token_ids",
        f"--max_tokens={NEW_TOKENS}",
    )  # fmt: skip
    tokenizer = tokenizer_of(pair)
    turns: tuple[Part, ...] = tokenizer.split(
        "<bos><start_of_turn>user\nbe kind\n\nhi there<end_of_turn>\n<start_of_turn>model\n"
    )
    assert [tokens_of(found[0])] == generated(pair, [tokenizer.encode(turns)])
    assert re.match(
        rf"messages: .* {kind_of(pair)} model .* got 'assistant'; .*--decoder_prompt",
        found[1]["error"],
    )


def test_a_dry_run_shows_the_decoder_prompt_and_counts_sources_once(pair, jobs):
    rows = [{"id": i, "text": "the cat", "begin": b} for i, b in enumerate("abb")]
    code, shown, err = jobs.run(
        "generate", f"--model={pair.artifact.path}", f"--input={jobs.table(rows)}",
        f"--output={jobs.folder}/x.jsonl", *FLAGS, "--decoder_prompt={begin}: ", "--dry_run",
    )  # fmt: skip
    assert code == 0, err
    source, start = len(ids_of(pair, "say the cat")), len(ids_of(pair, "a: "))
    said = f"\nprompt 1, {source} tokens:\nsay the cat\ndecoder prompt 1, {start} tokens:\na: \n"
    assert said in shown
    assert f"{3 * source} prompt tokens, {source + 2 * start} of them to compute" in shown
    assert "rows that ask what others ask: 1 of the sample" in shown


TEXT, FEW = "--prompt_column=text", "--max_tokens=9"
REFUSED = {
    "gaps": ("generate", ["--prefix_column=text", "--suffix_column=text", FEW],
             "prefix_column: .* encoder-decoder of type {kind}"),
    "policies": ("classify", ["--policy=all", TEXT],
                 "policies: .* encoder-decoder of type {kind}"),
    "boxes": ("generate", [TEXT, FEW, "--boxes"], "boxes: expected a model such as"),
    "languages": ("generate", [TEXT, FEW, "--source_lang=en", "--target_lang=de"],
                  "chat template: expected one for languages"),
    "unknown column": ("generate", [TEXT, FEW, "--decoder_prompt={txt}"],
                       "column 'txt': expected in the table"),
    "no room": ("generate", [TEXT, f"--max_tokens={MAX_LENGTH}"],
                "max_tokens: expected less than the"),
}  # fmt: skip


@pytest.mark.parametrize(("task", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_do_is_refused_by_name(pair, jobs, task, flags, message):
    table = jobs.table(uneven_rows(2))
    code, _, err = jobs.run(
        task, f"--model={pair.artifact.path}", f"--input={table}",
        f"--output={jobs.folder}/out/x.jsonl", *flags,
    )  # fmt: skip
    assert code == 2
    assert re.match(f"error: {message.format(kind=kind_of(pair))}", err), err
    assert err.count("\n") == 1
    assert not (jobs.folder / "out").exists()


def test_pictures_are_for_models_that_see(jobs):
    table = jobs.table([{"id": 0, "text": "x", "photo": "x.png"}])
    code, _, err = jobs.run(
        "generate", f"--model={tiny_pair('t5gemma').artifact.path}", f"--input={table}",
        f"--output={jobs.folder}/x.jsonl", "--prompt_column=text", "--image_column=photo",
    )  # fmt: skip
    assert code == 2
    assert "image_columns: expected a model that takes pictures" in err


@torch.no_grad()
def test_pictures_are_in_the_source_as_transformers_has_them(jobs):
    """Rows with no, one and two pictures, of which some are the same."""
    pair = tiny_pair("t5gemma2")
    vision = pair.artifact.vision
    processor = Gemma3Processor(
        image_processor(vision), published_tokenizer("gemma3"), image_seq_length=NUM_IMAGE_TOKENS
    )
    for number in range(3):
        (jobs.folder / f"{number}.png").write_bytes(picture(number))
    shown = [[], [0], [1], [0, 2], [0], [2, 1]]
    texts = ["a cat", "the hat", "the hat", "a cat", "some", "the hat"]
    rows = [
        {"id": i, "text": text, "photo": [f"{n}.png" for n in numbers]}
        for i, (text, numbers) in enumerate(zip(texts, shown, strict=True))
    ]
    flags = (
        "--prompt={photo}so {text}",
        "--image_column=photo",
        "--allow_missing_images",
        "--decoder_prompt=it",
        *FLAGS[1:],
    )
    found = jobs.rows("generate", pair.artifact.path, jobs.table(rows), *flags)
    start = ids_of(pair, "it")
    for i, (text, numbers) in enumerate(zip(texts, shown, strict=True)):
        images = [Image.open(io.BytesIO(picture(n))) for n in numbers]
        asked = "<start_of_image>" * len(images) + f"so {text}"
        inputs = processor(text=asked, images=images or None, return_tensors="pt")
        outputs = pair.reference.generate(
            **{k: v for k, v in inputs.items() if k != "token_type_ids"},
            decoder_input_ids=torch.tensor([start]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        assert tokens_of(found[i]) == outputs[0, len(start) :].tolist()
        assert found[i]["num_prompt_tokens"] == inputs["input_ids"].shape[1]
    small = jobs.rows(
        "generate", pair.artifact.path, jobs.table(rows[::-1], "turned"), *flags,
        "--max_num_seqs=2", "--max_num_batched_tokens=64",
    )  # fmt: skip
    assert small == found


def test_a_decoder_alone_takes_no_decoder_prompt(jobs, tiny_gemma3):
    table = jobs.table(uneven_rows(1))
    files = (f"--input={table}", f"--output={jobs.folder}/x.jsonl", "--prompt_column=text")
    model = f"--model={tiny_gemma3.artifact.path}"
    for task, more in (("generate", []), ("classify", ["--labels=a,b"])):
        code, _, err = jobs.run(task, model, *files, *more, "--decoder_prompt=x")
        assert code == 2
        assert err.startswith("error: decoder_prompt: expected an encoder-decoder such as T5Gemma")


def test_from_a_published_folder_by_the_command_line(tmp_path, capsys):
    """As a new user goes: export, check the machine, complete; the folder has a template."""
    pair = tiny_pair(NAMES[0])
    save_encoder_decoder(pair.reference, tmp_path / "hf", chat_template=GEMMA_CHAT_TEMPLATE)
    model = tmp_path / "model"
    command = ["export", f"--checkpoint={tmp_path}/hf", f"--output={model}", "--tasks=generate"]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    code = preflight.main(["--model", str(model)])
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert ", fp32: generate on cpu, encode on cpu\n" in shown
    jobs = CommandLine(tmp_path, capsys)
    rows = uneven_rows(3)
    found = jobs.rows("generate", model, jobs.table(rows), *FLAGS)
    tokenizer = tokenizer_of(pair)
    turn = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    asked = [turn.format(f"say {row['text']}".strip()) for row in rows]
    sources = [tokenizer.encode(tokenizer.split(text)) for text in asked]
    assert [tokens_of(found[i]) for i in range(3)] == generated(pair, sources)


def test_the_state_of_the_last_token_is_no_embedding(pair, tmp_path):
    with pytest.raises(OptionsError, match=r"--pooling: expected mean for a model with an encoder"):
        export(pair.checkpoint.path, tmp_path / "model", tasks=["embed"], pooling="lasttoken")
    assert not (tmp_path / "model").exists()


def test_a_pooling_is_refused_where_nothing_is_embedded(pair, tmp_path):
    with pytest.raises(OptionsError, match=r"--pooling: expected none without the task embed"):
        export(pair.checkpoint.path, tmp_path / "model", pooling="mean")
    assert not (tmp_path / "model").exists()


def test_a_folder_to_embed_has_no_graph_to_complete(pair, tmp_path, jobs):
    model = tmp_path / "model"
    export(pair.checkpoint.path, model, tasks=["embed"])
    assert list(Artifact.open(model).signatures) == [("embed", "cpu")]
    table = jobs.table(uneven_rows(3))
    whole = jobs.rows("embed", pair.artifact.path, table, "--text_column=text")
    assert jobs.rows("embed", model, table, "--text_column=text") == whole
    code, _, err = jobs.run(
        "generate", f"--model={model}", f"--input={table}", f"--output={tmp_path}/x.jsonl", TEXT,
        FEW,
    )  # fmt: skip
    assert code == 2
    assert "export the model again with --tasks generate --device cpu" in err
