"""Thoughts within a completion: told apart by their control tokens, and ended at their limit.

A thought is what stands between two control tokens of the model, those included. It may come at any
place of a completion; Gemma 4 writes one before its answer. What is not part of a thought is the
answer. Only these tokens count: text that looks like them is made of other ones.

A thought that reaches its limit is ended by its end token, which the model does not choose, and the
model goes on with its answer.
"""

from dataclasses import dataclass

from beam_gemma.errors import OptionsError


@dataclass(frozen=True, kw_only=True, slots=True)
class Thinking:
    """The control tokens of a completion's thoughts, and the limit of these."""

    begin_id: int
    """Token that begins a thought."""
    end_id: int
    """Token that ends a thought."""
    max_tokens: int | None = None
    """Most tokens of all thoughts, beyond those of the answer, each thought's two control tokens
    included; at least 2. 0 ends each thought at once. With 0 or None, thoughts count as tokens of
    the answer."""
    is_begun: bool = False
    """True if the prompt ends within a thought."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and (self.max_tokens < 0 or self.max_tokens == 1):
            raise OptionsError(
                "thinking: expected 0 or at least 2 tokens, those that begin and end a thought, "
                f"got {self.max_tokens}"
            )

    @property
    def num_extra_tokens(self) -> int:
        """Most tokens of thoughts beyond those of the answer."""
        return self.max_tokens or 0


class Thoughts:
    """The thoughts of one completion while it grows."""

    __slots__ = ("_has_answer", "_thinking", "is_open", "num_tokens")

    def __init__(self, thinking: Thinking) -> None:
        self.is_open = thinking.is_begun
        """True within a thought, behind its first token."""
        self.num_tokens = 0
        """Number of tokens of thoughts beyond those of the answer."""
        self._has_answer = False
        self._thinking = thinking

    @property
    def num_extra_tokens(self) -> int:
        """Number of tokens of the thoughts so far, and of the open one once it is at its limit."""
        return self._thinking.num_extra_tokens if self.is_open else self.num_tokens

    @property
    def end_id(self) -> int:
        """Token that ends a thought."""
        return self._thinking.end_id

    @property
    def must_end(self) -> bool:
        """True if only the end of the open thought may follow."""
        limit = self._thinking.max_tokens
        return self.is_open and limit is not None and self.num_tokens >= limit - 1

    @property
    def first_id(self) -> int | None:
        """Token that begins the first thought; None once there is one, or a part of the answer."""
        is_past = self._has_answer or self.is_open or self.num_tokens > 0
        return self._thinking.begin_id if self._thinking.max_tokens and not is_past else None

    def is_answer(self, token_id: int) -> bool:
        """Return whether a token would be one of the answer if it came next."""
        return not self.is_open and token_id != self._thinking.begin_id

    def take(self, token_id: int) -> bool:
        """Append a token; return whether it is one of the answer."""
        if self.is_answer(token_id):
            self._has_answer = True
            return True
        # Beyond the limit, as when one more thought begins, tokens count as those of the answer.
        self.num_tokens += self.num_tokens < self._thinking.num_extra_tokens
        self.is_open = not (self.is_open and token_id == self._thinking.end_id)
        return False
