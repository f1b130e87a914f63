"""A request, the state of its sequence while it runs, and the completion that comes of it.

All three are about token ids; text stays above the engine.

While steps are in flight a sequence is ahead of what the host has seen of it:

    num_settled_tokens <= num_computed_tokens <= len(token_ids) + num_unknown_tokens

Steps that are over have computed the first, steps in flight will have computed the second, and what
they choose is counted in the third; the device knows it, the host does not yet.
"""

import bisect
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from beam_gemma.engine.prefix import PrefixChain
from beam_gemma.engine.sampling import SamplingParams, needs_logits
from beam_gemma.errors import OptionsError
from beam_gemma.structured.constraint import Constraint, Guide

FinishReason = Literal["stop", "length", "error"]
MAX_FORCED_TOKENS = 15
"""Tokens that may follow a chosen one without being chosen, in one step; with it, a block."""


class Status(enum.Enum):
    """Where a sequence is on its way through the engine."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to complete, or to score."""

    request_id: str
    """Named in errors; need not be unique."""
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sampling_key: str = ""
    """Names the row in draws: the same key, seed and prompt give the same completion."""
    should_stop: Callable[[int], bool] | None = None
    """Called with each new token id in order; True ends the sequence, which keeps that token."""
    constraint: Constraint | None = None
    """The language that the completion must be of; it ends with it."""
    logprob: bool = False
    """Whether to sum up the completion's log-probabilities."""
    spans: tuple[tuple[int, int], ...] = ()
    """Half-open ranges of the prompt, in order, that are attended both ways."""
    targets: tuple[tuple[int, int], ...] = ()
    """To score in place of completing: a position of the prompt, and a token that may come next;
    in the order of positions, up to the last one."""
    normalized: bool = True
    """Whether scores are log-probabilities; else they are logits, which take less work."""

    def __post_init__(self) -> None:
        if self.constraint is not None and (self.should_stop or self.params.ignore_eos):
            raise OptionsError(
                f"request {self.request_id!r}: expected a constraint, or should_stop and "
                "ignore_eos, got both; a constraint alone says where a completion ends"
            )
        positions = [position for position, _ in self.targets]
        last = len(self.prompt_token_ids) - 1
        if positions and not (
            positions == sorted(positions) and 0 <= positions[0] <= last == positions[-1]
        ):
            raise OptionsError(
                f"request {self.request_id!r}: expected targets in order up to position {last}, "
                f"got {positions}"
            )
        end_before = 0
        for start, end in self.spans:
            if not end_before <= start < end <= len(self.prompt_token_ids):
                raise OptionsError(
                    f"request {self.request_id!r}: expected spans in order inside a prompt of "
                    f"{len(self.prompt_token_ids)} tokens, got {self.spans}"
                )
            end_before = end


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a request gave."""

    token_ids: tuple[int, ...]
    """Without the end token; empty after an error."""
    finish_reason: FinishReason
    logprob: float | None
    """Sum of the chosen tokens' log-probabilities at temperature 1, the end token's included; None
    unless the request asked for it. The model alone counts, without a constraint; tokens that a
    constraint forced were not chosen."""
    error: str | None = None
    scores: tuple[float, ...] = ()
    """Log-probability of each target, or its logit where the request asked for no more."""


@dataclass(eq=False, slots=True)
class Sequence:
    """A request while the engine holds it."""

    request: Request
    end_token_ids: frozenset[int]
    """Tokens that end the completion and stay out of it."""
    token_ids: list[int] = field(init=False)
    """The prompt, then the completion so far."""
    chain: PrefixChain | None = None
    """Names the blocks that it shares with other sequences; None if it shares none."""
    num_cached_tokens: int = 0
    """Leading tokens that other sequences have computed, or will in the same step."""
    num_computed_tokens: int = 0
    """Leading tokens that the caches hold, those included, once the steps in flight are over."""
    num_settled_tokens: int = 0
    """Leading tokens that they hold already."""
    num_unknown_tokens: int = 0
    """Tokens after `token_ids` that steps in flight choose."""
    prefill_end: int = 0
    """Leading tokens that are computed in chunks; those that follow are computed by decode."""
    isolated: bool = False
    """Whether it runs in steps of its own, on blocks of its own, until it has its next token."""
    guide: Guide | None = None
    """Where in the language of its constraint the completion is."""
    wants_logits: bool = False
    """Whether the candidates of a step may be too few to choose its next token from."""
    max_length: int = field(init=False)
    """Most tokens of prompt and completion."""
    logprob: float = 0.0
    scores: list[float] = field(default_factory=list)
    """Of the targets so far; those of a preempted sequence are written again."""
    slot: int = -1
    """Row of the block tables and of recurrent state, while the sequence runs."""
    status: Status = Status.WAITING

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.max_length = self.num_prompt_tokens + self.request.params.max_tokens

    def begin(self, candidates: int) -> None:
        """Take the first tokens of the completion where they are certain; come before any step.

        Args:
            candidates: That each step returns.
        """
        if self.request.constraint is not None:
            self.guide = self.request.constraint.start()
            self.token_ids += self.guide.take_forced(self.num_tokens_left)
        self.prefill_end = len(self.token_ids)
        self.wants_logits = self.guide is not None or needs_logits(self.request.params, candidates)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens_left(self) -> int:
        """Tokens by which the completion may still grow."""
        return self.max_length - len(self.token_ids)

    @property
    def num_reusable_tokens(self) -> int:
        """Leading tokens whose outputs nobody needs, so that others may have computed them."""
        targets = self.request.targets
        return targets[0][0] if targets else self.prefill_end - 1

    @property
    def num_tokens(self) -> int:
        """Tokens so far, those that steps in flight choose included."""
        return len(self.token_ids) + self.num_unknown_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that are not computed; the step that takes all gives the next token."""
        return len(self.token_ids) + self.num_unknown_tokens - self.num_computed_tokens

    @property
    def is_in_flight(self) -> bool:
        """Whether a step in flight reads or writes its blocks."""
        return self.num_settled_tokens < self.num_computed_tokens

    @property
    def goes_on(self) -> bool:
        """Whether it has something to compute, for all that the host knows."""
        num_known, num_unknown = len(self.token_ids), self.num_unknown_tokens
        is_pending = num_known + num_unknown > self.num_computed_tokens
        ends_by_length = num_unknown > 0 and num_known + num_unknown >= self.max_length
        return is_pending and not ends_by_length and self.status is Status.RUNNING

    @property
    def is_prefilling(self) -> bool:
        """Whether a part is left that is computed in chunks."""
        return self.num_computed_tokens < self.prefill_end

    def launch(self, num_new_tokens: int) -> None:
        """Go ahead by a step that was started."""
        if num_new_tokens == self.num_pending_tokens and not self.request.targets:
            self.num_unknown_tokens += 1
        self.num_computed_tokens += num_new_tokens

    def settle(self, num_new_tokens: int) -> None:
        """Follow by a step that is over."""
        self.num_settled_tokens += num_new_tokens

    def restart(self, num_tokens: int) -> None:
        """Stand where the caches hold so many leading tokens, with nothing in flight."""
        self.num_computed_tokens = self.num_settled_tokens = num_tokens
        self.num_unknown_tokens = 0

    def chunk(self, start: int, limit: int, *, evenly: bool = True) -> int:
        """Return how many of the tokens from `start` on to compute in one step, at most `limit`.

        Where the cut would fall into a span it moves to the span's end, or to its start if the step
        cannot hold that.

        Args:
            start: Tokens that come before.
            limit: Most that the step takes.
            evenly: Whether chunks are of one size, so that no step is left with a few.
        """
        num_tokens = self.prefill_end - start
        length = -(-num_tokens // -(-num_tokens // limit)) if evenly else min(num_tokens, limit)
        end = start + length
        a, b = self._span_around(end)
        return max((b if b - start <= limit else a) - start, 0)

    def rows_within(self, start: int, num_new_tokens: int) -> list[int]:
        """Return which of so many tokens from `start` on may need the head."""
        if not self.request.targets:
            return [start + num_new_tokens - 1]
        places = self.targets_within(start, num_new_tokens)
        return sorted({self.request.targets[i][0] for i in places})

    def middle(self, num_new_tokens: int, block_size: int) -> int:
        """Return how many of the next tokens to compute first if all together are too many.

        The cut is at the start of a block and outside of spans; 0 if there is no such place.
        """
        start = self.num_computed_tokens
        places = range(
            -(-(start + 1) // block_size) * block_size, start + num_new_tokens, block_size
        )
        halfway = start + num_new_tokens / 2
        cuts = [place for place in places if self._span_around(place) == (place, place)]
        return min(cuts, key=lambda place: abs(place - halfway), default=start) - start

    def targets_within(self, start: int, num_new_tokens: int) -> range:
        """Return which targets so many tokens from `start` on give scores for."""
        bounds = (
            bisect.bisect_left(self.request.targets, place, key=lambda target: target[0])
            for place in (start, start + num_new_tokens)
        )
        return range(*bounds)

    def accept(self, token_id: int, logprob: float) -> FinishReason | None:
        """Take the next token; return why the sequence ends with it, or None to go on."""
        self.num_unknown_tokens -= 1
        self.logprob += logprob
        if token_id in self.end_token_ids:
            return "stop"
        self.token_ids.append(token_id)
        if self.request.should_stop is not None and self.request.should_stop(token_id):
            return "stop"
        if self.guide is not None:
            self.guide.take(token_id)
            left = self.num_tokens_left
            self.token_ids += self.guide.take_forced(left, limit=MAX_FORCED_TOKENS)
            if self.guide.is_final:
                return "stop"
        return "length" if len(self.token_ids) >= self.max_length else None

    def _span_around(self, position: int) -> tuple[int, int]:
        """Return the span that a cut at a position would split, or the position twice."""
        spans = self.request.spans
        return next((s for s in spans if s[0] < position < s[1]), (position, position))

    def completion(self, finish_reason: FinishReason) -> Completion:
        """Return the tokens accepted so far as a completion."""
        return Completion(
            token_ids=tuple(self.token_ids[self.num_prompt_tokens :]),
            finish_reason=finish_reason,
            logprob=self.logprob if self.request.logprob else None,
            scores=tuple(self.scores),
        )


Step = tuple[tuple[Sequence, int], ...]
"""Sequences that run together, each with its number of new tokens."""
