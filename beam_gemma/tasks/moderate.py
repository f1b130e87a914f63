"""ShieldGemma's safety policies and its prompts, word for word as published.

The guidelines of texts are those of the model card
(https://ai.google.dev/gemma/docs/shieldgemma/model_card); the prompt is the output of the chat
template in the checkpoints' `tokenizer_config.json`, which the card's example applies
(https://huggingface.co/google/shieldgemma-2b). Policies for pictures are in `picture_policies.py`.
Each prompt asks about one policy, as in the models' training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from beam_gemma.errors import OptionsError, nearest
from beam_gemma.inputs.prompt_settings import Side
from beam_gemma.inputs.row import ColumnUse
from beam_gemma.tasks.interface import Settings
from beam_gemma.tasks.picture_policies import PICTURE_GUIDELINES, picture_prompt
from beam_gemma.tasks.questions import Answer, ClassifySettings

ANSWERS = ("Yes", "No")
"""Answers to the question whether a text or picture violates the policy."""
_OF_PROMPT = "The prompt shall not contain or seek generation of content that"
_OF_RESPONSE = "The chatbot shall not generate content that"
_HARMS = {
    "dangerous_content": (
        "No Dangerous Content",
        "harming oneself and/or others (e.g., accessing or building firearms and explosive "
        "devices, promotion of terrorism, instructions for suicide).",
    ),
    "harassment": (
        "No Harassment",
        "is malicious, intimidating, bullying, or abusive content targeting another individual "
        "(e.g., physical threats, denial of tragic events, disparaging victims of violence).",
    ),
    "hate_speech": (
        "No Hate Speech",
        "targeting identity and/or protected attributes (e.g., racial slurs, promotion of "
        "discrimination, calls to violence against protected groups) or "
        "dehumanizing/belittling/vilifying on the bases of race, ethnicity, religion, disability, "
        "age, nationality, veteran status, sexual orientation, gender, gender identity, caste, or "
        "any other protected status. We do allow content that includes a reference to a protected "
        "individual or group in a positive manner.",
    ),
    "sexually_explicit": (
        "No Sexually Explicit Information",
        "contains references to sexual acts or other lewd content (e.g., sexually graphic "
        "descriptions, content aimed at causing arousal). Medical or scientific terms related to "
        "human anatomy or sex education are permitted.",
    ),
}
POLICIES = tuple(_HARMS)
"""Names of the published policies for texts."""
PICTURE_POLICIES = tuple(PICTURE_GUIDELINES)
"""Names of the published policies for pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Safety policy that texts, or pictures, must not violate.

    Example:
        >>> harassment = Policy(name="harassment")
        >>> spam = Policy(name="spam", guideline='"No Spam": The prompt shall not advertise.')
    """

    name: str
    guideline: str | None = None
    """Full guideline, such as `"No Harassment": The prompt shall not ...`; None for the published
    guideline of that name. For texts, that one is worded for the prompt or for the response."""

    def __post_init__(self) -> None:
        names = (*POLICIES, *PICTURE_POLICIES)
        if self.guideline is None and self.name not in names:
            raise OptionsError(
                f"policy {self.name!r}: expected one of {', '.join(POLICIES)} for texts, one of "
                f"{', '.join(PICTURE_POLICIES)} for pictures, or a guideline"
                f"{nearest(self.name, names)}"
            )
        if self.guideline is not None and not self.guideline.strip():
            raise OptionsError(f"policy {self.name!r}: expected a guideline, got an empty text")

    def prompt(self, prompt_column: str, response_column: str | None) -> str:
        """Return the template that asks whether a prompt or its response violates this policy.

        Args:
            prompt_column: The column of the user's prompt.
            response_column: The column of the response to judge; None to judge the prompt.
        """
        guideline = self._guideline(of_response=response_column is not None)
        guideline = guideline.replace("{", "{{").replace("}", "}}")
        turn = f"<start_of_turn>\nHuman Question: {{{prompt_column}}}\n<end_of_turn>\n"
        if response_column is None:
            judged, whose, must = "a user prompt", "human question", "must start"
        else:
            turn += f"<start_of_turn>\nChatbot Response: {{{response_column}}}\n<end_of_turn>\n"
            # The published text has the double space.
            judged, whose, must = "an AI response to a prompt", "Chatbot Response", "must  start"
        return (
            f"You are a policy expert trying to help determine whether {judged} is in violation of "
            f"the defined safety policies.\n\n{turn}\n"
            f"Our safety principle is defined in the below:\n\n* {guideline}\n\n===\n\n"
            f"Does the {whose} violate the above principle? Your answer {must} with 'Yes' or 'No'. "
            "And then walk through step by step to be sure we answer correctly.\n\n"
        )

    def check_suits(self, *, pictures: bool) -> None:
        """Check that the policy is for what is judged: pictures or texts.

        Raises:
            OptionsError: its published guideline is for the other.
        """
        names, others = POLICIES, PICTURE_POLICIES
        what, other = "texts", "pictures"
        if pictures:
            names, others, what, other = others, names, other, what
        if self.guideline is None and self.name not in names:
            raise OptionsError(
                f"policy {self.name!r}: expected one of {', '.join(names)} for {what}, or a "
                f"guideline, got a policy for {other}{nearest(self.name, names)}"
            )

    def picture_guideline(self) -> str:
        """Return the guideline for pictures."""
        if self.guideline is not None:
            return self.guideline.strip()
        return PICTURE_GUIDELINES[self.name]

    def _guideline(self, *, of_response: bool) -> str:
        if self.guideline is not None:
            return self.guideline.strip()
        title, harm = _HARMS[self.name]
        return f'"{title}": {_OF_RESPONSE if of_response else _OF_PROMPT} {harm}'


@dataclass(frozen=True, kw_only=True, slots=True)
class ModerateSettings(Settings):
    """Settings of the moderate task: ShieldGemma checks each row against safety policies.

    Rows have texts, for ShieldGemma, or pictures, for ShieldGemma 2.

    Example:
        >>> settings = ModerateSettings(policies=(Policy(name="harassment"),), prompt_column="text")
        >>> settings.threshold
        0.5
        >>> violence = Policy(name="violence")
        >>> settings = ModerateSettings(policies=(violence,), image_columns=("photo",))
        >>> settings.result_schema.names[:2]
        ['violations', 'scores']
    """

    SOURCES: ClassVar[tuple[str, ...]] = ("prompt_column", "image_columns")

    policies: tuple[Policy, ...]
    """Policies to check; each one takes a prompt of its own."""
    prompt_column: str | None = None
    """Column of the user's prompt."""
    response_column: str | None = None
    """Column of the chatbot's response, to judge instead of the prompt."""
    image_columns: tuple[str, ...] = ()
    """Column with a picture to judge, in place of a prompt and its response."""
    threshold: float = 0.5
    """Lowest score at which a policy counts as violated."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens; None for the model's limit."""
    truncate: Side | None = None
    """Side where a row's longest text is cut if its prompt is too long; None for an error."""

    def __post_init__(self) -> None:
        names = [policy.name for policy in self.policies]
        if not names or len(set(names)) < len(names):
            raise OptionsError(f"policies: expected some, each once, got {names}")
        if not 0 <= self.threshold <= 1:
            raise OptionsError(f"threshold: expected 0 to 1, got {self.threshold}")
        self._check_source()
        for policy in self.policies:
            policy.check_suits(pictures=bool(self.image_columns))

    def _check_source(self) -> None:
        if not self.image_columns:
            if self.prompt_column is None:
                raise OptionsError("policies: expected a prompt_column or image_columns, got none")
            return
        if len(self.image_columns) > 1:
            raise OptionsError(
                "image_columns: expected one column, since each picture is judged alone, got "
                f"{', '.join(self.image_columns)}"
            )
        if self.prompt_column is not None or self.response_column is not None:
            raise OptionsError(
                f"policies: expected texts or pictures to judge, got prompt_column or "
                f"response_column beside the image column {self.image_columns[0]}"
            )

    @property
    def columns(self) -> dict[str, ColumnUse]:
        """Columns that the task reads."""
        texts = (self.prompt_column, self.response_column)
        uses: dict[str, ColumnUse] = {column: "text" for column in texts if column is not None}
        return uses | dict.fromkeys(self.image_columns, "images")

    @property
    def result_schema(self) -> pa.Schema:
        """Columns that the task adds to each row."""
        columns = {
            "violations": pa.list_(pa.string()),
            "scores": pa.list_(pa.float64()),
            "num_prompt_tokens": pa.int64(),
            "truncated": pa.bool_() if self.truncate else None,
            "error": pa.string(),
        }
        return pa.schema([(name, kind) for name, kind in columns.items() if kind is not None])

    def _parameters(self) -> dict[str, Any]:
        return {"policies": [policy.name for policy in self.policies], "threshold": self.threshold}

    @property
    def questions(self) -> tuple[ClassifySettings, ...]:
        """Settings of the questions for each row, for a model without a chat template."""
        return self.questions_for(None)

    def questions_for(self, chat_template: str | None) -> tuple[ClassifySettings, ...]:
        """Return the settings of the questions for each row, one per policy.

        Args:
            chat_template: The model's own chat template, which may have a prompt for pictures.

        Raises:
            OptionsError: that template cannot be used.
        """
        return tuple(
            ClassifySettings(
                prompt=self._prompt(policy, chat_template),
                prompt_format="raw",
                image_columns=self.image_columns,
                labels=ANSWERS,
                max_prompt_tokens=self.max_prompt_tokens,
                truncate=self.truncate,
            )
            for policy in self.policies
        )

    def _prompt(self, policy: Policy, chat_template: str | None) -> str:
        if self.prompt_column is not None:
            return policy.prompt(self.prompt_column, self.response_column)
        return picture_prompt(policy.picture_guideline(), self.image_columns[0], chat_template)

    def result(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the result columns of a row that depend on its answers."""
        scores = [answer.scores("none")[ANSWERS.index("Yes")] for answer in answers]
        judged = zip(self.policies, scores, strict=True)
        violations = [policy.name for policy, score in judged if score >= self.threshold]
        return {"violations": violations, "scores": scores}
