"""Flags of what a task does with pictures: boxes, policies and languages."""

import pytest

from beam_gemma.cli.classify_flags import classify_parser, classify_settings
from beam_gemma.cli.flags import parse
from beam_gemma.cli.generate_flags import generate_parser, generate_settings
from beam_gemma.errors import OptionsError
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.moderate import PICTURE_POLICIES, POLICIES, ModerateSettings, Policy

FILES = ["--model=m", "--input=a.jsonl", "--output=b.jsonl"]


def generate(*flags):
    return generate_settings(parse(generate_parser(), [*FILES, *flags])[0])


def classify(*flags):
    return classify_settings(parse(classify_parser(), [*FILES, *flags])[0])


def test_flags_of_boxes():
    wanted = GenerateSettings(
        prompt="detect {thing}", image_columns=("photo",), boxes=True, mask_decoder="m.npz"
    )
    flags = ("--prompt=detect {thing}", "--image_column=photo", "--boxes", "--mask_decoder=m.npz")
    assert generate(*flags) == wanted
    assert wanted.result_schema.field("boxes").type.value_type.field("mask").type == "binary"
    names = generate(*flags[:-1]).result_schema.names
    assert names[-3:] == ["boxes", "num_unreadable_boxes", "error"]
    assert "boxes" not in generate(*flags[:2]).result_schema.names


def test_flags_of_languages():
    wanted = GenerateSettings(prompt_column="text", source_lang="cs", target_lang="de-DE")
    assert generate("--prompt_column=text", "--source_lang=cs", "--target_lang=de-DE") == wanted
    of_pictures = generate("--image_column=sign", "--source_lang=cs", "--target_lang=de-DE")
    assert of_pictures.image_columns == ("sign",)


def test_policies_for_pictures(tmp_path):
    own = tmp_path / "logos.txt"
    own.write_text("No Logos: The image shall not show a brand.")
    flags = ("--image_column=photo", "--policy=all", f"--policy={own}", "--threshold=0.3")
    assert classify(*flags) == ModerateSettings(
        policies=(
            *(Policy(name=name) for name in PICTURE_POLICIES),
            Policy(name="logos", guideline=own.read_text()),
        ),
        image_columns=("photo",),
        threshold=0.3,
    )
    one = classify("--image_column=photo", "--policy=violence")
    assert [policy.name for policy in one.policies] == ["violence"]
    texts = classify("--prompt_column=text", "--policy=all")
    assert [policy.name for policy in texts.policies] == list(POLICIES)


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        (generate, ["--prompt=x", "--mask_decoder=m"], "mask_decoder: expected boxes beside it"),
        (generate, ["--prompt=x", "--boxes", "--choices=a,b"], "boxes: expected none beside"),
        (generate, ["--prompt_column=x", "--source_lang=cs"], "source_lang and target_lang"),
        (classify, ["--policy=all"], "--prompt_column or --image_column beside it, got none"),
        (
            classify,
            ["--policy=all", "--prompt_column=x", "--decoder_prompt=y"],
            "got --decoder_prompt",
        ),
        (
            classify,
            ["--policy=violence", "--prompt_column=x"],
            "policy 'violence': expected one of dangerous_content, .* for texts, .* for pictures",
        ),
        (
            classify,
            ["--policy=dangerous_content", "--image_column=x"],
            "expected one of dangerous, .* got a policy for texts; did you mean dangerous",
        ),
        (classify, ["--policy=violense", "--image_column=x"], "did you mean violence"),
        (
            classify,
            ["--policy=all", "--image_column=x", "--prompt_column=y"],
            "expected texts or pictures to judge",
        ),
        (
            classify,
            ["--policy=all", "--image_column=x", "--response_column=y"],
            "expected texts or pictures to judge",
        ),
        (classify, ["--policy=all", "--image_column=x", "--image_column=y"], "one column"),
        (classify, ["--policy=all", "--image_column=x", "--pan_and_scan"], "got --pan_and_scan"),
        (
            classify,
            ["--policy=all", "--image_column=x", "--allow_missing_images"],
            "got --allow_missing_images",
        ),
    ],
)
def test_flags_that_contradict_are_refused(settings, flags, message):
    with pytest.raises(OptionsError, match=message):
        settings(*flags)
