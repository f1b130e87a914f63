"""Prefix reuse on against off: many short rows behind one long instruction.

    python -m benchmarks.prefix --model models/gemma-3-270m

All rows begin with the same 500 tokens, go on with 40 tokens of their own, and ask for 8 new ones.
Both engines run in turn on one session; nothing is kept from one run to the next. The completions
must be equal to the last bit of their log-probabilities.
"""

import argparse
import random
import sys
import time

from beam_gemma.artifact import Artifact
from beam_gemma.engine import Engine, EngineConfig
from beam_gemma.sampling import SamplingParams
from beam_gemma.sequence import Completion, Request
from beam_gemma.session import Session
from beam_gemma.tokenizer import Tokenizer
from benchmarks.comparison import Bar, bar_lines
from benchmarks.table import table
from benchmarks.workload import SEED, Passages

PREFIX_TOKENS, OWN_TOKENS, NEW_TOKENS = 500, 40, 8
BAR = 5.0
PARAMS = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


def requests(tokenizer: Tokenizer, num_rows: int) -> list[Request]:
    """Return rows that share their first tokens."""
    passages = Passages(tokenizer, random.Random(f"{SEED} prefix"))
    prefix = passages.draw(PREFIX_TOKENS)[1]
    return [
        Request(
            request_id=str(i),
            # The passage's own <bos> makes room for nothing: it is left out.
            prompt_token_ids=prefix + passages.draw(OWN_TOKENS + 1)[1][1:],
            params=PARAMS,
        )
        for i in range(num_rows)
    ]


def measure(
    session: Session, rows: list[Request], *, reuse: bool
) -> tuple[float, int, int, list[Completion]]:
    """Return seconds, prompt tokens computed and reused, and the completions."""
    engine = Engine(session, EngineConfig(enable_prefix_caching=reuse))
    start = time.perf_counter()
    completions = engine.generate(rows)
    seconds = time.perf_counter() - start
    stats = engine.stats
    engine.close()
    return seconds, stats.num_prompt_tokens, stats.num_cached_tokens, completions


def main() -> int:
    """Run and print; return 1 if reuse changed a completion."""
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
    runs = {True: [], False: []}
    for _ in range(flags.repeats):
        for reuse in runs:
            runs[reuse].append(measure(session, rows, reuse=reuse))
    best = {reuse: min(turns, key=lambda turn: turn[0]) for reuse, turns in runs.items()}
    lines = [
        ("on" if reuse else "off", f"{flags.rows / seconds:.2f}", f"{seconds:.1f}",
         f"{max(turn[0] for turn in runs[reuse]):.1f}", f"{computed:,}", f"{reused:,}")
        for reuse, (seconds, computed, reused, _) in best.items()
    ]  # fmt: skip
    header = ("reuse", "rows/s", "best s", "worst s", "prompt tokens computed", "reused")
    print(table(header, lines))
    bar = Bar(name="rows/s on / off", value=best[False][0] / best[True][0], least=BAR)
    print(f"\n{bar_lines([bar])}")
    pairs = zip(best[True][3], best[False][3], strict=True)
    differing = sum(ours != theirs for ours, theirs in pairs)
    print(f"\nrows that differ: {differing} of {flags.rows}")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
