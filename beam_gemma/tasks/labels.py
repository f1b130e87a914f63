"""Tokens of the labels that follow a prompt, and the smallest plan that scores them all.

A label is scored as written: prompt and label are encoded as one text, and the label's own tokens
begin with the first token that covers a character of the label. That token may include the last
characters of the prompt (`x: ` and `yes` meet in the token ` yes`), and the end of the prompt may
be tokenized differently for two labels.

A label's log-likelihood is the sum over its own tokens, each given all tokens before it.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from beam_gemma.errors import RecordError
from beam_gemma.model.markup import Control, Part, Text
from beam_gemma.model.tokenizer import SPACE, Tokenizer


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens of a prompt followed by a label."""

    token_ids: tuple[int, ...]
    start: int
    """Index of the first of the label's own tokens."""

    @property
    def num_label_tokens(self) -> int:
        """Number of the label's own tokens."""
        return len(self.token_ids) - self.start


def join(tokenizer: Tokenizer, prompt: Sequence[Part], label: Sequence[Part]) -> Continuation:
    """Encode a prompt followed by a label.

    Raises:
        RecordError: the label has no text.
    """
    text = "".join(part.text for part in label if isinstance(part, Text))
    # token_bytes returns a space for U+2581, even if the text itself contains U+2581.
    num_left = len(text.replace(SPACE, " ").encode(errors="surrogatepass"))
    controls = (tokenizer.control_pieces[p.piece] for p in label if isinstance(p, Control))
    num_left += sum(len(tokenizer.token_bytes(token_id)) for token_id in controls)
    if not num_left:
        raise RecordError("label: expected some text, got none")
    ids = tokenizer.encode([*prompt, *label])
    start = len(ids)
    while num_left > 0:
        start -= 1
        num_left -= len(tokenizer.token_bytes(ids[start]))
    return Continuation(tuple(ids), start)


@dataclass(frozen=True, slots=True)
class Path:
    """A token sequence to compute once, and the possible next tokens to score in it."""

    token_ids: tuple[int, ...]
    targets: tuple[tuple[int, int], ...]
    """Sorted pairs of a position in `token_ids` and a token id to score right after it."""


class Plan:
    """The smallest set of sequences that scores a set of continuations.

    Each continuation without its last token is a sequence to compute, unless it is a prefix of
    another sequence. Each label token is scored once, in the first sequence that contains all
    tokens before it.
    """

    def __init__(self, continuations: Sequence[Continuation]) -> None:
        self.continuations = tuple(continuations)
        # In lexicographic order, a sequence comes right before the sequences it is a prefix of.
        contexts = sorted({c.token_ids[:-1] for c in continuations})
        following = [*contexts[1:], ()]
        maximal = [c for c, f in zip(contexts, following, strict=True) if f[: len(c)] != c]
        asked: list[set[tuple[int, int]]] = [set() for _ in maximal]
        self._places: list[list[tuple[int, tuple[int, int]]]] = []
        for continuation in continuations:
            ids = continuation.token_ids
            places = [
                (bisect_left(maximal, ids[:end]), (end - 1, ids[end]))
                for end in range(continuation.start, len(ids))
            ]
            for path, target in places:
                asked[path].add(target)
            self._places.append(places)
        self.paths = tuple(
            Path(ids, tuple(sorted(targets))) for ids, targets in zip(maximal, asked, strict=True)
        )

    @property
    def is_one_choice(self) -> bool:
        """True if each label is one token and all labels follow the same tokens.

        Log-likelihoods are then logits minus a shared constant, so both have the same softmax.
        """
        places = {(path, position) for p in self._places for path, (position, _) in p}
        return len(places) == 1

    def logliks(self, scores: Sequence[Sequence[float]]) -> list[float]:
        """Return the log-likelihood of each continuation: the sum of its token scores.

        Args:
            scores: The scores of each path, one per target.
        """
        known = [
            dict(zip(path.targets, values, strict=True))
            for path, values in zip(self.paths, scores, strict=True)
        ]
        return [math.fsum(known[path][target] for path, target in p) for p in self._places]


def softmax(values: Sequence[float]) -> list[float]:
    """Return probabilities proportional to the exponentials of the values."""
    largest = max(values)
    weights = [math.exp(value - largest) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
