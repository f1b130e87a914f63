"""Sounds in whole jobs: greedy tokens of transformers, the same in any company, errors on rows."""

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import transformers

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from export.__main__ import export
from tests.doubles.command_line import CommandLine
from tests.doubles.gemma4_hearing import (
    AUDIO_ID,
    BEGIN_ID,
    BINS,
    END_ID,
    FRAME,
    USM_OFFSET,
    VOCAB,
    hearing_model,
    save_hearing,
)

NUM_ROWS, NEW_TOKENS = 64, 8
RATE = 16_000
PAD, EOS, BOS = 0, 1, 2
FLAGS = ("--audio_column=recording", f"--max_tokens={NEW_TOKENS}", "--token_ids", "--logprob")
SAYS = "--prompt={recording} say {text}"


class Hearing:
    """A tiny model that hears: transformers' own, our export, and the processor of its sounds."""

    def __init__(self, name: str, folder: Any) -> None:
        self.reference: Any = hearing_model(name)
        if name == "gemma3n":
            # transformers would embed them by what it has for pictures and sound.
            self.reference.generation_config.suppress_tokens = [*range(USM_OFFSET - 4, VOCAB)]
        export(save_hearing(self.reference, folder / "hf"), folder / "model")
        self.artifact = Artifact.open(folder / "model")
        self.path = self.artifact.path
        self.tokenizer = Tokenizer.from_file(self.artifact.tokenizer_path)
        self.has_tower = name != "gemma4_unified"
        self.is_fixed = name == "gemma3n"
        self.max_samples = 4_000 if name == "gemma4_unified" else 2 * RATE
        """Most samples of the tests' sounds; without a tower, 64 of them are a token."""
        self.extractor = {
            "gemma3n": lambda: transformers.Gemma3nAudioFeatureExtractor(feature_size=BINS),
            "gemma4_e2b": lambda: transformers.Gemma4AudioFeatureExtractor(feature_size=BINS),
            "gemma4_unified": lambda: transformers.Gemma4UnifiedAudioFeatureExtractor(
                feature_size=FRAME, audio_samples_per_token=FRAME
            ),
        }[name]()

    def text_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode([Text(text)], add_bos=False)

    def inputs(self, sounds: list[np.ndarray], text: str) -> dict[str, torch.Tensor]:
        """Return transformers' inputs for sounds before a text."""
        ids, features = [BOS], {}
        if sounds:
            # Clip by clip, as what Gemma 3n's extractor makes of one depends on the others.
            found = [self.extractor([each], return_tensors="pt") for each in sounds]
            features = {name: _padded([each[name][0] for each in found]) for name in found[0]}
        before = ""  # texts that meet are tokenized as one
        for index in range(len(sounds)):
            if self.is_fixed:
                ids += self.text_ids(f"{before}\n\n")
                ids += [BEGIN_ID, *[USM_OFFSET + 1] * 188, USM_OFFSET]
                before = "\n\n"
                continue
            mask = features["input_features_mask"][index]
            number = int((mask[::4] if self.has_tower else mask).sum())
            ids += [BEGIN_ID, *[AUDIO_ID] * number, END_ID]
        ids += self.text_ids(before + text)
        return {"input_ids": torch.tensor([ids]), **features}

    @torch.no_grad()
    def generated(self, sounds: list[np.ndarray], text: str) -> tuple[list[int], int]:
        """Return what transformers generates, with the end token, and the size of the prompt."""
        inputs = self.inputs(sounds, text)
        output = self.reference.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS, pad_token_id=PAD
        )
        size = inputs["input_ids"].shape[1]
        return output[0, size:].tolist(), size


