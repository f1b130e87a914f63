"""Labels behind a prompt: which tokens are a label's own, and the least work that scores them all.

A label is scored as it is written: prompt and label are encoded as one text, and the label's own
tokens begin with the first one that covers a character of it. So a label may take the last
characters of its prompt with it (`x: ` and `yes` meet in the token ` yes`), and two labels may
differ in how the end of their prompt is cut into tokens.

A label's log-likelihood is the sum over its own tokens, each given all tokens before it.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from beam_gemma.errors import RecordError
from beam_gemma.model.markup import Part, Text
from beam_gemma.model.tokenizer import SPACE, Tokenizer


@dataclass(frozen=True, slots=True)
class Continuation:
    """The tokens of a prompt and a label behind it."""

    token_ids: tuple[int, ...]
    start: int
    """Where the label's own tokens begin."""

    @property
    def num_label_tokens(self) -> int:
        """The label's own tokens."""
        return len(self.token_ids) - self.start


def join(tokenizer: Tokenizer, prompt: Sequence[Part], label: Sequence[Part]) -> Continuation:
    """Encode a label behind a prompt.

    Raises:
        RecordError: the label has no text.
    """
    text = "".join(part.text for part in label if isinstance(part, Text))
    if not text:
        raise RecordError("label: expected some text, got none")
    # A piece that writes a space as U+2581 gives a space back, whichever the text had.
    num_left = len(text.replace(SPACE, " ").encode(errors="surrogatepass"))
    ids = tokenizer.encode([*prompt, *label])
    start = len(ids)
    while num_left > 0:
        start -= 1
        num_left -= len(tokenizer.token_bytes(ids[start]))
    return Continuation(tuple(ids), start)


@dataclass(frozen=True, slots=True)
class Path:
    """A sequence of tokens to compute once, and what to ask along it."""

    token_ids: tuple[int, ...]
    targets: tuple[tuple[int, int], ...]
    """A position, and a token that may come next; in order, up to the last position."""


class Plan:
    """The least work that scores some continuations.

    What comes before a continuation's last token is a sequence to compute, unless another one
    begins with it. Each token of a label is asked for once, of the first sequence that holds all
    tokens before it.
    """

    def __init__(self, continuations: Sequence[Continuation]) -> None:
        self.continuations = tuple(continuations)
        # In lexicographic order a sequence comes just before those that begin with it.
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
        """Whether each label is one token, after the same tokens.

        Then their log-likelihoods are logits less the same number, and have the same softmax.
        """
        places = {(path, position) for p in self._places for path, (position, _) in p}
        return len(places) == 1

    def logliks(self, scores: Sequence[Sequence[float]]) -> list[float]:
        """Return each continuation's sum of scores.

        Args:
            scores: Of each path, one for each of its targets.
        """
        known = [
            dict(zip(path.targets, values, strict=True))
            for path, values in zip(self.paths, scores, strict=True)
        ]
        return [math.fsum(known[path][target] for path, target in p) for p in self._places]


def softmax(values: Sequence[float]) -> list[float]:
    """Return probabilities in the ratio of the exponentials of some values."""
    largest = max(values)
    weights = [math.exp(value - largest) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
