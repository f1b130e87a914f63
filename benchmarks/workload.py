"""What every system is given: the same prompts, as text and as token ids, and how many new tokens.

Prompts are cut from real text of this repository, in more than twenty languages: the prompts of the
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
    """One prompt and its share of work."""

    text: str
    prompt_token_ids: tuple[int, ...]
    """Of `text`, the leading `<bos>` included."""
    max_tokens: int
    """New tokens; end tokens are ignored, so this is also how many there will be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """How the rows of a workload are drawn; lengths are uniform, both bounds included."""

    name: str
    num_rows: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]


REGIMES = {
    regime.name: regime
    for regime in (
        Regime(name="fixed", num_rows=64, prompt_tokens=(20, 200), new_tokens=(64, 64)),
        Regime(name="natural", num_rows=256, prompt_tokens=(20, 600), new_tokens=(8, 256)),
        # Many rows through the slots, as a job has them; the command line has one max_tokens.
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
    """Cuts passages of an exact number of tokens; no two start at the same place."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._stream = tokenizer.encode([Text(corpus())], add_bos=False)
        self._starts: set[int] = set()

    def draw(self, num_tokens: int) -> tuple[str, tuple[int, ...]]:
        """Return a text and its token ids, `<bos>` included."""
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
