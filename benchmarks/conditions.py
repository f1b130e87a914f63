"""Conditions under which a row must give the same bits, and the process that runs one of them.

python -m benchmarks.conditions shuffled --model DIR --rows 2000 --sample 200 --output FILE
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.engine.stats import EngineStats
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.runtime.capacity import Capacity, num_slots
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig
from benchmarks.workload import SEED, Passages

SHARED_TOKENS, DEEP_TOKENS = 64, 500
"""Lengths of two shared prefixes; rows with the second outgrow a window of 512 tokens."""
OWN_TOKENS = 40
SHORT, LONG = (6, 20), (150, 200)
"""Bounds of prompt lengths, in tokens."""
BRIEF, WORDY = (3, 6), (40, 48)
"""Bounds of completion lengths, in tokens."""
SMALL_CACHE = 96
"""Blocks per group: too few for the wordy rows, which therefore preempt one another."""
Outcome = tuple[list[int], str, str]
"""Token ids, finish reason and the bits of the log-probability."""


def anything(_: EngineStats) -> bool:
    """Accept any run."""
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One way to run the rows; fields left at their default are as in the base run."""

    config: EngineConfig = field(default_factory=EngineConfig)
    num_blocks: int | None = None
    """Cache blocks per group; None for as many as memory allows."""
    num_threads: int = 0
    """Threads per operator; 0 for one per core."""
    num_processes: int = 1
    """Number of simultaneous processes that share the rows."""
    shuffled: bool = False
    alone: bool = False
    """If true, each row waits for the previous one to end."""
    slow: bool = False
    """If true, only a sample of the rows runs, to save time."""
    sampled: bool = False
    holds: Callable[[EngineStats], bool] = anything
    """Function that returns whether a run met the condition, such as having preemptions."""


CONDITIONS = {
    "base": Condition(holds=lambda stats: stats.num_cached_tokens > 0),
    "alone": Condition(alone=True, slow=True, config=EngineConfig(enable_prefix_caching=False)),
    "shuffled": Condition(shuffled=True),
    "small-cache": Condition(num_blocks=SMALL_CACHE, holds=lambda stats: stats.num_preemptions > 0),
    "chunk-16": Condition(config=EngineConfig(max_num_seqs=16, max_num_batched_tokens=16)),
    "chunk-512": Condition(config=EngineConfig(max_num_batched_tokens=512)),
    "no-reuse": Condition(
        config=EngineConfig(enable_prefix_caching=False),
        holds=lambda stats: stats.num_cached_tokens == 0,
    ),
    "threads-1": Condition(num_threads=1),
    "threads-2": Condition(num_threads=2),
    # More threads than cores spin while they wait: ten times slower than two threads.
    "threads-16": Condition(num_threads=16, slow=True),
    "two-processes": Condition(num_processes=2, num_threads=1),
    "sampled-base": Condition(sampled=True),
    "sampled-shuffled": Condition(sampled=True, shuffled=True),
    "sampled-chunk-512": Condition(
        sampled=True, config=EngineConfig(max_num_seqs=32, max_num_batched_tokens=512)
    ),
}


def base_of(name: str) -> str:
    """Return the base condition whose outcomes a condition must reproduce."""
    return "sampled-base" if CONDITIONS[name].sampled else "base"


def draw_requests(tokenizer: Tokenizer, num_rows: int, *, sampled: bool) -> list[Request]:
    """Return requests: a third with a shared prefix, a few long or wordy, most short."""
    rng = random.Random(f"{SEED} invariance")
    passages = Passages(tokenizer, rng)
    shared, deep = (passages.draw(num_tokens)[1] for num_tokens in (SHARED_TOKENS, DEEP_TOKENS))
    marks = tuple(tokenizer.encode([Text(mark)], add_bos=False)[0] for mark in ".,")
    requests = []
    for i in range(num_rows):
        ids = passages.draw(rng.randint(*(LONG if i % 100 == 1 else SHORT)))[1]
        if i % 100 == 51:
            ids = deep + passages.draw(OWN_TOKENS)[1][1:]
        elif i % 3 == 0:
            ids = shared + ids[1:]
        params = SamplingParams(
            max_tokens=rng.randint(*(WORDY if i % 20 == 2 else BRIEF)),
            # Makes some rows stop early, with any model.
            stop_token_ids=marks if i % 4 == 0 else (),
            **(draw_settings(i) if sampled else {}),
        )
        requests.append(
            Request(
                request_id=str(i),
                prompt_token_ids=ids,
                params=params,
                sampling_key=str(i),
                logprob=True,
            )
        )
    return requests


def draw_settings(i: int) -> dict[str, float]:
    """Return the sampling settings of a row: with top-k, with top-p, or with neither."""
    return {"temperature": 0.8, "seed": 7} | [{"top_k": 40}, {"top_p": 0.9}, {}][i % 3]


def outcome(completion: Completion) -> Outcome:
    """Return the part of a completion that must be bit-identical."""
    assert completion.logprob is not None, completion.error
    return list(completion.token_ids), completion.finish_reason, completion.logprob.hex()


def chosen(condition: Condition, num_rows: int, *, sample: int, part: int) -> list[int]:
    """Return the row numbers of one process, in order of submission."""
    rng = random.Random(SEED)
    rows = list(range(num_rows))
    if condition.slow and sample < num_rows:
        rows = sorted(rng.sample(rows, sample))
    rows = rows[part :: condition.num_processes]
    if condition.shuffled:
        rng.shuffle(rows)
    return rows


def open_session(artifact: Artifact, condition: Condition) -> Session:
    """Load the model with a condition's settings."""
    if condition.num_blocks is None:
        return Session.of(
            artifact,
            max_num_seqs=condition.config.max_num_seqs,
            max_num_batched_tokens=condition.config.max_num_batched_tokens,
            num_threads=condition.num_threads,
        )
    signature = artifact.signature("generate", "cpu")
    capacity = Capacity(
        num_blocks={state.group: condition.num_blocks for state in signature.paged_states},
        num_state_slots=num_slots(signature, condition.config.max_num_seqs),
    )
    return Session(
        str(artifact.graph_path("generate", "cpu")),
        signature,
        capacity,
        num_threads=condition.num_threads,
    )


def main() -> None:
    """Run one part of one condition."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("condition", choices=CONDITIONS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--sample", type=int, required=True)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    condition, artifact = CONDITIONS[flags.condition], Artifact.open(flags.model)
    tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
    requests = draw_requests(tokenizer, flags.rows, sampled=condition.sampled)
    order = chosen(condition, flags.rows, sample=flags.sample, part=flags.part)
    engine = Engine(open_session(artifact, condition), condition.config)
    start = time.perf_counter()
    batches = [[i] for i in order] if condition.alone else [order]
    outcomes = {
        i: outcome(completion)
        for batch in batches
        for i, completion in zip(batch, engine.generate(requests[i] for i in batch), strict=True)
    }
    stats = engine.stats
    answer = {
        "outcomes": outcomes,
        "seconds": time.perf_counter() - start,
        "preemptions": stats.num_preemptions,
        "cached_tokens": stats.num_cached_tokens,
        "holds": condition.holds(stats),
    }
    flags.output.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
