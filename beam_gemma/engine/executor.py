"""Execution of steps: each sequence gets its next token, and a failure ends only the rows at fault.

Steps in flight. `launch` starts a step; `collect` waits for the oldest one and hands its results to
its sequences. Where the graph itself chooses tokens, two steps may be in flight: the second is
launched before the host knows the tokens that the first chooses, so the device never waits for the
host. A sequence that ends with the first step may be in the second one as well. Its results there
are surplus: they are not counted, and its slot and blocks are kept until that step is over. Where
the host has to choose a token, no further step is launched before it has. A token that is forced
after one of the first step, as the end of a thought is, takes the place of the one that the second
chooses, which is void.

Failures are handled as if there were one step at a time: all steps in flight are waited for first.
Steps started after a failed step are discarded and run again after it.

Exceptions of the session, or of those that read media and sources. Nothing of the step counts
as computed. The step is halved, and the halves are tried in order, so that a sequence that computes
a shared block still comes before those that read it. Halving goes on down to one block of a prompt,
since half a chunk needs half the memory. A row that cannot be cut further and fails twice ends with
an error. Recurrent state cannot be restored to before the step, so for such models all sequences of
the step are preempted and computed anew one at a time: a row that fails alone is at fault. Where a
window goes round in its cells, a step after the failed one has replaced a token that the failed one
reads; such rows are preempted in the same way.

Rows that are not finite. A row's values follow from its own tokens, unless it has read blocks of
other sequences, where later tokens may have left a NaN. So a row with such blocks is computed once
more, alone and on blocks of its own; a row without them ends with an error.

A failed row is reported only once a later step has proven that the device is alive; if no work is
left, a probe step of one token does. If several rows fail with no success between them, the device
has failed, and the engine must stop. Rows that share a source count as one, since the source may be
at fault.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.launched_step import Flight, StepCount, is_finite, top_logits
from beam_gemma.engine.media_store import MediaStore
from beam_gemma.engine.next_token import candidates_of, next_token, wants_mask
from beam_gemma.engine.packing import NO_FEATURES, Features, pack
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.scheduler import Scheduler
from beam_gemma.engine.sequence import Completion, FinishReason, Request, Sequence, Status, Step
from beam_gemma.engine.source_packing import NO_SOURCES, Sources
from beam_gemma.engine.source_store import SourceStore
from beam_gemma.errors import RecordError
from beam_gemma.model.signature import blocks_for
from beam_gemma.runtime.step_interface import Feeds, Runner, ScoreOutput, StepOutput
from beam_gemma.structured.constraint import MaskMaker, MaskOf

MAX_FAILURES_IN_A_ROW = 3
"""Consecutive row failures, with no successful step between them, that stop the engine."""
PROBE = Request(
    request_id="probe",
    prompt_token_ids=(0,),
    source_token_ids=(0,),  # read only if the model has an encoder
    params=SamplingParams(max_tokens=1),
)
Ended = tuple[Sequence, Completion]


class Executor:
    """Runs scheduled steps on the session."""

    def __init__(
        self,
        session: Runner,
        cache: KVCache,
        scheduler: Scheduler,
        *,
        on_run: Callable[[StepCount], None],
        media: MediaStore | None = None,
        sources: SourceStore | None = None,
    ) -> None:
        """Create an executor with no steps in flight.

        Args:
            session: The session that runs the steps.
            cache: The cache that holds the blocks of each step.
            scheduler: The scheduler of the steps; told which sequences end or start anew.
            on_run: Called after each run with its counts.
            media: The embeddings of pictures and sounds; None if no sequence has any.
            sources: The states of sources; None if no sequence has a source.
        """
        self._session = session
        self._signature = session.signature
        self._cache = cache
        self._scheduler = scheduler
        self._on_run = on_run
        self._media = media
        self._sources = sources
        # Recurrent state cannot be restored to before a failed step.
        self._most = 1 if self._signature.has_recurrent_state else session.max_steps_in_flight
        self._flights: deque[Flight] = deque()
        self._mask_maker = MaskMaker()
        self._ended: list[Ended] = []
        self._failed: list[Ended] = []  # since a run last succeeded

    @property
    def is_busy(self) -> bool:
        """True if a step is in flight."""
        return bool(self._flights)

    @property
    def is_full(self) -> bool:
        """True if a step must be collected before another is launched."""
        flights = self._flights
        return bool(flights) and (len(flights) >= self._most or flights[-1].is_last)

    def launch(self, step: Step) -> None:
        """Start a step that was scheduled to follow the steps in flight."""
        self._flights.append(self._start(step))

    def collect(self) -> None:
        """Wait for the oldest step in flight, and for the others too if anything is wrong with it.

        Raises:
            Exception: the session's own, once the session fails for any input.
        """
        self._land(self._flights.popleft())
        while self._flights and self._flights[0].is_over:
            self._land(self._flights.popleft())
        if self._failed and not self._scheduler.has_unfinished:
            self._prove_alive()

    def take_ended(self) -> list[Ended]:
        """Return the sequences that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _prove_alive(self) -> None:
        """Compute one token of a probe; raise the session's exception if even that fails."""
        probe = Sequence(PROBE, frozenset())
        self._scheduler.add([probe])
        step = self._scheduler.schedule()
        feeds = self._feeds(step, NO_FEATURES, self._source_states(step))
        self._session.start(feeds).result()
        self._scheduler.finish(probe, clean=False)
        self._settle()

    def _start(self, step: Step) -> Flight:
        """Start a step; if that fails, the flight's result is the failure."""
        rows = [sequence for sequence, n in step if n == sequence.num_pending_tokens]
        with_logits = any(row.wants_logits for row in rows)
        host_chooses = with_logits or not self._signature.chooses
        flight = Flight(
            step=step,
            rows=rows,
            mask_of=self._begin_masks(rows),
            num_prompt_tokens=sum(n for sequence, n in step if sequence.is_prefilling),
            is_last=step[0][0].isolated or (self._signature.head == "generate" and host_chooses),
        )
        try:
            features, sources = self._features(step), self._source_states(step)
        except Exception as error:  # as below
            flight.fail(error)
        else:
            if self._sources is not None:
                flight.num_prompt_tokens += self._sources.take_num_new_tokens()
            flight.feeds = self._feeds(step, features, sources)
            try:
                self._start_from_snapshots(step)
                flight.pending = self._session.start(
                    flight.feeds, with_logits=with_logits, with_candidates=host_chooses
                )
            except Exception as error:  # a device may raise anything; only the rows at fault end
                flight.fail(error)
        for sequence, num_new_tokens in step:
            sequence.launch(num_new_tokens)
        return flight

    def _start_from_snapshots(self, step: Step) -> None:
        """Copy snapshots to the slots of the sequences that start from them."""
        for sequence, _ in step:
            if sequence.snapshot_slot >= 0:
                self._session.copy_slot(sequence.snapshot_slot, sequence.slot)
                sequence.snapshot_slot = -1

    def _take_snapshots(self, step: Step) -> None:
        """Copy the state of the sequences that a settled step has brought to one of their cuts."""
        for sequence, _ in step:
            if (slot := self._scheduler.snapshot_to_take(sequence)) is not None:
                self._session.copy_slot(sequence.slot, slot)

    def _feeds(self, step: Step, features: Features, sources: Sources) -> dict[str, np.ndarray]:
        """Zero the step's unclean blocks, so that all are finite, and return its inputs."""
        for group, blocks in self._cache.take_unclean().items():
            self._session.zero_blocks(group, blocks)
        return pack(step, self._signature, self._cache, features, sources)

    def _features(self, step: Step) -> Features:
        """Return the embeddings of the media that have tokens of the decoder in a step."""
        if self._media is None or self._sources is not None:
            return NO_FEATURES
        media = [medium for sequence, n in step for medium in sequence.media_within(n)]
        return self._media.prepare(media) if media else NO_FEATURES

    def _source_states(self, step: Step) -> Sources:
        """Return the states of the sources of sequences whose first tokens are in a step."""
        if self._sources is None:
            return NO_SOURCES
        starting = [sequence for sequence, _ in step if not sequence.num_computed_tokens]
        return self._sources.prepare(starting) if starting else NO_SOURCES

    def _begin_masks(self, rows: list[Sequence]) -> MaskOf:
        """Start computing the masks that are certain to be needed while the model runs."""
        candidates = self._signature.candidates
        guides = [row.guide for row in rows if row.guide and wants_mask(row, candidates)]
        return self._mask_maker.begin(guides)

    def _land(self, flight: Flight, *, is_retry: bool = False) -> None:
        """Hand the results of a step to its sequences."""
        try:
            output = flight.pending.result()
        except Exception as error:  # as in _start
            self._go_back(flight, error, is_retry=is_retry)
            return
        self._settle()
        if not is_finite(output):
            self._wait()  # blocks may change hands below
        num_sequences = flight.settle()
        if isinstance(output, ScoreOutput):
            self._score(flight, output)
            num_chosen = 0
        else:
            num_chosen = self._choose(flight, output)
        self._take_snapshots(flight.step)
        for sequence, _ in flight.step:
            if sequence.status is Status.FINISHED:
                self._scheduler.finish(sequence)
        self._on_run(StepCount(num_sequences, flight.num_prompt_tokens, num_chosen))

    def _wait(self) -> None:
        """Wait for all steps in flight, so that no step reads or writes a block any more."""
        for flight in self._flights:
            flight.wait()

    def _run(self, step: Step, *, is_retry: bool = False) -> None:
        """Run part of a failed step, or a step that followed one, with nothing else in flight."""
        # Earlier runs may have ended or restarted some of its sequences.
        step = tuple(item for item in step if item[0].status is Status.RUNNING)
        if step:
            self._land(self._start(step), is_retry=is_retry)

    def _settle(self) -> None:
        """Report the failed rows as ended: they were at fault, not the device."""
        self._ended += self._failed
        self._failed = []

    def _go_back(self, flight: Flight, error: Exception, *, is_retry: bool) -> None:
        """Reset the sequences to before a failed step, and run it and all later steps again.

        Later steps may have read incomplete blocks of the failed one, so their results are dropped.
        """
        self._wait()
        later = list(self._flights)
        self._flights.clear()
        replaced = self._with_replaced_tokens(later)
        for sequence in dict.fromkeys(s for f in (flight, *later) for s, _ in f.step):
            sequence.restart(sequence.num_settled_tokens)
            if sequence.status is Status.FINISHED:
                self._scheduler.finish(sequence, clean=False)
        for sequence in reversed(replaced):
            if sequence.status is Status.RUNNING:
                self._scheduler.preempt(sequence, clean=False, isolated=True)
        size = self._signature.block_size
        for sequence in (s for f in later for s, _ in f.step if s.status is Status.RUNNING):
            num_blocks = blocks_for(sequence.num_settled_tokens, size)
            self._cache.wipe(sequence.slot, num_blocks * size)
        step = tuple(item for item in flight.step if item[0].status is Status.RUNNING)
        if step:
            self._recover(step, error, is_retry=is_retry)
        for after in later:
            self._run(after.step)

    def _with_replaced_tokens(self, later: list[Flight]) -> list[Sequence]:
        """Return the sequences of which steps after a failed one have replaced cached tokens."""
        ring = self._signature.ring
        going = dict.fromkeys(s for flight in later for s, _ in flight.step)
        return [s for s in going if ring is not None and s.num_computed_tokens > ring]

    def _recover(self, step: Step, error: Exception, *, is_retry: bool) -> None:
        """Retry a failed step in parts; end a row that cannot be cut further."""
        if self._signature.has_recurrent_state:
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
        if len({_possible_fault(s) for s, _ in self._failed}) == MAX_FAILURES_IN_A_ROW:
            raise error

    def _halves(self, step: Step) -> list[Step]:
        """Return the two halves of a step, or an empty list if it cannot be cut."""
        if len(step) > 1:
            return [step[: len(step) // 2], step[len(step) // 2 :]]
        sequence, num_new_tokens = step[0]
        # Cells behind those of a source are cut where their blocks are.
        has_both = any(state.holds == "both" for state in self._signature.paged_states)
        middle = sequence.middle(
            num_new_tokens,
            self._signature.block_size,
            num_cells_before=sequence.num_source_tokens if has_both else 0,
        )
        if not middle:
            return []
        # The first part's tables name the second's blocks, which the failed run may have written.
        self._cache.wipe(sequence.slot, sequence.num_computed_tokens + middle)
        return [((sequence, middle),), ((sequence, num_new_tokens - middle),)]

    def _choose(self, flight: Flight, output: StepOutput) -> int:
        """Give each row its next token; return the number of tokens that completions gain."""
        num_chosen = 0
        probabilities = iter(output.top_probability.tolist())
        for row, (sequence, best) in enumerate(zip(flight.rows, _best(output), strict=True)):
            token_id, logit, top_logit = best
            probability = next(probabilities) if sequence.request.logprob else 1.0
            if sequence.skip_void():
                continue
            if not (math.isfinite(top_logit) and probability > 0):
                self._refuse(sequence)
                continue
            if sequence.status is not Status.RUNNING:
                continue  # the sequence ended or restarted while the step was in flight
            sequence.isolated = False
            if self._host_chooses(sequence):
                candidates = candidates_of(output, row, flight.full_row(row))
                token_id, logit = next_token(sequence, candidates, flight.mask_of)
            num_known = len(sequence.token_ids)
            self._accept(sequence, token_id, logit - top_logit + math.log(probability))
            num_chosen += max(len(sequence.token_ids) - num_known, 1)
        return num_chosen

    def _host_chooses(self, sequence: Sequence) -> bool:
        """Return whether the host must choose the row's token; else the device's token is used."""
        if self._signature.chooses:
            return sequence.wants_logits
        return sequence.guide is not None or sequence.request.params.temperature > 0

    def _score(self, flight: Flight, output: ScoreOutput) -> None:
        """Give each sequence the scores of its targets; finish the sequences that have all."""
        rest = iter(_scores(flight.feeds, output))
        starts = flight.feeds["past_seqlens"].tolist()
        finite = {}
        for (sequence, num_new_tokens), start in zip(flight.step, starts, strict=True):
            places = sequence.targets_within(start, num_new_tokens)
            own = list(itertools.islice(rest, len(places)))
            sequence.scores[places.start : places.stop] = own
            finite[sequence] = all(map(math.isfinite, own))
        for sequence, has_all in finite.items():
            if not has_all:
                self._refuse(sequence)
            elif sequence.num_settled_tokens == sequence.num_tokens:
                self._finish(sequence, sequence.completion("stop"))

    def _refuse(self, sequence: Sequence) -> None:
        """End a row that is not finite, or recompute it alone if it has read shared blocks."""
        if sequence.status is not Status.RUNNING:
            if sequence.status is Status.FINISHED:
                self._scheduler.finish(sequence, clean=False)
            return
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
        """Pass a token to its sequence, and finish the sequence if it ends there."""
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
        self._ended.append((sequence, completion))


def _possible_fault(sequence: Sequence) -> bytes | Sequence:
    """Return what may be at fault besides the device: a source, or else the sequence itself."""
    return sequence.source_digest or sequence


def failure(message: str) -> Completion:
    """Return the completion of a row that ended with an error."""
    return Completion(token_ids=(), finish_reason="error", logprob=None, error=message)


def _scores(feeds: Feeds, output: ScoreOutput) -> list[float]:
    """Return the score of each target of a step; NaN where the model gave no finite score."""
    normalizers = np.zeros(len(feeds["logit_rows"]))
    tops = zip(output.top_logits.tolist(), output.top_probability.tolist(), strict=True)
    # Scalar logarithms: a vectorized one may differ in a bit depending on the place in its array.
    normalizers[feeds["probability_rows"]] = [
        logit - math.log(probability) if probability > 0 else math.nan
        for logit, probability in tops
    ]
    return (output.target_logits - normalizers[feeds["target_rows"]]).tolist()


def _best(output: StepOutput) -> Iterator[tuple[int, float, float]]:
    """Return per row the device's token, its logit and the likeliest token's logit."""
    tops = top_logits(output).tolist()
    if output.chosen_ids is not None and output.chosen_logits is not None:
        return zip(output.chosen_ids.tolist(), output.chosen_logits.tolist(), tops, strict=True)
    assert output.topk_ids is not None
    return zip(output.topk_ids[:, 0].tolist(), tops, tops, strict=True)
