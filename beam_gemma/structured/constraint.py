"""What may come next in a completion whose text must be of a language; the only user of llguidance.

Two things know the language. llguidance tells which tokens of the vocabulary may follow, as a mask,
and which must. The automaton tells of one token whether it may follow, and how many tokens the end
is away then. A token is taken only if the end is within reach after it, so a completion that begins
with enough tokens left ends as a text of the language.

Dimensions: W words of 32 tokens each, C tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
from jaxtyping import Int32, Int64
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask_par, get_bitmask_shape

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.structured.automaton import Automaton, Vocabulary
from beam_gemma.structured.grammar import Language, to_regex

Mask = Int32[np.ndarray, " W"]


class Constraint:
    """A language that completions must be of, over the vocabulary of a tokenizer."""

    def __init__(
        self, language: Language, tokenizer: Tokenizer, end_token_ids: Iterable[int]
    ) -> None:
        """Measure the language; what only a running model needs is made when it is asked for.

        All guides of a constraint belong to one thread.

        Args:
            language: Of the whole completion.
            tokenizer: Whose tokens make it up.
            end_token_ids: Tokens that end a completion, and are no part of its text.

        Raises:
            OptionsError: the language is beyond what can be measured, or what llguidance takes.
        """
        self.end_token_ids = frozenset(end_token_ids)
        self._grammar = LLMatcher.grammar_from_regex(to_regex(language))
        is_error, faults = LLMatcher.validate_grammar_with_warnings(self._grammar)
        if is_error:
            raise OptionsError(
                f"constraint: expected what llguidance takes, got {faults[0]}; simplify it"
            )
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.vocabulary()
        self.vocab_size = len(self._vocabulary)
        self.automaton = Automaton(language, Vocabulary(self._vocabulary))
        self.num_shortest = self.automaton.distance(self.automaton.start)
        """Tokens of a shortest text."""

    def shortage(self, max_tokens: int) -> str | None:
        """Return why no text has so few tokens, or None."""
        if max_tokens >= self.num_shortest:
            return None
        return (
            f"max_tokens: expected at least {self.num_shortest:,}, the tokens of the shortest text "
            f"that is valid, got {max_tokens:,}"
        )

    def start(self) -> "Guide":
        """Return the guide of a completion that has no token yet."""
        return Guide(self, self.matcher.deep_copy())

    @cached_property
    def matcher(self) -> LLMatcher:
        """What a guide begins with; takes a second or two to make for a large vocabulary."""
        tokenizer = LLTokenizer(
            TokenizerWrapper(_TokenizerFace(self._tokenizer, self._vocabulary)),
            n_vocab=self.vocab_size,
            eos_token=sorted(self.end_token_ids),
        )
        # Errors become those of rows, which are no place for its own state.
        limits = LLParserLimits(verbose_errors=False)
        return LLMatcher(tokenizer, self._grammar, log_level=0, limits=limits)


class Guide:
    """The way of one completion through the language of its constraint."""

    __slots__ = ("_constraint", "_state", "matcher")

    def __init__(self, constraint: Constraint, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self._constraint = constraint
        self._state = constraint.automaton.start

    @property
    def vocab_size(self) -> int:
        """Tokens that a mask tells of."""
        return self._constraint.vocab_size

    @property
    def is_final(self) -> bool:
        """Whether the text is whole and nothing may follow."""
        return self._constraint.automaton.is_final(self._state)

    def fits(self, token_id: int, num_left: int) -> bool:
        """Return whether the text can be whole with this token and so many more."""
        automaton = self._constraint.automaton
        if token_id in self._constraint.end_token_ids:
            return automaton.is_accepting(self._state)
        if token_id >= self.vocab_size:
            return False
        return automaton.distance(automaton.step(self._state, token_id)) <= num_left

    def next_of_shortest(self) -> int:
        """Return the next token of a shortest way to the end."""
        automaton = self._constraint.automaton
        if automaton.is_accepting(self._state):
            return min(self._constraint.end_token_ids)
        return automaton.next_token(self._state)

    def take(self, token_id: int) -> None:
        """Go on by a token that is part of the text.

        Raises:
            RecordError: llguidance gives up on the text.
        """
        self._state = self._constraint.automaton.step(self._state, token_id)
        if not self.matcher.consume_token(token_id):
            raise RecordError(f"constraint: {self.matcher.get_error().splitlines()[0]}")

    def take_forced(self, num_left: int, *, limit: int | None = None) -> list[int]:
        """Go on by tokens that must follow, and return them.

        Args:
            num_left: Tokens by which the completion may still grow.
            limit: How many to take at most.
        """
        taken: list[int] = []
        for token_id in self.matcher.compute_ff_tokens()[:limit]:
            # The text may be certain and yet its tokens not, where fewer, longer ones would do.
            if not self.fits(token_id, num_left - len(taken) - 1):
                break
            self.take(token_id)
            taken.append(token_id)
        return taken


MaskOf = Callable[[Guide], Mask]


class MaskMaker:
    """Makes the masks of many guides at once, while the caller goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="beam-gemma-masks")

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    def begin(self, guides: Sequence[Guide]) -> MaskOf:
        """Begin with the masks of some guides of one vocabulary.

        Returns:
            What waits for the mask of a guide; of one that was not begun with, it makes it then.
        """
        begun = self._thread.submit(self._make, guides) if guides else None

        def mask_of(guide: Guide) -> Mask:
            masks = begun.result() if begun is not None else {}
            return masks[guide] if guide in masks else self._make([guide])[guide]

        return mask_of

    def _make(self, guides: Sequence[Guide]) -> dict[Guide, Mask]:
        (vocab_size,) = {guide.vocab_size for guide in guides}
        masks = np.zeros(get_bitmask_shape(len(guides), vocab_size), np.int32)
        matchers = [(guide.matcher, row) for row, guide in enumerate(guides)]
        fill_next_token_bitmask_par(self._executor, matchers, masks)
        return dict(zip(guides, masks, strict=True))


def allowed_ids(mask: Mask) -> Int64[np.ndarray, " C"]:
    """Return all tokens that a mask allows, in order."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


class _TokenizerFace:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: Sequence[bytes]) -> None:
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.control_pieces.values())
        # It tells special tokens apart by their names.
        self.tokens = list(vocabulary)
        for name, token_id in tokenizer.control_pieces.items():
            self.tokens[token_id] = name.encode()
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode([Text(text.decode())], add_bos=False)
