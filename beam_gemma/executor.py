"""Runs steps and gives each sequence its next token; what goes wrong ends only the rows at fault.

An exception of the session. Nothing of the step counts as computed. The step is cut in two parts,
which are tried in order, so that whoever computes a shared block still comes before those that read
it; and so on, down to a block of a prompt, since half a chunk needs half the memory. What can be
cut no smaller and fails twice ends its row. Recurrent state is not what it was before the step, so
there all sequences of the step are preempted, and computed anew one at a time: what fails alone is
at fault.

A row that is not finite. Its values follow from its own tokens, unless it has read blocks of other
sequences, which a NaN may have reached from what came later there. So a row with such blocks is
computed once more, alone and on blocks of its own; without them, it ends.

A failed row is an error only once a later step has proven that the device is alive; where no work
is left, a step of one token for nobody. Where several rows fail with no success between them, it is
the device that failed, and the engine must stop.
"""

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np

from beam_gemma.errors import RecordError
from beam_gemma.guide import MaskMaker, MaskOf
from beam_gemma.kv_cache import KVCache
from beam_gemma.next_token import draw, draw_within, wants_logits, wants_mask
from beam_gemma.packing import pack
from beam_gemma.runner import Runner, ScoreOutput, StepOutput
from beam_gemma.sampling import SamplingParams
from beam_gemma.scheduler import Scheduler
from beam_gemma.sequence import Completion, FinishReason, Request, Sequence, Status, Step

MAX_FAILURES_IN_A_ROW = 3
"""Rows that may fail one after another, with no step between them that succeeds."""
PROBE = Request(request_id="probe", prompt_token_ids=(0,), params=SamplingParams(max_tokens=1))
Finished = tuple[Sequence, Completion]


