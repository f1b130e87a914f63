"""Requests, the state of their sequences while they run, and the completions they result in.

All three hold token ids only; text is handled above the engine.

While steps are in flight, a sequence is ahead of what the host has seen of it:

    num_settled_tokens <= num_computed_tokens <= len(token_ids) + num_unknown_tokens

The first counts tokens computed by steps that are over. The second includes those of steps in
flight. The third includes tokens that those steps choose, which the host does not know yet.

Dimensions: I height and J width of a picture in pixels, F frames of a sound, M features of a frame.
"""

import bisect
import enum
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from beam_gemma.engine.prefix import Mark, PrefixChain, digest_of
from beam_gemma.engine.sampling import SamplingParams, needs_logits
from beam_gemma.engine.thoughts import Thinking, Thoughts
from beam_gemma.errors import OptionsError
from beam_gemma.structured.constraint import Constraint, Guide

FinishReason = Literal["stop", "length", "error"]
MAX_FORCED_TOKENS = 15
"""Maximum number of forced tokens after a chosen one in one step; with it, they fill a block."""


class Status(enum.Enum):
    """Stage of a sequence in the engine."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True, eq=False, slots=True)
class Medium:
    """A part of a prompt that is no text: its embeddings take the place of those of token ids."""

    start: int
    """Position of its first token in the prompt."""
    digest: bytes
    """Hash of what the embeddings depend on: equal digests mean equal values."""
    values: Shaped[np.ndarray, "..."]
    """What the graph takes that computes its embeddings."""
    num_tokens: int
    """Number of tokens that it takes."""

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + self.num_tokens


class Picture(Medium):
    """A picture: [3, I, J] uint8, in a size that the model takes, channels first, red first."""

    __slots__ = ()


class Sound(Medium):
    """A clip of sound: the frames that the model takes, [F, M] float32."""

    __slots__ = ()


_NAMES: dict[type[Medium], bytes] = {Picture: b"picture", Sound: b"sound"}
"""What tells the digests of a picture and of a sound apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to complete, or to score."""

    request_id: str
    """Identifier shown in errors; need not be unique."""
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sampling_key: str = ""
    """Key of the row's draws: the same key, seed and prompt give the same completion."""
    should_stop: Callable[[int], bool] | None = None
    """Callback for each new token id of the answer, in order; True ends the sequence, which keeps
    that token."""
    constraint: Constraint | None = None
    """Language that the answer must belong to; it decides where the completion ends."""
    thinking: Thinking | None = None
    """Thoughts of the completion, and their limit; None if all of it is the answer."""
    logprob: bool = False
    """True to sum the log-probabilities of the answer's tokens."""
    spans: tuple[tuple[int, int], ...] = ()
    """Half-open ranges of the prompt, in order, with attention in both directions."""
    source_token_ids: tuple[int, ...] = ()
    """Source of an encoder-decoder, which its encoder reads in both directions; the prompt is then
    what the decoder starts with."""
    media: tuple[Medium, ...] = ()
    """Pictures and sounds of the prompt, or of the source if there is one, in order."""
    targets: tuple[tuple[int, int], ...] = ()
    """Pairs to score instead of completing: a prompt position and a possible next token, in order
    of positions; the last pair is at the prompt's last position."""
    normalized: bool = True
    """True for log-probabilities as scores; False for raw logits, which take less work."""

    def __post_init__(self) -> None:
        if self.constraint is not None and (self.should_stop or self.params.ignore_eos):
            raise OptionsError(
                f"request {self.request_id!r}: expected a constraint, or should_stop and "
                "ignore_eos, got both; a constraint alone says where a completion ends"
            )
        if self.constraint is not None and self.thinking and not self.thinking.max_tokens:
            raise OptionsError(
                f"request {self.request_id!r}: expected a limit of thoughts beside a constraint, "
                "whose text comes after them, got none"
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

    @property
    def max_new_tokens(self) -> int:
        """Maximum length of the completion with its thoughts, in tokens."""
        extra = self.thinking.num_extra_tokens if self.thinking is not None else 0
        return self.params.max_tokens + extra

    def marks(self) -> tuple[Mark, ...]:
        """Return the marks of media and spans, for the digests of the prompt's blocks."""
        media = [Mark(m.start, m.end, digest_of(_NAMES[type(m)], m.digest)) for m in self.media]
        spans = []
        for start, end in self.spans:
            inside = (
                array("q", (m.start - start, m.end - start)).tobytes() + m.digest
                for m in media
                if m.start < end and start < m.end
            )
            token_ids = array("q", self.prompt_token_ids[start:end])
            spans.append(Mark(start, end, digest_of(b"span", token_ids.tobytes(), *inside)))
        return (*media, *spans)

    def source_digest(self) -> bytes:
        """Return a hash of the source: equal hashes mean equal tokens and media."""
        media = (array("q", (m.start,)).tobytes() + m.digest for m in self.media)
        token_ids = array("q", self.source_token_ids).tobytes()
        return digest_of(array("q", (len(token_ids),)).tobytes(), token_ids, *media)

    def has_wide_spans(self) -> bool:
        """Return whether any span is not just one of the pictures."""
        media = {(m.start, m.end) for m in self.media}
        return not media.issuperset(self.spans)


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The result of a request."""

    token_ids: tuple[int, ...]
    """Tokens of the completion, thoughts included, without the end token; empty after an error."""
    finish_reason: FinishReason
    logprob: float | None
    """Sum of the log-probabilities, at temperature 1, of the chosen tokens outside of thoughts, the
    end token's included; None unless the request asks for it. Probabilities are the model's own,
    without the constraint; tokens that a constraint forces are not counted."""
    error: str | None = None
    scores: tuple[float, ...] = ()
    """Log-probability of each target, or its logit if the request is not `normalized`."""


@dataclass(eq=False, slots=True)
class Sequence:
    """The state of a request in the engine."""

    request: Request
    end_token_ids: frozenset[int]
    """Tokens that end the completion and are left out of it."""
    token_ids: list[int] = field(init=False)
    """The prompt, then the completion so far."""
    chain: PrefixChain | None = None
    """Digests of the blocks to share with other sequences; None if it shares none."""
    num_cached_tokens: int = 0
    """Leading tokens that other sequences have computed, or will compute in the same step."""
    num_computed_tokens: int = 0
    """Leading tokens in the caches once the steps in flight are over, cached ones included."""
    num_settled_tokens: int = 0
    """Leading tokens already in the caches."""
    num_unknown_tokens: int = 0
    """Tokens after `token_ids` that steps in flight choose."""
    num_void_tokens: int = 0
    """Tokens that steps in flight choose in vain, since a forced one has taken the place; these
    steps come before those that choose unknown tokens."""
    prefill_end: int = 0
    """Leading tokens that are computed in chunks; later ones are computed by decode."""
    isolated: bool = False
    """True if the sequence runs alone and on blocks of its own until it has its next token."""
    boundaries: tuple[int, ...] = ()
    """Numbers of leading tokens after which other sequences want to start from a snapshot."""
    cuts: tuple[int, ...] = ()
    """Those of them at which the sequence ends a chunk, so that its state can be copied there."""
    snapshot_slot: int = -1
    """Slot of the snapshot to copy to the sequence's own before its next step; -1 for none."""
    guide: Guide | None = None
    """State of the answer in the language of its constraint."""
    thoughts: Thoughts | None = field(init=False)
    """Thoughts of the completion so far; None if it has none."""
    wants_logits: bool = False
    """True if the candidates of a step may be too few to choose its next token from."""
    source_digest: bytes = field(init=False)
    """Hash of all that the encoder's states of the source depend on; empty without a source."""
    logprob: float = 0.0
    scores: list[float] = field(default_factory=list)
    """Scores of the targets so far; written again after a preemption."""
    slot: int = -1
    """Row in the block tables and the recurrent state while the sequence runs; otherwise -1."""
    status: Status = Status.WAITING

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        request = self.request
        self.source_digest = request.source_digest() if request.source_token_ids else b""
        self.thoughts = Thoughts(request.thinking) if request.thinking is not None else None

    def begin(self, candidates: int) -> None:
        """Append the first tokens that are forced; call this before any step.

        Args:
            candidates: Number of candidates that each step returns.
        """
        if self.request.constraint is not None:
            self.guide = self.request.constraint.start()
        self._take_forced()
        self.prefill_end = len(self.token_ids)
        self.wants_logits = self.guide is not None or needs_logits(self.request.params, candidates)

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_source_tokens(self) -> int:
        """Number of tokens of the source."""
        return len(self.request.source_token_ids)

    @property
    def is_thinking(self) -> bool:
        """True within a thought, as far as the host knows."""
        return self.thoughts is not None and self.thoughts.is_open

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of prompt and completion together, with the thoughts so far."""
        num_extra = self.thoughts.num_extra_tokens if self.thoughts is not None else 0
        return self.num_prompt_tokens + self.request.params.max_tokens + num_extra

    @property
    def num_tokens_left(self) -> int:
        """Number of tokens by which the completion may still grow, without further thoughts."""
        return self.max_length - len(self.token_ids)

    @property
    def num_reusable_tokens(self) -> int:
        """Number of leading tokens whose outputs are not needed, so cached blocks can stand in."""
        targets = self.request.targets
        return targets[0][0] if targets else self.prefill_end - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far, including those that steps in flight choose."""
        return len(self.token_ids) + self.num_unknown_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Number of tokens not yet computed; a step that takes all of them gives the next token."""
        return len(self.token_ids) + self.num_unknown_tokens - self.num_computed_tokens

    @property
    def is_in_flight(self) -> bool:
        """True if a step in flight reads or writes the sequence's blocks."""
        return self.num_settled_tokens < self.num_computed_tokens

    @property
    def goes_on(self) -> bool:
        """True if the sequence has tokens to compute, as far as the host knows."""
        num_known, num_unknown = len(self.token_ids), self.num_unknown_tokens
        is_pending = num_known + num_unknown > self.num_computed_tokens
        ends_by_length = num_unknown > 0 and num_known + num_unknown >= self.max_length
        return is_pending and not ends_by_length and self.status is Status.RUNNING

    @property
    def is_prefilling(self) -> bool:
        """True if tokens are left that are computed in chunks."""
        return self.num_computed_tokens < self.prefill_end

    def launch(self, num_new_tokens: int) -> None:
        """Advance the computed tokens by a step that was started."""
        if num_new_tokens == self.num_pending_tokens and not self.request.targets:
            self.num_unknown_tokens += 1
        self.num_computed_tokens += num_new_tokens

    def settle(self, num_new_tokens: int) -> None:
        """Advance the settled tokens by a step that is over."""
        self.num_settled_tokens += num_new_tokens

    def restart(self, num_tokens: int) -> None:
        """Reset to `num_tokens` leading tokens in the caches, with nothing in flight."""
        self.num_computed_tokens = self.num_settled_tokens = num_tokens
        self.num_unknown_tokens = self.num_void_tokens = 0

    def chunk(self, start: int, limit: int, *, evenly: bool = True) -> int:
        """Return how many of the tokens from `start` on to compute in one step, at most `limit`.

        A cut inside a span moves to the span's end, or to its start if the end is beyond `limit`.

        Args:
            start: Number of tokens before the chunk.
            limit: Maximum number of tokens in the chunk.
            evenly: Whether to make chunks about equal, so that no step is left with a few tokens.
        """
        num_tokens = self.next_cut(start) - start
        length = -(-num_tokens // -(-num_tokens // limit)) if evenly else min(num_tokens, limit)
        end = start + length
        a, b = self._span_around(end)
        return max((b if b - start <= limit else a) - start, 0)

    def next_cut(self, start: int) -> int:
        """Return where chunks from `start` on end at the latest: the next cut, or the prefill."""
        return next((cut for cut in self.cuts if cut > start), self.prefill_end)

    def rows_within(self, start: int, num_new_tokens: int) -> list[int]:
        """Return the positions that may need the head among `num_new_tokens` from `start` on."""
        if not self.request.targets:
            return [start + num_new_tokens - 1]
        places = self.targets_within(start, num_new_tokens)
        return sorted({self.request.targets[i][0] for i in places})

    def middle(self, num_new_tokens: int, block_size: int, *, num_cells_before: int = 0) -> int:
        """Return how many of the next tokens to compute first if all at once are too many.

        The cut is at the start of a block and outside of spans; 0 if there is no such position.

        Args:
            num_new_tokens: Number of next tokens.
            block_size: Number of cells of a block.
            num_cells_before: Number of cells before that of the sequence's first token.
        """
        start = self.num_computed_tokens
        first = start + 1 + -(start + 1 + num_cells_before) % block_size
        places = range(first, start + num_new_tokens, block_size)
        halfway = start + num_new_tokens / 2
        cuts = [place for place in places if self._span_around(place) == (place, place)]
        return min(cuts, key=lambda place: abs(place - halfway), default=start) - start

    def span_end(self, start: int) -> int:
        """Return the end of the span that the token at `start` is in, else `start`."""
        return next((b for a, b in self.request.spans if a <= start < b), start)

    def media_within(self, num_new_tokens: int) -> list[Medium]:
        """Return the media with tokens among the next `num_new_tokens`."""
        start = self.num_computed_tokens
        media = self.request.media
        return [m for m in media if m.start < start + num_new_tokens and start < m.end]

    def spans_within(self, num_new_tokens: int) -> list[tuple[int, int]]:
        """Return the spans with tokens among the next `num_new_tokens`; none ends behind these.

        A span may begin before them, in blocks that another sequence has computed.
        """
        start = self.num_computed_tokens
        return [(a, b) for a, b in self.request.spans if a < start + num_new_tokens and start < b]

    def targets_within(self, start: int, num_new_tokens: int) -> range:
        """Return the indices of the targets at the `num_new_tokens` positions from `start` on."""
        bounds = (
            bisect.bisect_left(self.request.targets, place, key=lambda target: target[0])
            for place in (start, start + num_new_tokens)
        )
        return range(*bounds)

    def accept(self, token_id: int, logprob: float) -> FinishReason | None:
        """Take the next token; return the finish reason if it ends the sequence, else None."""
        self.num_unknown_tokens -= 1
        is_answer = self.thoughts is None or self.thoughts.is_answer(token_id)
        self.logprob += logprob if is_answer else 0
        if token_id in self.end_token_ids:
            return "stop"
        self.token_ids.append(token_id)
        if self.thoughts is not None:
            self.thoughts.take(token_id)
        if is_answer:
            if self.request.should_stop is not None and self.request.should_stop(token_id):
                return "stop"
            if self.guide is not None:
                self.guide.take(token_id)
        self._take_forced(limit=MAX_FORCED_TOKENS)
        if self.guide is not None and self.guide.is_final and not self.is_thinking:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_length else None

    def skip_void(self) -> bool:
        """Return whether the next token that a step has chosen is void, and forget it if so."""
        is_void = self.num_void_tokens > 0
        self.num_void_tokens -= is_void
        return is_void

    def _take_forced(self, *, limit: int | None = None) -> None:
        """Append the tokens that must follow, in place of those that steps in flight choose.

        Args:
            limit: Maximum number of tokens to append; None for no limit.
        """
        num_before = len(self.token_ids)
        thoughts = self.thoughts
        if thoughts is not None and thoughts.must_end and self.num_tokens_left > 0:
            thoughts.take(thoughts.end_id)
            self.token_ids.append(thoughts.end_id)
        # The first token decides between a thought and the text of the constraint.
        is_open = thoughts is not None and (thoughts.is_open or thoughts.first_id is not None)
        if self.guide is not None and not is_open:
            limit = None if limit is None else limit - (len(self.token_ids) - num_before)
            self.token_ids += self.guide.take_forced(self.num_tokens_left, limit=limit)
        if len(self.token_ids) > num_before:
            self.num_void_tokens += self.num_unknown_tokens
            self.num_unknown_tokens = 0

    def _span_around(self, position: int) -> tuple[int, int]:
        """Return the span that a cut at a position would split, else the position twice."""
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
"""Sequences that run together, each with its number of new tokens in the step."""
