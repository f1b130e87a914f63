"""Measures row independence on a GPU: how many rows differ between conditions, and its cost.

    python -m benchmarks.gpu.rows --model models/gemma-3-270m-cuda --output out/gpu_rows.json
    python -m benchmarks.gpu.rows --model DIR --device cpu --rows 24 --slots 4 --output FILE

Short and long rows of random ids are completed greedily by one engine after another: all at once
(the base), each alone, shuffled, and with a cache so small that rows are preempted. Each row's
token ids, finish reason and log-probability bits are compared with the base. Then the same rows are
timed with decode steps of one width and of several (`cudagraph_capture_sizes`), all at once and a
few at a time, when padding matters; with several widths rows may differ, and these are counted too.
Exit code 1: a row differs with one width, or no row was preempted.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device
from beam_gemma.runtime.limits import Limits
from beam_gemma.runtime.open_session import open_session
from benchmarks.conditions import Outcome, outcome
from benchmarks.table import table

SEED = 20261122
PROMPTS, LONG_PROMPTS = (6, 40), (200, 600)
"""Bounds of prompt lengths in tokens; every tenth prompt is long."""
COMPLETIONS, WORDY = (8, 48), (100, 200)
"""Bounds of new tokens; every fifth row is wordy, to outgrow its share of a small cache."""
FEW = 8
"""Number of rows in a small batch."""
HEADER = ("run", "rows", "differ", "preemptions", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of one run over the rows."""

    run: str
    rows: int
    differ: int
    preemptions: int
    seconds: float


def draw_requests(vocab_size: int, longest: int, number: int) -> list[Request]:
    """Return requests that fit into a model's context."""
    rng = random.Random(SEED)
    requests = []
    for i in range(number):
        new = rng.randint(*(WORDY if i % 5 == 3 else COMPLETIONS))
        low, high = LONG_PROMPTS if i % 10 == 1 else PROMPTS
        length = min(rng.randint(low, high), longest - new)
        ids = tuple(rng.randrange(3, vocab_size) for _ in range(length))
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        requests.append(
            Request(request_id=str(i), prompt_token_ids=ids, params=params, logprob=True)
        )
    return requests


class Rows:
    """Runs the same rows under one condition after another."""

    def __init__(self, model: str, device: Device, number: int, slots: int) -> None:
        self._artifact = Artifact.open(model)
        self._device = device
        self._slots = slots
        signature = self._artifact.signature("generate", device)
        self._block_size = signature.block_size
        self._requests = draw_requests(signature.vocab_size, signature.max_model_len, number)
        self._base: dict[int, Outcome] = {}
        self.results: list[Result] = []

    def run(
        self,
        name: str,
        batches: Sequence[Sequence[int]],
        *,
        widths: tuple[int, ...] | None = None,
        num_blocks: int | None = None,
    ) -> Result:
        """Complete rows, one batch after another, and compare them with the first run.

        Args:
            name: Name of the run.
            batches: Indices of the rows that are submitted together.
            widths: Widths of decode steps; None for the default, a single width.
            num_blocks: Blocks of each cache; None for as many as memory allows.
        """
        engine = self._engine(widths, num_blocks)
        engine.generate(self._requests[:2])
        start = time.perf_counter()
        outcomes = {
            i: outcome(completion)
            for batch in batches
            for i, completion in zip(
                batch, engine.generate(self._requests[i] for i in batch), strict=True
            )
        }
        seconds = time.perf_counter() - start
        preemptions = engine.stats.num_preemptions
        engine.close()
        self._base = self._base or outcomes
        result = Result(
            run=name,
            rows=len(outcomes),
            differ=sum(self._base[i] != done for i, done in outcomes.items()),
            preemptions=preemptions,
            seconds=round(seconds, 3),
        )
        self.results.append(result)
        return result

    @property
    def tight(self) -> int:
        """Blocks of a cache that just holds the longest row, far too small to fill all slots."""
        longest = max(len(r.prompt_token_ids) + r.params.max_tokens for r in self._requests)
        return -(-longest // self._block_size) + 2

    def _engine(self, widths: tuple[int, ...] | None, num_blocks: int | None) -> Engine:
        limits = Limits(max_num_seqs=self._slots, cudagraph_capture_sizes=widths)
        session = open_session(self._artifact, "generate", self._device, limits)
        if num_blocks is not None:
            session.num_blocks = dict.fromkeys(session.num_blocks, num_blocks)
        return Engine(session, limits.engine_config(self._device))


def independence(rows: Rows, number: int) -> bool:
    """Run the conditions without allowed differences; return whether they held with preemptions."""
    order = list(range(number))
    shuffled = random.Random(SEED).sample(order, number)
    rows.run("all at once", [order])
    alone = rows.run("each alone", [[i] for i in order])
    mixed = rows.run("shuffled", [shuffled])
    pushed = rows.run("pushed out", [order], num_blocks=rows.tight)
    return pushed.preemptions > 0 and not any(r.differ for r in (alone, mixed, pushed))


def costs(rows: Rows, number: int, slots: int) -> None:
    """Time one width and several widths, for full and for small batches."""
    several = tuple(n for n in (8, 16, 32, 64, 128) if n < slots)
    order = list(range(number))
    small = [order[i : i + FEW] for i in range(0, min(number, 8 * FEW), FEW)]
    for name, batches in (("all at once", [order]), (f"{FEW} at a time", small)):
        rows.run(f"{name}, one width", batches, widths=(slots,))
        rows.run(f"{name}, widths {', '.join(map(str, several))} and {slots}", batches,
                 widths=(*several, slots))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run all conditions and print the table; return 1 if independence is violated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="exported folder with a graph to generate")
    add("--device", choices=["cpu", "cuda"], default="cuda", help="(default: %(default)s)")
    add("--rows", type=int, default=1000, help="(default: %(default)s)")
    add("--slots", type=int, default=256, help="(default: %(default)s)")
    add("--output", type=Path, required=True, help="JSON file")
    flags = parser.parse_args(argv)
    rows = Rows(flags.model, flags.device, flags.rows, flags.slots)
    is_clean = independence(rows, flags.rows)
    if flags.device == "cuda":
        costs(rows, flags.rows, flags.slots)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps([asdict(r) for r in rows.results], indent=1) + "\n")
    lines = [
        [r.run, f"{r.rows:,}", f"{r.differ:,}", f"{r.preemptions:,}", f"{r.seconds:.2f}"]
        for r in rows.results
    ]
    print(table(HEADER, lines))
    return int(not is_clean)


if __name__ == "__main__":
    sys.exit(main())
