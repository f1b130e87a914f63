"""The workload of all systems: prompts, as text and token ids, and numbers of new tokens.

Prompts are cut from real text in this repository, in more than twenty languages: the prompts of the
greedy parity test and the bodies of the sample articles. The seed is fixed, so a workload is the
same in every run and on every machine.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SEED = 20261121


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One prompt and the number of tokens to generate."""

    text: str
    prompt_token_ids: tuple[int, ...]
    """Token ids of `text`, including the leading `<bos>`."""
    max_tokens: int
    """Number of new tokens; always reached, because end tokens are ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """Settings that a workload is drawn with; lengths are uniform, both bounds included."""

    name: str
    num_rows: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]


REGIMES = {
    regime.name: regime
    for regime in (
        Regime(name="fixed", num_rows=64, prompt_tokens=(20, 200), new_tokens=(64, 64)),
        Regime(name="natural", num_rows=256, prompt_tokens=(20, 600), new_tokens=(8, 256)),
        # Many rows per slot, as in a job, and one max_tokens, as on the command line.
        Regime(name="table", num_rows=256, prompt_tokens=(20, 600), new_tokens=(64, 64)),
    )
}


def draw_rows(regime: Regime, tokenizer: Tokenizer, num_rows: int | None = None) -> list[Row]:
    """Return the first rows of a regime, all of them by default."""
    rng = random.Random(f"{SEED} {regime.name}")
    passages = Passages(tokenizer, rng)
    rows = []
    for _ in range(regime.num_rows if num_rows is None else min(num_rows, regime.num_rows)):
        text, ids = passages.draw(rng.randint(*regime.prompt_tokens))
        max_tokens = rng.randint(*regime.new_tokens)
        rows.append(Row(text=text, prompt_token_ids=ids, max_tokens=max_tokens))
    return rows


class Passages:
    """Cuts passages of an exact number of tokens, each with its own starting point."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._stream = tokenizer.encode([Text(corpus())], add_bos=False)
        self._starts: set[int] = set()

    def draw(self, num_tokens: int) -> tuple[str, tuple[int, ...]]:
        """Return a text and its token ids, including `<bos>`."""
        while True:
            start = self._rng.randrange(len(self._stream) - num_tokens)
            text = self._tokenizer.decode(self._stream[start : start + num_tokens - 1])
            ids = tuple(self._tokenizer.encode([Text(text)]))
            # A cut inside a word or a character may encode to another length.
            if start not in self._starts and len(ids) == num_tokens:
                self._starts.add(start)
                return text, ids


def corpus() -> str:
    """Return the text that prompts are cut from."""
    prompts = json.loads((ROOT / "tests/data/prompts64.json").read_text(encoding="utf-8"))
    bodies = pq.read_table(ROOT / "examples/articles.parquet", columns=["body"])["body"]
    return "\n\n".join([*prompts, *filter(None, bodies.to_pylist())])
