"""Classify and moderate rows: turn them into questions and requests, and return one result each.

Each row gets one question, or one per safety policy. A question becomes the fewest requests that
score all tokens of its labels. A row that fails reports the failure in its `error` column.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.errors import RecordError
from beam_gemma.inputs.row import Row
from beam_gemma.monitoring.progress import Count
from beam_gemma.tasks.encoded_rows import request_in
from beam_gemma.tasks.engine_model import EngineModel
from beam_gemma.tasks.moderate import ModerateSettings
from beam_gemma.tasks.questions import Answer, ClassifySettings, Question, QuestionEncoder

_NOTHING_NEW = SamplingParams(max_tokens=1)


@dataclass(eq=False, slots=True)
class _Pending:
    """A row whose requests the engine is processing."""

    index: int
    questions: list[Question]
    num_left: int
    """Number of unfinished requests."""
    futures: list[Future[Completion]] = field(default_factory=list)


class Classifier(EngineModel):
    """Classifies rows on an engine that many threads share."""

    def __init__(
        self,
        engine: Engine,
        encoders: Sequence[QuestionEncoder],
        settings: ClassifySettings | ModerateSettings,
        *,
        on_result: Callable[[Count], None],
    ) -> None:
        """Initialize the classifier.

        Args:
            engine: The engine that runs the model.
            encoders: One encoder per question of the settings.
            settings: The settings of the task.
            on_result: Called with a count of each row as soon as the row is done, from any thread.
                The engine counts tokens itself.
        """
        super().__init__(engine, settings, on_result=on_result)
        self._encoders = encoders
        self._settings = settings
        self._lock = threading.Lock()  # guards num_left of all rows

    def stream(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row's index and result columns as soon as they are known."""
        rows_or_errors = [self._pending(index, row) for index, row in enumerate(rows)]
        pending = [row for row in rows_or_errors if isinstance(row, _Pending)]
        requests = [request for row in pending for request in self._requests(row)]
        futures = iter(self._engine.submit(requests))
        for row in pending:
            row.futures = [next(futures) for _ in range(row.num_left)]
        done: SimpleQueue[_Pending] = SimpleQueue()
        for row in pending:
            for future in row.futures:
                future.add_done_callback(partial(self._count, row, done))
        for index, error in enumerate(rows_or_errors):
            if isinstance(error, str):
                yield index, self._failure(error)
        for _ in pending:
            row = done.get()
            with suppress(CancelledError):
                yield row.index, self._result(row)

    def _pending(self, index: int, row: Row) -> _Pending | str:
        """Return the row with its questions, or the error message if it makes none."""
        try:
            questions = request_in(row, self._asked, self._restored)
        except RecordError as error:
            return str(error)
        return _Pending(index, questions, sum(len(question.plan.paths) for question in questions))

    def _asked(self, row: Row) -> list[Question]:
        return [encoder(row) for encoder in self._encoders]

    def _restored(self, identities: list[Any]) -> list[Question]:
        return [
            encoder.restore(identity)
            for encoder, identity in zip(self._encoders, identities, strict=True)
        ]

    def _requests(self, row: _Pending) -> list[Request]:
        return [
            Request(
                request_id="score",
                prompt_token_ids=path.token_ids,
                params=_NOTHING_NEW,
                targets=path.targets,
                normalized=question.normalized,
            )
            for question in row.questions
            for path in question.plan.paths
        ]

    def _count(self, row: _Pending, done: SimpleQueue[_Pending], _: Future[Completion]) -> None:
        with self._lock:
            row.num_left -= 1
            if row.num_left:
                return
        done.put(row)
        if any(future.exception() is not None for future in row.futures):
            return
        failed = any(future.result().error is not None for future in row.futures)
        self._on_result(Count(rows=1, failed=int(failed)))

    def _result(self, row: _Pending) -> dict[str, Any]:
        completions = [future.result() for future in row.futures]
        prompts = [question.prompt for question in row.questions]
        result = dict.fromkeys(self._names)
        result["num_prompt_tokens"] = sum(len(prompt.token_ids) for prompt in prompts)
        if "truncated" in result:
            result["truncated"] = any(prompt.truncated for prompt in prompts)
        if errors := [c.error for c in completions if c.error is not None]:
            return result | {"error": errors[0]}
        scores = iter([completion.scores for completion in completions])
        answers = [
            Answer(question, question.plan.logliks([next(scores) for _ in question.plan.paths]))
            for question in row.questions
        ]
        return result | self._settings.result(answers)
