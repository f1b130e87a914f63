"""Pictures and sounds in the same rows: greedy tokens of transformers, in any company."""

import io

import numpy as np
import pytest
import soundfile
import torch
import transformers
from transformers.models.gemma4_unified import modeling_gemma4_unified

from beam_gemma.inputs.image_processor import ImageProcessor
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from export.__main__ import export
from tests.doubles.command_line import CommandLine
from tests.doubles.gemma4_hearing import BINS, FRAME
from tests.doubles.gemma4_omni import AUDIO, IMAGE, OMNI, omni_model, save_omni
from tests.doubles.gemma4_seeing import padded_pictures
from tests.doubles.seeing import picture

NEW_TOKENS, RATE, EOS, BOS = 8, 16_000, 1, 2
FLAGS = (
    "--audio_column=sound", "--image_column=photo", "--prompt=so {text}",
    f"--max_tokens={NEW_TOKENS}", "--token_ids", "--logprob",
    "--allow_missing_images", "--allow_missing_audio",
)  # fmt: skip


@pytest.fixture(scope="module", params=OMNI)
def omni(request, tmp_path_factory):
    """A reference model and the export of it."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = omni_model(request.param)
    export(save_omni(reference, folder / "hf"), folder / "model")
    return reference, Artifact.open(folder / "model")


def sound(number):
    rng = np.random.default_rng(number)
    return rng.uniform(-0.3, 0.3, int(rng.integers(700, 4000))).astype(np.float32)


def wav(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def extracted(artifact, sounds):
    """Return transformers' features of sounds with their mask, and the tokens of each."""
    if artifact.sound.mel is None:
        extractor = transformers.Gemma4UnifiedAudioFeatureExtractor(
            feature_size=FRAME, audio_samples_per_token=FRAME
        )
    else:
        extractor = transformers.Gemma4AudioFeatureExtractor(feature_size=BINS)
    found = extractor(sounds, return_tensors="pt")
    step = 1 if artifact.sound.mel is None else 4
    numbers = [int(mask[::step].sum()) for mask in found["input_features_mask"]]
    return dict(found), numbers


@pytest.fixture(autouse=True)
def own_masks(monkeypatch):
    """Have transformers' 12B mask pictures by its own function, as it does with a static cache.

    Otherwise its pictures attend both ways in full layers too, against that function's words.
    """
    masks = modeling_gemma4_unified.create_masks_for_vision_model
    monkeypatch.setattr(modeling_gemma4_unified, "create_masks_for_generate", masks)


@torch.no_grad()
def generated(omni, pictures, sounds, text):
    """Return transformers' greedy tokens after pictures, sounds and a text, with their logprob."""
    reference, artifact = omni
    inputs, ids = {}, [BOS]
    pixels = [ImageProcessor(artifact.vision).pixels(file)[0] for file in pictures]
    if pixels:
        inputs |= padded_pictures(reference, pixels)
    for one in pixels:
        begin, token, end = IMAGE
        ids += [begin, *[token] * artifact.vision.tokens_of(*one.shape[1:]), end]
    if sounds:
        features, numbers = extracted(artifact, sounds)
        inputs |= features
        for number in numbers:
            ids += [AUDIO[0], *[AUDIO[1]] * number, AUDIO[2]]
    ids += Tokenizer.from_file(artifact.tokenizer_path).encode([Text(text)], add_bos=False)
    kinds = [1 if i == IMAGE[1] else 3 if i == AUDIO[1] else 0 for i in ids]
    output = reference.generate(
        input_ids=torch.tensor([ids]), mm_token_type_ids=torch.tensor([kinds]), **inputs,
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = output.sequences[0, len(ids) :].tolist()
    steps = (logits[0].log_softmax(-1) for logits in output.logits)
    return tokens, sum(float(row[token]) for row, token in zip(steps, tokens, strict=True))


def test_greedy_tokens_of_rows_with_both_are_those_of_transformers(omni, tmp_path, capsys):
    jobs = CommandLine(tmp_path, capsys)
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number, (40 + 24 * number, 60)))
        (tmp_path / f"{number}.wav").write_bytes(wav(sound(number)))
    rows = [
        {
            "id": i,
            "text": "abcdefgh"[i % 8 :] * (1 + i % 3),
            "photo": [f"{n}.png" for n in range(i % 4)][: i % 3],
            "sound": [f"{(i + n) % 4}.wav" for n in range((i // 2) % 3)],
        }
        for i in range(16)
    ]
    found = jobs.rows("generate", omni[1].path, jobs.table(rows), *FLAGS)
    expected = []
    for row in rows:
        files = [(tmp_path / name).read_bytes() for name in row["photo"]]
        sounds = [sound(int(name[0])) for name in row["sound"]]
        expected.append(generated(omni, files, sounds, f"so {row['text']}"))
    got = [found[row["id"]] for row in rows]
    assert [each["error"] for each in got] == [None] * 16
    assert [
        each["completion_token_ids"] + [EOS] * (each["finish_reason"] == "stop") for each in got
    ] == [tokens for tokens, _ in expected]
    # float32, the sum over a completion.
    wanted = [logprob for _, logprob in expected]
    assert [each["logprob"] for each in got] == pytest.approx(wanted, abs=1e-4)
    assert min(np.diff(sorted(wanted))) > 1e-4, "each picture and each sound changes it"
    few = jobs.rows(
        "generate", omni[1].path, jobs.table(rows[::-1], "turned"), *FLAGS,
        "--max_num_seqs=2", "--max_num_batched_tokens=96",
    )  # fmt: skip
    assert few == found