class Executor:
    """Takes scheduled steps through the session."""

    def __init__(
        self,
        session: Runner,
        cache: KVCache,
        scheduler: Scheduler,
        *,
        on_run: Callable[[Step, int], None],
    ) -> None:
        """Join what a step needs.

        Args:
            session: Runs the steps.
            cache: Has the blocks of each step in place.
            scheduler: Made the steps; hears which sequences end or must start anew.
            on_run: Called after each run with what it computed and the number of new tokens.
        """
        self._session = session
        self._cache = cache
        self._scheduler = scheduler
        self._on_run = on_run
        self._mask_maker = MaskMaker()
        self._finished: list[Finished] = []
        self._failed: list[Finished] = []  # since a run last succeeded

    def execute(self, step: Step) -> list[Finished]:
        """Run a step, in parts if need be; return the sequences that ended.

        Raises:
            Exception: the session's own, once it fails whatever it is given.
        """
        self._run(step, is_retry=False)
        if self._failed and not self._scheduler.has_unfinished:
            self._prove_alive()
        finished, self._finished = self._finished, []
        return finished

    def _prove_alive(self) -> None:
        """Compute one token for nobody; the session's exception if it cannot even do that."""
        probe = Sequence(PROBE, frozenset())
        self._scheduler.add([probe])
        self._session.start(self._feeds(self._scheduler.schedule())).result()
        self._scheduler.finish(probe, clean=False)
        self._settle()

    def _run(self, step: Step, *, is_retry: bool) -> None:
        # A part that failed may have ended sequences of this one, or made them start anew.
        step = tuple(item for item in step if item[0].status is Status.RUNNING)
        if not step:
            return
        signature = self._session.signature
        rows = [sequence for sequence, n in step if n == sequence.num_pending_tokens]
        with_logits = any(wants_logits(s, signature.candidates) for s in rows)
        feeds = self._feeds(step)
        mask_of = self._begin_masks(rows)
        try:
            output = self._session.start(feeds, with_logits=with_logits).result()
        except Exception as error:  # a device may raise anything; only the rows at fault may end
            self._recover(step, error, is_retry=is_retry)
            return
        self._settle()
        if isinstance(output, ScoreOutput):
            self._on_run(step, 0)
            self._score(step, _scores(feeds, output))
            return
        self._on_run(step, _num_completion_tokens(step))
        for sequence, num_new_tokens in step:
            sequence.num_computed_tokens += num_new_tokens
        if rows:
            self._choose(rows, output, mask_of)

    def _feeds(self, step: Step) -> dict[str, np.ndarray]:
        """Return the inputs of a step, all blocks of which are finite from here on."""
        for group, blocks in self._cache.take_unclean().items():
            self._session.zero_blocks(group, blocks)
        return pack(step, self._session.signature, self._cache)

    def _begin_masks(self, rows: list[Sequence]) -> MaskOf:
        """Have masks that are sure to be needed made while the model runs."""
        candidates = self._session.signature.candidates
        guides = [row.guide for row in rows if row.guide and wants_mask(row, candidates)]
        return self._mask_maker.begin(guides)

    def _settle(self) -> None:
        """Let go of failed rows: they were at fault, not the device."""
        self._finished += self._failed
        self._failed = []

    def _recover(self, step: Step, error: Exception, *, is_retry: bool) -> None:
        """Try again what failed, in parts; end a row that can fail no smaller."""
        if self._session.signature.has_recurrent_state:
            if not step[0][0].isolated:
                for sequence, _ in reversed(step):
                    self._scheduler.preempt(sequence, clean=False, isolated=True)
                return
        elif parts := self._halves(step) or ([] if is_retry else [step]):
            for part in parts:
                self._run(part, is_retry=True)
            return
        sequence = step[0][0]
        self._scheduler.finish(sequence, clean=False)
        message = f"model: step failed: {type(error).__name__}: {error}"
        self._failed.append((sequence, failure(message)))
        if len(self._failed) == MAX_FAILURES_IN_A_ROW:
            raise error

    def _halves(self, step: Step) -> list[Step]:
        """Return a step in two parts, or nothing if it cannot be cut."""
        if len(step) > 1:
            return [step[: len(step) // 2], step[len(step) // 2 :]]
        sequence, num_new_tokens = step[0]
        middle = sequence.middle(num_new_tokens, self._session.signature.block_size)
        if not middle:
            return []
        # The first part's tables name the blocks of the second, where the failed run may have been.
        self._cache.wipe(sequence.slot, sequence.num_computed_tokens + middle)
        return [((sequence, middle),), ((sequence, num_new_tokens - middle),)]

    def _choose(self, rows: list[Sequence], output: StepOutput, mask_of: MaskOf) -> None:
        """Give each row its next token."""
        assert output.topk_ids is not None
        assert output.topk_logits is not None
        best = zip(output.topk_ids[:, 0].tolist(), output.topk_logits[:, 0].tolist(), strict=True)
        probabilities = iter(output.top_probability.tolist())
        for row, (sequence, (token_id, top_logit)) in enumerate(zip(rows, best, strict=True)):
            probability = next(probabilities) if sequence.request.logprob else 1.0
            if not (math.isfinite(top_logit) and probability > 0):
                self._refuse(sequence)
                continue
            sequence.isolated = False
            logit = top_logit
            if sequence.guide is not None:
                token_id, logit = draw_within(sequence, output, row, mask_of)
            elif sequence.request.params.temperature > 0:
                token_id, logit = draw(sequence, output, row)
            self._accept(sequence, token_id, logit - top_logit + math.log(probability))

    def _score(self, step: Step, scores: list[float]) -> None:
        """Hand each sequence the scores of its targets, and finish what has all of them."""
        rest = iter(scores)
        finite = {}
        for sequence, num_new_tokens in step:
            places = sequence.targets_within(num_new_tokens)
            own = list(itertools.islice(rest, len(places)))
            sequence.scores[places.start : places.stop] = own
            sequence.num_computed_tokens += num_new_tokens
            finite[sequence] = all(map(math.isfinite, own))
        for sequence, is_finite in finite.items():
            if not is_finite:
                self._refuse(sequence)
            elif sequence.num_pending_tokens == 0:
                self._finish(sequence, sequence.completion("stop"))

    def _refuse(self, sequence: Sequence) -> None:
        """End a row that is not finite, or find out whether it is by itself."""
        if sequence.num_cached_tokens:
            self._scheduler.preempt(sequence, clean=False, isolated=True)
            return
        num_tokens = len(sequence.token_ids) - sequence.num_prompt_tokens
        self._finish(
            sequence,
            failure(
                f"model: expected finite logits, got NaN or infinity after {num_tokens} tokens of "
                "the completion; a precision of wider range may help"
            ),
            clean=False,
        )

    def _accept(self, sequence: Sequence, token_id: int, logprob: float) -> None:
        """Append a token, and finish the sequence if it ends with it."""
        try:
            finish_reason: FinishReason | None = sequence.accept(token_id, logprob)
        except RecordError as error:
            self._finish(sequence, failure(str(error)))
            return
        except Exception as error:  # the record boundary: should_stop belongs to one request
            self._finish(sequence, failure(f"should_stop: {type(error).__name__}: {error}"))
            return
        if finish_reason is not None:
            self._finish(sequence, sequence.completion(finish_reason))

    def _finish(self, sequence: Sequence, completion: Completion, *, clean: bool = True) -> None:
        self._scheduler.finish(sequence, clean=clean)
        self._finished.append((sequence, completion))


def failure(message: str) -> Completion:
    """Return the completion of a row that ends with an error."""
    return Completion(token_ids=(), finish_reason="error", logprob=None, error=message)


def _scores(feeds: Mapping[str, np.ndarray], output: ScoreOutput) -> list[float]:
    """Return the score of each target of a step; NaN where the model gave no finite one."""
    normalizers = np.zeros(len(feeds["logit_rows"]))
    tops = zip(output.top_logits.tolist(), output.top_probability.tolist(), strict=True)
    # One by one: a vectorized logarithm may differ in a bit with the place in its array.
    normalizers[feeds["probability_rows"]] = [
        logit - math.log(probability) if probability > 0 else math.nan
        for logit, probability in tops
    ]
    return (output.target_logits - normalizers[feeds["target_rows"]]).tolist()


def _num_completion_tokens(step: Step) -> int:
    """Return how many tokens completions gain by a step: those it chooses, and those forced."""
    return sum(s.num_pending_tokens == n if s.is_prefilling else n for s, n in step)
