"""Checks that a request suits a model: its prompt, source, spans, media and their limits.

A request that passes can run and cannot harm others, if the cache can ever hold it, which the
scheduler checks besides.
"""

from dataclasses import dataclass

from beam_gemma.engine.sequence import Medium, Picture, Request
from beam_gemma.errors import PromptTooLongError, RecordError
from beam_gemma.model.signature import Signature


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestChecks:
    """Checks of requests for one model; each method raises for the first fault it finds."""

    signature: Signature
    """The contract of the graph that runs the steps."""
    max_num_batched_tokens: int
    vision: Signature | None = None
    """The contract of the graph that makes pictures' embeddings; None without pictures."""
    sound: Signature | None = None
    """The contract of the graph that makes sounds' embeddings; None without sounds."""
    encoder: Signature | None = None
    """The contract of the graph that reads sources; None for a model without an encoder."""

    def check(self, request: Request) -> None:
        """Check a request.

        Raises:
            RecordError: the request does not suit the model, or exceeds a limit.
        """
        self._check_prompt(request)
        self._check_targets(request)
        self._check_source(request)
        self._check_spans(request)
        self._check_media(request)
        max_tokens = request.params.max_tokens
        if request.constraint and (too_few := request.constraint.shortage(max_tokens)):
            raise RecordError(too_few)
        num_tokens = len(request.prompt_token_ids) + request.max_new_tokens
        limit = self.signature.max_model_len
        if num_tokens > limit:
            raise PromptTooLongError(
                f"{wanted(request)}: expected at most {limit:,} together, got {num_tokens:,}; "
                "shorten either"
            )

    def _check_prompt(self, request: Request) -> None:
        ids, vocab_size = request.prompt_token_ids, self.signature.vocab_size
        if not ids:
            raise RecordError("prompt: expected at least one token, got none")
        _check_ids("prompt", ids, vocab_size)

    def _check_targets(self, request: Request) -> None:
        vocab_size = self.signature.vocab_size
        wants_targets = self.signature.head == "score"
        if wants_targets != bool(request.targets):
            raise RecordError(
                f"targets: expected {'some' if wants_targets else 'none'} for the head "
                f"{self.signature.head}, got {len(request.targets)}"
            )
        for _, token_id in request.targets:
            if not 0 <= token_id < vocab_size:
                raise RecordError(
                    f"targets: expected token ids from 0 to {vocab_size - 1}, got {token_id}"
                )

    def _check_source(self, request: Request) -> None:
        ids = request.source_token_ids
        if self.encoder is None:
            if ids:
                raise RecordError(
                    f"source: expected none, since the model has no encoder, got {len(ids):,} "
                    "tokens"
                )
            return
        if not ids:
            raise RecordError("source: expected at least one token, got none")
        _check_ids("source", ids, self.encoder.vocab_size)
        if len(ids) > (limit := self.signature.max_source_len):
            raise PromptTooLongError(
                f"source of {len(ids):,} tokens: expected at most {limit:,}; shorten the prompt"
            )

    def _check_spans(self, request: Request) -> None:
        if request.spans and "span_ends" not in self.signature.optional_inputs:
            raise RecordError("spans: expected none, since the model attends one way only")
        longest = max((end - start for start, end in request.spans), default=0)
        if longest > self.max_num_batched_tokens:
            raise PromptTooLongError(
                f"prompt of {len(request.prompt_token_ids):,} tokens: expected at most "
                f"{self.max_num_batched_tokens:,} that attend in both directions, got "
                f"{longest:,}; a step computes them together, so shorten the prompt or set "
                f"--max_num_batched_tokens {longest}"
            )

    def _check_media(self, request: Request) -> None:
        where, holder = (
            ("prompt", request.prompt_token_ids)
            if self.encoder is None
            else ("source", request.source_token_ids)
        )
        end_before = 0
        for medium in request.media:
            kind, num_tokens = self._tokens_of(medium)
            is_inside = end_before <= medium.start <= len(holder) - num_tokens
            if medium.num_tokens != num_tokens or not is_inside:
                raise RecordError(
                    f"{kind}: expected places of {num_tokens:,} tokens in order inside a {where} "
                    f"of {len(holder):,}, got one of {medium.num_tokens:,} from token "
                    f"{medium.start:,} on"
                )
            end_before = medium.end

    def _tokens_of(self, medium: Medium) -> tuple[str, int]:
        """Return what errors call a medium, and how many tokens it takes.

        Raises:
            RecordError: the model takes none of its kind, or none of its size.
        """
        is_picture = isinstance(medium, Picture)
        kind, graph = ("pictures", self.vision) if is_picture else ("sounds", self.sound)
        if graph is None:
            raise RecordError(f"{kind}: expected none, since the model takes none, got some")
        if not is_picture:
            if (got := medium.values.shape[1]) != graph.num_features:
                raise RecordError(
                    f"{kind}: expected frames of {graph.num_features} values, got {got}"
                )
            return kind, graph.num_audio_tokens or medium.num_tokens
        height, width = medium.values.shape[1:]
        num_tokens = graph.tokens_of(height, width)
        if num_tokens is None:
            raise RecordError(
                f"{kind}: expected {graph.sizes_of_pictures}, got {height} by {width}"
            )
        return kind, num_tokens


def wanted(request: Request) -> str:
    """Return what a request takes, for messages."""
    source = f"source of {n:,} tokens, " if (n := len(request.source_token_ids)) else ""
    num_extra = request.max_new_tokens - request.params.max_tokens
    thoughts = f" and thinking_tokens {num_extra:,}" if num_extra else ""
    return (
        f"{source}prompt of {len(request.prompt_token_ids):,} tokens with max_tokens "
        f"{request.params.max_tokens:,}{thoughts}"
    )


def _check_ids(name: str, ids: tuple[int, ...], vocab_size: int) -> None:
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise RecordError(
            f"{name}: expected token ids from 0 to {vocab_size - 1}, got {min(ids)} to {max(ids)}"
        )
