"""Compares prefix reuse on and off: many short rows after one long instruction.

    python -m benchmarks.prefix --model models/gemma-3-270m

All rows begin with the same 500 tokens, continue with 40 tokens of their own, and request 8 new
tokens. Both engines run in turn on one session; nothing is kept from one run to the next. The
completions must be bit-identical, including their log-probabilities.
"""

import argparse
import random
import sys
import time
from dataclasses import dataclass

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig
from benchmarks.comparison import Bar, bar_lines
from benchmarks.table import table
from benchmarks.workload import SEED, Passages

PREFIX_TOKENS, OWN_TOKENS, NEW_TOKENS = 500, 40, 8
BAR = 5.0
PARAMS = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


def requests(tokenizer: Tokenizer, num_rows: int) -> list[Request]:
    """Return requests that share their first tokens."""
    passages = Passages(tokenizer, random.Random(f"{SEED} prefix"))
    prefix = passages.draw(PREFIX_TOKENS)[1]
    return [
        Request(
            request_id=str(i),
            # Drop the <bos> at the start of the passage.
            prompt_token_ids=prefix + passages.draw(OWN_TOKENS + 1)[1][1:],
            params=PARAMS,
            logprob=True,
        )
        for i in range(num_rows)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One run over all rows."""

    secs: float
    num_computed: int
    """Number of computed prompt tokens."""
    num_reused: int
    """Number of reused prompt tokens."""
    completions: list[Completion]


def measure(session: Session, rows: list[Request], *, reuse: bool) -> Turn:
    """Run all rows on a fresh engine."""
    engine = Engine(session, EngineConfig(enable_prefix_caching=reuse))
    start = time.perf_counter()
    completions = engine.generate(rows)
    secs = time.perf_counter() - start
    engine.close()
    return Turn(
        secs=secs,
        num_computed=engine.stats.num_prompt_tokens,
        num_reused=engine.stats.num_cached_tokens,
        completions=completions,
    )


def report(on: list[Turn], off: list[Turn]) -> str:
    """Return the table, the ratio with its target, and the number of differing rows."""
    lines, best = [], []
    for name, turns in (("on", on), ("off", off)):
        secs = [turn.secs for turn in turns]
        best.append(turns[secs.index(min(secs))])
        rate = len(best[-1].completions) / min(secs)
        counts = f"{best[-1].num_computed:,}", f"{best[-1].num_reused:,}"
        lines.append((name, f"{rate:.2f}", f"{min(secs):.1f}", f"{max(secs):.1f}", *counts))
    header = ("reuse", "rows/s", "best s", "worst s", "prompt tokens computed", "reused")
    bar = Bar(name="rows/s on / off", value=best[1].secs / best[0].secs, least=BAR)
    num_rows = len(best[0].completions)
    differing = f"rows that differ: {num_differing(*best)} of {num_rows}"
    return "\n\n".join([table(header, lines), bar_lines([bar]), differing])


def num_differing(one: Turn, other: Turn) -> int:
    """Return the number of completions that are not bit-identical."""
    return sum(a != b for a, b in zip(one.completions, other.completions, strict=True))


def main() -> int:
    """Run both engines and print the report; return 1 if reuse changed a completion."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="exported model folder")
    parser.add_argument("--rows", type=int, default=128, help="rows (default: 128)")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each (default: 2)")
    flags = parser.parse_args()
    artifact, config = Artifact.open(flags.model), EngineConfig()
    session = Session.of(
        artifact,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    rows = requests(Tokenizer.from_file(artifact.tokenizer_path), flags.rows)
    measure(session, rows[:1], reuse=False)
    on, off = [], []
    for _ in range(flags.repeats):
        on.append(measure(session, rows, reuse=True))
        off.append(measure(session, rows, reuse=False))
    print(report(on, off))
    return int(num_differing(on[0], off[0]) > 0)


if __name__ == "__main__":
    sys.exit(main())
