"""ShieldGemma 2's policies for pictures, and the prompt that asks about one of them.

The guidelines are the default ones of `ShieldGemma2Processor` in transformers 5.23. The prompt is
the output of the chat template that comes with the checkpoint, as that processor applies it; for a
model folder without that template, it is the instruction of the model card
(https://ai.google.dev/gemma/docs/shieldgemma/model_card_2) in a turn of Gemma 3.
"""

import json

from beam_gemma.errors import OptionsError
from beam_gemma.inputs.chat_template import SPECIAL_TOKENS
from beam_gemma.inputs.template_sandbox import TemplateSandbox
from beam_gemma.inputs.traced_text import TEMPLATE, TracedText, plain
from beam_gemma.model.vision_config import BEGIN_TOKEN

PICTURE_GUIDELINES = {
    "dangerous": (
        "No Dangerous Content: The image shall not contain content that facilitates or encourages "
        "activities that could cause real-world harm (e.g., building firearms and explosive "
        "devices, promotion of terrorism, instructions for suicide)."
    ),
    "sexual": (
        "No Sexually Explicit content: The image shall not contain content that depicts explicit "
        "or graphic sexual acts (e.g., pornography, erotic nudity, depictions of rape or sexual "
        "assault)."
    ),
    "violence": (
        "No Violence/Gore content: The image shall not contain content that depicts shocking, "
        "sensational, or gratuitous violence (e.g., excessive blood and gore, gratuitous violence "
        "against animals, extreme injury or moment of death)."
    ),
}
"""Guideline of each published policy."""
_OF_SHIELD_GEMMA_2 = "BEGIN_SAFETY_POLICY"
"""Text that only the chat template of ShieldGemma 2 has."""
_INSTRUCTION = (
    "You are a policy expert trying to help determine whether a generated or real image is in "
    "violation of the safety policy below. Your decision must very clearly follow the specific "
    "language used in the safety policy and should not include any interpretation outside of the "
    "safety policy.\n\n<BEGIN_SAFETY_POLICY>\n{guideline}\n</END_SAFETY_POLICY>\n\nDoes the image "
    "violate the above policy? Your Answer must start with 'Yes' or 'No'."
)


def picture_prompt(guideline: str, column: str, chat_template: str | None) -> str:
    """Return the template that asks whether a picture violates a guideline.

    Args:
        guideline: The text of the policy.
        column: The column of the picture.
        chat_template: The model's own chat template, if it has one.

    Raises:
        OptionsError: that template is ShieldGemma 2's, and cannot be used.
    """
    if chat_template is not None and _OF_SHIELD_GEMMA_2 in chat_template:
        text = _rendered(chat_template, guideline)
    else:
        instruction = _INSTRUCTION.replace("{guideline}", guideline)
        asked = f"{BEGIN_TOKEN}{instruction}"
        text = f"<start_of_turn>user\n{asked}<end_of_turn>\n<start_of_turn>model\n"
    before, after = (_escaped(part) for part in text.split(BEGIN_TOKEN, 1))
    return f"{before}{{{json.dumps(column)}}}{after}"


def _rendered(chat_template: str, guideline: str) -> str:
    """Return the prompt of ShieldGemma 2's own template, which has one place for a picture."""
    content = [
        {"type": TracedText("image", TEMPLATE)},
        {"type": TracedText("text", TEMPLATE), "text": TracedText(guideline, TEMPLATE)},
    ]
    sandbox = TemplateSandbox()
    try:
        text = plain(
            sandbox.rendered(
                sandbox.compiled(chat_template),
                messages=[{"role": TracedText("user", TEMPLATE), "content": content}],
                add_generation_prompt=True,
                **SPECIAL_TOKENS,
            )
        )
    except Exception as error:  # a template may raise anything
        raise OptionsError(
            f"chat template: expected one that takes a picture and a policy, got: {error}"
        ) from error
    if text.count(BEGIN_TOKEN) != 1 or guideline not in text:
        raise OptionsError(
            f"chat template: expected one that writes {BEGIN_TOKEN} once, and the policy, got "
            f"{text[:300]!r}"
        )
    return text


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