def _padded(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


@pytest.fixture(scope="module", params=["gemma4_e2b", "gemma4_unified", "gemma3n"])
def hearing(request, tmp_path_factory):
    return Hearing(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def jobs(tmp_path, capsys):
    return CommandLine(tmp_path, capsys)


def sound(number: int, max_samples: int = 2 * RATE) -> np.ndarray:
    """Return one of 12 sounds of 0.1 to 2 seconds in float32, or its beginning."""
    rng = np.random.default_rng(number % 12)
    noise = rng.standard_normal(int(rng.integers(RATE // 10, 2 * RATE)))
    tone = np.sin(np.arange(len(noise)) * rng.uniform(0.02, 0.5))
    return (0.2 * tone + 0.05 * noise).astype(np.float32)[:max_samples]


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def uneven_rows(folder: Any, max_samples: int, number: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Return rows with 0 to 2 sounds, in files of a folder, and texts of 1 to 40 letters."""
    rng = np.random.default_rng(3)
    for i in range(12):
        (folder / f"{i}.wav").write_bytes(wav(sound(i, max_samples)))
    letters = [*"abcdefghijklmnopqrstuvwxyz  "]
    return [
        {
            "id": i,
            "text": "".join(rng.choice(letters, int(rng.integers(1, 40)))),
            "recording": [f"{n}.wav" for n in rng.integers(0, 12, i % 3).tolist()],
        }
        for i in range(number)
    ]


def tokens_of(row: dict[str, Any]) -> list[int]:
    """Return the tokens of a completion, with the end token."""
    assert row["error"] is None, row
    return row["completion_token_ids"] + [EOS] * (row["finish_reason"] == "stop")


def test_greedy_tokens_of_64_rows_are_those_of_transformers(hearing, jobs):
    rows = uneven_rows(jobs.folder, hearing.max_samples)
    flags = (*FLAGS, SAYS, "--allow_missing_audio")
    found = jobs.rows("generate", hearing.path, jobs.table(rows), *flags)
    told = set()
    for row in rows:
        numbers = [int(name.split(".")[0]) for name in row["recording"]]
        sounds = [sound(number, hearing.max_samples) for number in numbers]
        tokens, size = hearing.generated(sounds, f" say {row['text']}")
        assert found[row["id"]]["num_prompt_tokens"] == size
        assert tokens_of(found[row["id"]]) == tokens, row
        told.add(tuple(tokens))
    assert len(told) > 20


WAYS = {
    "few at once": ["--max_num_seqs=3", "--max_num_batched_tokens=16"],
    "alone": ["--max_num_seqs=1"],
}


def test_a_row_is_worth_the_same_however_it_is_run(hearing, jobs):
    rows = uneven_rows(jobs.folder, hearing.max_samples, 24)
    flags = (*FLAGS, SAYS, "--allow_missing_audio", "--temperature=3", "--key_column=id")
    plain = jobs.rows("generate", hearing.path, jobs.table(rows), *flags)
    assert len({row["completion"] for row in plain.values()}) > 12
    turned = jobs.table(rows[::-1], "turned")
    for name, more in WAYS.items():
        assert jobs.rows("generate", hearing.path, turned, *flags, *more) == plain, name


@pytest.fixture(scope="module")
def ears(tmp_path_factory):
    """A model like Gemma 4 E2B."""
    return Hearing("gemma4_e2b", tmp_path_factory.mktemp("ears"))


def test_all_forms_of_a_sound_have_the_same_result(ears, jobs):
    data = wav(sound(1))
    (jobs.folder / "1.wav").write_bytes(data)
    kinds = {
        "bytes": ([data], pa.binary()),
        "paths": (["1.wav"], pa.string()),
        "datasets": (
            [{"bytes": data, "path": "x.wav"}],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "decoded": (
            [{"array": sound(1).tolist(), "sampling_rate": RATE}],
            pa.struct([("array", pa.list_(pa.float64())), ("sampling_rate", pa.int64())]),
        ),
        "list": ([[data]], pa.list_(pa.binary())),
    }
    results = {}
    for name, (values, kind) in kinds.items():
        table = pa.table({"id": [1], "text": ["so"], "recording": pa.array(values, kind)})
        pq.write_table(table, path := jobs.folder / f"{name}.parquet")
        row = jobs.rows("generate", ears.path, path, *FLAGS, SAYS)[1]
        results[name] = (row["completion"], row["logprob"], row["error"])
    assert len(set(results.values())) == 1
    assert results["bytes"][2] is None


def test_bad_sounds_are_errors_of_their_rows(ears, jobs):
    good, silence = wav(sound(2)), np.zeros(31 * RATE, np.float32)
    files = {
        "good.wav": good,
        "text.wav": b"no sound at all",
        "cut.wav": good[:30],
        "empty.wav": b"",
        "short.wav": wav(np.zeros(40, np.float32)),
        "long.wav": wav(silence),
    }
    for name, data in files.items():
        (jobs.folder / name).write_bytes(data)
    names = [*files, "none.wav", "http://a.b/c.wav", None]
    rows = [{"id": i, "text": "so", "recording": name} for i, name in enumerate(names)]
    found = jobs.rows("generate", ears.path, jobs.table(rows), *FLAGS, SAYS)
    errors = {name: found[i]["error"] for i, name in enumerate(names)}
    alone = jobs.rows("generate", ears.path, jobs.table(rows[:1], "alone"), *FLAGS, SAYS)
    assert alone[0] == found[0]
    assert errors.pop("good.wav") is None
    assert all(error.startswith("column 'recording': expected") for error in errors.values())
    assert "30 s" in errors["long.wav"]
    assert "none at 'none.wav'" in errors["none.wav"]
    assert "web servers" in errors["http://a.b/c.wav"]
    assert "got null" in errors[None]


# Two clips of 15 seconds have more tokens than positions in the other tiny models.
@pytest.mark.parametrize("hearing", ["gemma3n"], indirect=True)
def test_a_long_sound_is_split_into_clips_on_request(hearing, jobs):
    parts = [sound(5)] * 40
    long = np.concatenate(parts)[: 31 * RATE]
    (jobs.folder / "long.wav").write_bytes(wav(long))
    rows = [{"id": 1, "text": "so", "recording": "long.wav"}]
    found = jobs.rows("generate", hearing.path, jobs.table(rows), *FLAGS, SAYS, "--split_audio")
    row = found[1]
    halves = [long[: len(long) // 2], long[len(long) // 2 :]]
    tokens, size = hearing.generated(halves, " say so")
    assert (tokens_of(row), row["num_prompt_tokens"]) == (tokens, size)


def test_equal_sounds_are_asked_once_and_a_job_resumes(ears, jobs):
    (jobs.folder / "a.wav").write_bytes(wav(sound(3)))
    (jobs.folder / "b.wav").write_bytes(wav(sound(3)))
    (jobs.folder / "c.wav").write_bytes(wav(sound(4)))
    rows = [{"id": i, "text": "so", "recording": f"{'abc'[i % 3]}.wav"} for i in range(9)]
    table, out = jobs.table(rows), jobs.folder / "out"
    flags = (f"--model={ears.path}", f"--input={table}", f"--output={out}/x.jsonl", *FLAGS, SAYS)
    code, _, err = jobs.run("generate", *flags)
    assert code == 0, err
    record = json.loads((out / "_x.run.json").read_text())
    [task] = record["tasks"]
    assert (task["requests"], task["duplicate_rows"]) == (2, 7)
    code, told, err = jobs.run("generate", *flags, "--resume")
    assert code == 0, err
    assert "whole" in told + err


def test_labels_are_scored_after_a_sound(ears, jobs):
    (jobs.folder / "a.wav").write_bytes(wav(sound(7)))
    rows = [{"id": 1, "recording": "a.wav"}]
    flags = ("--audio_column=recording", "--prompt={recording} so:", "--label= no", "--label= yes")
    found = jobs.rows("classify", ears.path, jobs.table(rows), *flags, "--logliks")[1]
    inputs = ears.inputs([sound(7)], " so:")
    for label, got in zip((" no", " yes"), found["logliks"], strict=True):
        ids = ears.text_ids(f" so:{label}")[len(ears.text_ids(" so:")) :]
        whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
        with torch.no_grad():
            logits = ears.reference(**{**inputs, "input_ids": whole}).logits[0].log_softmax(-1)
        start = inputs["input_ids"].shape[1] - 1
        expected = sum(float(logits[start + i, token]) for i, token in enumerate(ids))
        # float32, the sum over a label's tokens.
        assert got == pytest.approx(expected, abs=1e-4)


def test_a_model_without_ears_refuses_the_flag(tiny, jobs):
    table = jobs.table([{"id": 1, "text": "so", "recording": "a.wav"}])
    code, _, err = jobs.run(
        "generate", f"--model={tiny.artifact.path}", f"--input={table}",
        f"--output={jobs.folder}/o/x.jsonl", *FLAGS, SAYS,
    )  # fmt: skip
    assert code == 2
    assert "audio_columns: expected a model that takes sounds" in err
