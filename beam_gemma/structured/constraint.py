"""Constrain completions to a language, token by token; the only module that uses llguidance.

Two components know the language. llguidance returns the tokens of the vocabulary that may follow,
as a mask, and those that must. The automaton says whether one token may follow, and how many tokens
the end is away after it. A token is taken only if the end remains within reach, so a completion
that begins with enough tokens left ends as a text of the language.

Dimensions: W words of a mask, each of 32 tokens; C allowed tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from types import MappingProxyType

import numpy as np
from jaxtyping import Int32, Int64
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask_par, get_bitmask_shape

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.model.markup import Control, ControlPieces
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.structured.automaton import Automaton, Vocabulary
from beam_gemma.structured.grammar import Language
from beam_gemma.structured.lark import to_lark

Mask = Int32[np.ndarray, " W"]
PLANE_16_BYTE = b"\xf4"
"""First byte in UTF-8 of all characters of Unicode's last plane, which is left to private use."""


class Constraint:
    """A language that completions must belong to, over the vocabulary of a tokenizer."""

    def __init__(
        self,
        language: Language,
        tokenizer: Tokenizer,
        end_token_ids: Iterable[int],
        *,
        marks: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Measure the language; the matcher, which only a running model needs, is built on use.

        All guides of a constraint belong to one thread.

        Args:
            language: The language of whole completions.
            tokenizer: The tokenizer of the model.
            end_token_ids: The tokens that end a completion; they are not part of its text.
            marks: Characters of the language that stand for control pieces, each with the name of
                its piece. No other token writes a character of plane 16, in which they are.

        Raises:
            OptionsError: the language is too large to be measured, or llguidance refuses it.
        """
        self.end_token_ids = frozenset(end_token_ids)
        self._marks = marks
        self._vocabulary = _with_marks(tokenizer, marks)
        self.vocab_size = len(self._vocabulary)
        self.automaton = Automaton(language, Vocabulary(self._vocabulary))
        self._grammar = LLMatcher.grammar_from_lark(to_lark(language))
        is_error, faults = LLMatcher.validate_grammar_with_warnings(self._grammar)
        if is_error:
            raise OptionsError(
                f"constraint: expected what llguidance takes, got {faults[0].splitlines()[0]}; "
                "simplify it"
            )
        self._tokenizer = tokenizer
        self.num_shortest = self.automaton.distance(self.automaton.start)
        """Number of tokens of a shortest text."""

    def shortage(self, max_tokens: int) -> str | None:
        """Return an error message if `max_tokens` is too few for any text, else None."""
        if max_tokens >= self.num_shortest:
            return None
        return (
            f"max_tokens: expected at least {self.num_shortest:,}, the tokens of the shortest text "
            f"that is valid, got {max_tokens:,}"
        )

    def start(self) -> "Guide":
        """Return the guide of a new completion."""
        return Guide(self, self.matcher.deep_copy())

    @cached_property
    def matcher(self) -> LLMatcher:
        """Matcher that guides copy; takes a second or two to build for a large vocabulary."""
        tokenizer = LLTokenizer(
            TokenizerWrapper(_TokenizerFace(self._tokenizer, self._vocabulary, self._marks)),
            n_vocab=self.vocab_size,
            eos_token=sorted(self.end_token_ids),
        )
        # Errors are reported per row; verbose ones would include the state of llguidance.
        limits = LLParserLimits(verbose_errors=False)
        return LLMatcher(tokenizer, self._grammar, log_level=0, limits=limits)


class Guide:
    """The state of one completion in the language of its constraint."""

    __slots__ = ("_constraint", "_state", "matcher")

    def __init__(self, constraint: Constraint, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self._constraint = constraint
        self._state = constraint.automaton.start

    @property
    def vocab_size(self) -> int:
        """Number of tokens that a mask covers."""
        return self._constraint.vocab_size

    @property
    def is_final(self) -> bool:
        """True if the text is complete and nothing may follow."""
        return self._constraint.automaton.is_final(self._state)

    def fits(self, token_id: int, num_left: int) -> bool:
        """Return whether the text can end within `num_left` tokens after this one."""
        automaton = self._constraint.automaton
        if token_id in self._constraint.end_token_ids:
            return automaton.is_accepting(self._state)
        if token_id >= self.vocab_size:
            return False
        try:
            return automaton.distance(automaton.step(self._state, token_id)) <= num_left
        except RecordError:
            return True  # `take` refuses it, with the reason

    def next_of_shortest(self) -> int:
        """Return the first token of the way to the end; an end token if the text may end here."""
        automaton = self._constraint.automaton
        if automaton.is_accepting(self._state):
            return min(self._constraint.end_token_ids)
        return automaton.next_token(self._state)

    def take(self, token_id: int) -> None:
        """Append a token to the text.

        Raises:
            RecordError: llguidance refuses the token, or what may follow it takes too much work.
        """
        automaton = self._constraint.automaton
        self._state = automaton.step(self._state, token_id)
        automaton.distance(self._state)
        if not self.matcher.consume_token(token_id):
            raise RecordError(f"constraint: {self.matcher.get_error().splitlines()[0]}")

    def take_forced(self, num_left: int, *, limit: int | None = None) -> list[int]:
        """Append the tokens that must follow, and return them.

        Args:
            num_left: The number of tokens by which the completion may still grow.
            limit: The maximum number of tokens to append; None means no limit.
        """
        taken: list[int] = []
        for token_id in self.matcher.compute_ff_tokens()[:limit]:
            # The text is forced, but its tokens are not: fewer, longer ones may be needed to fit.
            if not self.fits(token_id, num_left - len(taken) - 1):
                break
            self.take(token_id)
            taken.append(token_id)
        return taken


MaskOf = Callable[[Guide], Mask]


class MaskMaker:
    """Compute the masks of many guides at once, in a background thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="beam-gemma-masks")

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    def begin(self, guides: Sequence[Guide]) -> MaskOf:
        """Start to compute the masks of guides that share a vocabulary.

        Returns:
            A function that waits for the mask of a guide. For a guide that is not among `guides`,
            it computes the mask when called.
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
    """Return the ids of all tokens that a mask allows, in ascending order."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def _with_marks(tokenizer: Tokenizer, marks: Mapping[str, str]) -> list[bytes]:
    """Return the text of every token, which is its mark for a control piece that has one.

    All characters of plane 16 have the same first byte. Other tokens with this byte, such as the
    byte piece, lose their text, so that they cannot write a mark.
    """
    vocabulary = tokenizer.vocabulary()
    if not marks:
        return vocabulary
    marked = [b"" if PLANE_16_BYTE in text else text for text in vocabulary]
    for mark, piece in marks.items():
        assert mark.encode()[:1] == PLANE_16_BYTE, mark
        marked[tokenizer.control_pieces[piece]] = mark.encode()
    return marked


class _TokenizerFace:
    """The interface of a tokenizer that llguidance expects."""

    def __init__(
        self, tokenizer: Tokenizer, vocabulary: Sequence[bytes], marks: Mapping[str, str]
    ) -> None:
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        specials = {
            token_id: name
            for name, token_id in tokenizer.control_pieces.items()
            if name not in marks.values()
        }
        self.special_token_ids = sorted(specials)
        # llguidance tells special tokens apart by their names.
        self.tokens = list(vocabulary)
        for token_id, name in specials.items():
            self.tokens[token_id] = name.encode()
        self._tokenizer = tokenizer
        self._marks = marks
        self._split = ControlPieces(marks).split

    def __call__(self, text: bytes) -> list[int]:
        parts = [
            Control(self._marks[part.piece]) if isinstance(part, Control) else part
            for part in self._split(text.decode())
        ]
        return self._tokenizer.encode(parts, add_bos=False)
