"""Classify and moderate rows: turn them into questions and requests, and return one result each.

Each row gets one question, or one per safety policy. A question becomes the fewest requests that
score all tokens of its labels. A row that fails reports the failure in its `error` column.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.inputs.row import Row
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.vision_config import VisionConfig
from beam_gemma.monitoring.progress import Count
from beam_gemma.tasks.encoded_rows import request_in
from beam_gemma.tasks.engine_model import EngineModel
from beam_gemma.tasks.media_requests import Work
from beam_gemma.tasks.moderate import ModerateSettings
from beam_gemma.tasks.questions import Answer, ClassifySettings, Question, QuestionEncoder

_NOTHING_NEW = SamplingParams(max_tokens=1)


@dataclass(eq=False, slots=True, kw_only=True)
class _Asking(Work):
    """A row whose requests the engine is processing."""

    questions: list[Question]


class Classifier(EngineModel[_Asking]):
    """Classifies rows on an engine that many threads share."""

    def __init__(
        self,
        engine: Engine,
        encoders: Sequence[QuestionEncoder],
        settings: ClassifySettings | ModerateSettings,
        *,
        vision: VisionConfig | None = None,
        sound: SoundConfig | None = None,
        on_result: Callable[[Count], None],
    ) -> None:
        """Initialize the classifier.

        Args:
            engine: The engine that runs the model.
            encoders: One encoder per question of the settings.
            settings: The settings of the task.
            vision: The model's picture half; None if it has none.
            sound: The model's sound half; None if it has none.
            on_result: Called with a count of each row as soon as the row is done, from any thread.
                The engine counts tokens itself.
        """
        super().__init__(engine, settings, vision=vision, sound=sound, on_result=on_result)
        self._encoders = encoders
        self._settings = settings

    def _work(self, index: int, row: Row) -> _Asking:
        questions = request_in(row, self._asked, self._restored)
        asked = [(question.prompt, request) for question, request in _requests(questions)]
        return _Asking(index=index, asked=asked, questions=questions)

    def _asked(self, row: Row) -> list[Question]:
        return [encoder(row) for encoder in self._encoders]

    def _restored(self, identities: list[Any], images: Sequence[bytes]) -> list[Question]:
        return [
            encoder.restore(identity, images)
            for encoder, identity in zip(self._encoders, identities, strict=True)
        ]

    def _result(self, work: _Asking) -> dict[str, Any]:
        completions = [future.result() for future in work.futures]
        prompts = [question.prompt for question in work.questions]
        result = dict.fromkeys(self._names)
        result["num_prompt_tokens"] = sum(len(prompt.token_ids) for prompt in prompts)
        if "truncated" in result:
            result["truncated"] = any(prompt.truncated for prompt in prompts)
        if errors := [c.error for c in completions if c.error is not None]:
            return result | {"error": errors[0]}
        scores = iter([completion.scores for completion in completions])
        answers = [
            Answer(question, question.plan.logliks([next(scores) for _ in question.plan.paths]))
            for question in work.questions
        ]
        return result | self._settings.result(answers)


def _requests(questions: Iterable[Question]) -> Iterator[tuple[Question, Request]]:
    """Yield the requests of a row, each with its question."""
    for question in questions:
        for path in question.plan.paths:
            yield (
                question,
                Request(
                    request_id="score",
                    prompt_token_ids=path.token_ids,
                    source_token_ids=question.prompt.source_token_ids,
                    params=_NOTHING_NEW,
                    targets=path.targets,
                    normalized=question.normalized,
                ),
            )
