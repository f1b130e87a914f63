"""Questions about rows: prompts with labels as their possible continuations.

Labels are templates, as the prompt is. Shots are rows with a known label. They precede every prompt
in the same order, so that the shared beginning of all prompts is computed once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inputs.decoder_prompt import Decoder, decoder_prompts
from beam_gemma.inputs.prompt_encoder import PromptEncoder, Shots
from beam_gemma.inputs.prompt_settings import PromptSettings
from beam_gemma.inputs.row import ColumnUse, Prompt, Row, as_text, rows_own_errors, shots_own_errors
from beam_gemma.inputs.template import Template
from beam_gemma.model.markup import Part
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.model.vision_config import VisionConfig
from beam_gemma.tasks.interface import Settings
from beam_gemma.tasks.labels import Continuation, Plan, join, softmax

LabelNorm = Literal["none", "tokens", "chars"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """A row with a known label.

    Example:
        >>> shot = Shot(row={"text": "Lovely."}, label=0)
        >>> settings = ClassifySettings(
        ...     prompt="Review: {text} It was", labels=(" good", " bad"), shots=(shot,)
        ... )
    """

    row: Mapping[str, Any] | str
    label: int
    """Index of the row's label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt, and the labels that may continue it."""

    prompt: Prompt
    labels: tuple[str, ...]
    plan: Plan
    normalized: bool
    """True to score by log-likelihoods; False if logits suffice, as labels are single tokens."""

    @property
    def num_label_tokens(self) -> list[int]:
        """Number of each label's own tokens."""
        return [continuation.num_label_tokens for continuation in self.plan.continuations]

    @property
    def num_label_characters(self) -> list[int]:
        """Number of each label's characters, as lm-evaluation-harness counts them for acc_norm.

        White space at the start of a label separates it from the prompt and is not counted, unless
        the label is nothing else.
        """
        return [len(label.lstrip()) or len(label) for label in self.labels]

    @property
    def identity(self) -> list[Any]:
        """JSON-serializable value that is equal only for equal questions."""
        labels = [
            (text, label.start, label.token_ids)
            for text, label in zip(self.labels, self.plan.continuations, strict=True)
        ]
        return [self.prompt.identity, labels]


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's scores for a question."""

    question: Question
    logliks: list[float]
    """Log-likelihood per label. For single-token labels, possibly raw logits: the constant offset
    cancels in the softmax."""

    def scores(self, norm: LabelNorm) -> list[float]:
        """Return a probability for each label; they sum to 1 over the labels."""
        lengths = {
            "none": [1] * len(self.logliks),
            "tokens": self.question.num_label_tokens,
            "chars": self.question.num_label_characters,
        }[norm]
        return softmax([x / n for x, n in zip(self.logliks, lengths, strict=True)])


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifySettings(PromptSettings, Settings):
    """Settings of the classify task: which label continues each row's prompt best.

    Example:
        >>> settings = ClassifySettings(prompt="Review: {text} It was", labels=(" good", " bad"))
        >>> settings.result_schema.names[:2]
        ['label', 'label_index']
    """

    labels: tuple[str, ...]
    """Label templates, rendered per row so that a row can bring its own choices. Labels are scored
    exactly as written after the prompt, including a leading space."""
    label_norm: LabelNorm = "none"
    """Divisor of a label's log-likelihood before labels are compared: none, its number of tokens,
    or its number of characters without the white space that it begins with."""
    logliks: bool = False
    """True to return the log-likelihoods."""
    shots: tuple[Shot, ...] = ()
    """Rows with known labels, shown before each prompt in this order."""
    num_fewshot: int | None = None
    """Number of shots per prompt: the first ones other than the prompt's row; None for all. With
    one spare shot, a row that is itself a shot gets as many shots as other rows."""
    fewshot_delimiter: str = "\n\n"
    """Text after each shot, unless the prompt is a chat."""

    def __post_init__(self) -> None:
        PromptSettings.__post_init__(self)
        self._check_labels()
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise OptionsError(f"num_fewshot: expected at least 0, got {self.num_fewshot}")
        if self.shots and self.messages_column:
            raise OptionsError(
                "shots: expected prompts that they can come before, got a messages_column; "
                "make them its first messages"
            )
        for shot in self.shots:
            if not 0 <= shot.label < len(self.labels):
                raise OptionsError(
                    f"shots: expected labels from 0 to {len(self.labels) - 1}, got {shot.label}"
                )

    def _check_labels(self) -> None:
        if len(self.labels) < 2:
            raise OptionsError(f"labels: expected at least two, got {len(self.labels)}")
        for label in self.labels:
            if not label:
                raise OptionsError("labels: expected texts that are not empty, got an empty one")
            if self.labels.count(label) > 1:
                raise OptionsError(f"labels: expected each once, got {label!r} twice")
            of_files = {*self.image_columns, *self.audio_columns}
            for column in of_files.intersection(Template(label, ()).fields):
                raise OptionsError(f"labels: expected texts, got {column!r}, a column of files")

    @property
    def columns(self) -> dict[str, ColumnUse]:
        """Columns that the task reads."""
        fields = [name for label in self.labels for name in Template(label, ()).fields]
        uses: dict[str, ColumnUse] = dict.fromkeys(fields, "value")
        return uses | self.prompt_columns

    @property
    def result_schema(self) -> pa.Schema:
        """Columns that the task adds to each row."""
        columns = {
            "label": pa.string(),
            "label_index": pa.int64(),
            "scores": pa.list_(pa.float64()),
            "num_prompt_tokens": pa.int64(),
            "logliks": pa.list_(pa.float64()) if self.logliks else None,
            "truncated": pa.bool_() if self.truncate else None,
            "error": pa.string(),
        }
        return pa.schema([(name, kind) for name, kind in columns.items() if kind is not None])

    def _parameters(self) -> dict[str, Any]:
        return {"label_norm": self.label_norm}

    @property
    def questions(self) -> "tuple[ClassifySettings, ...]":
        """Settings of the questions for each row: a single question with these settings."""
        return (self,)

    def questions_for(self, _: str | None) -> "tuple[ClassifySettings, ...]":
        """Return the same question, whatever the model's chat template is."""
        return self.questions

    def result(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the result columns of a row that depend on its answers."""
        (answer,) = answers
        scores = answer.scores(self.label_norm)
        best = scores.index(max(scores))
        own = {"label": answer.question.labels[best], "label_index": best, "scores": scores}
        return own | ({"logliks": answer.logliks} if self.logliks else {})


class QuestionEncoder:
    """Turns rows into questions according to settings; needs a tokenizer but no weights."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: ClassifySettings,
        *,
        chat_template: str | None,
        max_model_len: int,
        vision: VisionConfig | None = None,
        sound: SoundConfig | None = None,
        vocab_size: int | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Initialize the encoder: parse the templates and render the shots.

        Args:
            tokenizer: The model's tokenizer.
            settings: The settings of the question.
            chat_template: The model's own chat template, if it has one.
            max_model_len: Maximum number of tokens that the model accepts, including labels; those
                of the source alone if there is a decoder apart.
            vision: The model's picture half; None if it has none.
            sound: The model's sound half; None if it has none.
            vocab_size: Number of token ids that the model knows; None for the tokenizer's.
            decoder: The decoder of an encoder-decoder, which scores the labels; None for other
                models.

        Raises:
            OptionsError: the model does not support the settings, or a shot cannot be rendered.
        """
        self._tokenizer = tokenizer
        self._columns = settings.columns
        self._needs_logliks = settings.logliks or settings.label_norm == "chars"
        self._start = decoder_prompts(
            tokenizer,
            settings.decoder_prompt,
            decoder,
            allow_special_tokens=settings.allow_special_tokens,
        )
        self._max_model_len = max_model_len if decoder is None else decoder.max_tokens
        self._labels = [
            Template(
                label,
                tokenizer.control_pieces,
                allow_special_tokens=settings.allow_special_tokens,
            )
            for label in settings.labels
        ]
        self._encoder = PromptEncoder(
            tokenizer,
            settings,
            chat_template=chat_template,
            max_tokens=max_model_len,
            shots=self._shots(settings),
            vision=vision,
            sound=sound,
            vocab_size=vocab_size,
            decoder=decoder,
        )

    def __call__(self, row: Row) -> Question:
        """Return the question for a row.

        Raises:
            RecordError: the row makes no prompt, lacks a label, has two equal labels, or has too
                many tokens.
        """
        if isinstance(row, str) and self._columns:
            raise RecordError(f"row: expected columns {', '.join(self._columns)}, got a text")
        with rows_own_errors():
            labels = [_written(template, row) for template in self._labels]
        texts = tuple(map(as_text, labels))
        if repeated := [text for text in texts if texts.count(text) > 1]:
            raise RecordError(f"labels: expected each once, got {repeated[0]!r} twice")
        room = max(len(self._tokenizer.encode(label, add_bos=False)) for label in labels)
        self._check_length(room + 1)
        prompt = self._encoder(row, num_answer_tokens=room)
        before = prompt.parts if self._start is None else prompt.decoder_parts
        joined = [join(self._tokenizer, before, label) for label in labels]
        self._check_length(max(len(continuation.token_ids) for continuation in joined))
        return self._question(prompt, texts, joined)

    def restore(self, identity: list[Any], files: Sequence[bytes] = ()) -> Question:
        """Return the question of an identity; its prompt has no parts.

        Args:
            identity: What `Question.identity` returned, also after a round trip through JSON.
            files: The files of the row's pictures and sounds.
        """
        prompt, labels = identity
        texts = tuple(text for text, _, _ in labels)
        joined = [Continuation(tuple(token_ids), start) for _, start, token_ids in labels]
        shots = self._encoder.shot_files
        return self._question(Prompt.of_identity(prompt, files, shots), texts, joined)

    def _question(
        self, prompt: Prompt, labels: tuple[str, ...], joined: Sequence[Continuation]
    ) -> Question:
        plan = Plan(joined)
        normalized = self._needs_logliks or not plan.is_one_choice
        return Question(prompt=prompt, labels=labels, plan=plan, normalized=normalized)

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self._max_model_len:
            before = "prompt" if self._start is None else "decoder prompt"
            raise RecordError(
                f"labels: expected at most {self._max_model_len:,} tokens with their {before}, got "
                f"{num_tokens:,}; shorten them or the {before}"
            )

    def _shots(self, settings: ClassifySettings) -> Shots:
        """Return the shots with their labels rendered."""
        with shots_own_errors():
            examples = tuple((shot.row, self._answer(shot)) for shot in settings.shots)
        return Shots(
            examples=examples,
            number=settings.num_fewshot,
            delimiter=settings.fewshot_delimiter,
        )

    def _answer(self, shot: Shot) -> tuple[Part, ...]:
        """Return the answer to a shot: its label, after what a decoder starts with."""
        start = () if self._start is None else self._start.parts(shot.row)
        return (*start, *_written(self._labels[shot.label], shot.row))


def _written(label: Template, row: Row) -> tuple[Part, ...]:
    return label.render({} if isinstance(row, str) else row)
