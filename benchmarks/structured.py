"""Measures the cost of constraints: free text, constrained text and objects, with transformers.

    python -m benchmarks.structured --model models/gemma-3-270m --checkpoint gemma-3-270m.gguf

Three kinds of rows take turns on one engine, with the same prompts: unconstrained text, text with a
minimum number of characters (every step of every row has a mask, nothing is forced), and an object
of a JSON Schema (keys and punctuation are forced and take no step). transformers generates the same
objects with a logits processor that uses the same library and regular expression; of a few batch
sizes, the fastest counts. Everything is float32, greedy, in this process.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import numpy as np
import torch
import transformers
from llguidance.numpy import apply_token_bitmask_inplace, fill_next_token_bitmask

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.runtime.limits import Limits
from beam_gemma.structured.constraint import Constraint, Guide
from beam_gemma.structured.grammar import ANY_CHAR, Repeat
from beam_gemma.structured.json_schema import compile_schema
from beam_gemma.tasks.open_model import start_engine
from benchmarks.comparison import Bar, bar_lines
from benchmarks.padding import padded
from benchmarks.reviews import SAMPLE, first_rows
from benchmarks.table import table
from benchmarks.weights import transformers_folder

MAX_NUM_SEQS = 64
MAX_TOKENS = 96
MIN_CHARACTERS = 400
BATCH_SIZES = (16, 64)
RATE_BAR = 0.91
"""Least ratio of token rates: constrained text may take a tenth more time per token."""
SCHEMA = {
    "type": "object",
    "properties": {
        "sentiment": {"enum": ["positive", "negative", "neutral"]},
        "confidence": {"type": "integer", "minimum": 0, "maximum": 10},
        "topics": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
        "summary": {"type": "string", "maxLength": 120},
    },
    "required": ["sentiment", "confidence", "topics", "summary"],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One run over all prompts."""

    system: str
    secs: float
    completions: list[tuple[int, ...]]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all completions."""
        return sum(map(len, self.completions))

    @property
    def cost(self) -> float:
        """Milliseconds per token."""
        return 1e3 * self.secs / self.num_tokens


class Processor(transformers.LogitsProcessor):
    """Masks the logits of a batch with one guide per row."""

    def __init__(self, guides: list[Guide], width: int, end_token_id: int) -> None:
        self._guides = guides
        self._width = width
        self._end_token_id = end_token_id
        self._masks = np.zeros((1, (guides[0].vocab_size + 31) // 32), np.int32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Pass each row's last token to its guide and mask tokens that may not follow."""
        logits = scores.numpy()
        for row, guide in enumerate(self._guides):
            if input_ids.shape[1] > self._width and not guide.is_final:
                guide.take(int(input_ids[row, -1]))
            if guide.is_final:
                logits[row] = -np.inf
                logits[row, self._end_token_id] = 0
                continue
            fill_next_token_bitmask(guide.matcher, self._masks)
            apply_token_bitmask_inplace(logits[row : row + 1], self._masks)
        return scores


def run_ours(engine: Engine, system: str, requests: list[Request]) -> Turn:
    """Complete all requests with our engine; exit if one fails."""
    start = time.perf_counter()
    completions = engine.generate(requests)
    secs = time.perf_counter() - start
    failed = [c.error for c in completions if c.error is not None]
    if failed:
        sys.exit(f"{system}: {failed[0]}")
    return Turn(system=system, secs=secs, completions=[c.token_ids for c in completions])


@torch.inference_mode()
def run_theirs(
    model: transformers.PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    constraint: Constraint,
    batch_size: int,
) -> Turn:
    """Generate objects with transformers, batch by batch; prompts must be sorted by length."""
    end_token_id = min(constraint.end_token_ids)
    completions: list[tuple[int, ...]] = []
    start = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        ids, mask = padded(batch)
        width = ids.shape[1]
        guides = [constraint.start() for _ in batch]
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=end_token_id,
            logits_processor=[Processor(guides, width, end_token_id)],
        )
        completions += [_until(end_token_id, new) for new in output[:, width:].tolist()]
    secs = time.perf_counter() - start
    system = f"transformers, objects, {batch_size} at once"
    return Turn(system=system, secs=secs, completions=completions)


def _until(end_token_id: int, ids: list[int]) -> tuple[int, ...]:
    return tuple(ids[: ids.index(end_token_id)] if end_token_id in ids else ids)


def requests_of(prompts: Sequence[tuple[int, ...]], constraint: Constraint | None) -> list[Request]:
    """Return a request for each prompt."""
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=constraint is None)
    return [
        Request(request_id=str(i), prompt_token_ids=ids, params=params, constraint=constraint)
        for i, ids in enumerate(prompts)
    ]


def prompts_of(tokenizer: Tokenizer, path: str, number: int) -> list[tuple[int, ...]]:
    """Return prompts about reviews, the longest first."""
    texts = [row["sentence"] for row in first_rows(path, number)]
    prompts = [
        tuple(tokenizer.encode([Text(f"Review: {text}\nThe review as JSON:\n")])) for text in texts
    ]
    return sorted(prompts, key=len, reverse=True)


def check(turn: Turn, tokenizer: Tokenizer) -> None:
    """Raise an error if an object is not valid."""
    for ids in turn.completions:
        jsonschema.validate(compile_schema(SCHEMA).parse(tokenizer.decode(ids)), SCHEMA)


def main() -> None:
    """Run all turns and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="exported model folder")
    add("--checkpoint", type=Path, help="GGUF file that it was exported from (default: no peer)")
    add("--input", default=str(SAMPLE), help="reviews: sentence")
    add("--rows", type=int, default=128, help="prompts (default: %(default)s)")
    add("--repeats", type=int, default=3, help="turns of ours (default: %(default)s)")
    flags = parser.parse_args()
    artifact = Artifact.open(flags.model)
    tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
    prompts = prompts_of(tokenizer, flags.input, flags.rows)
    ends = artifact.eos_token_ids
    constraints = {
        "free text": None,
        "constrained text": Constraint(Repeat(ANY_CHAR, MIN_CHARACTERS, None), tokenizer, ends),
        "objects": Constraint(compile_schema(SCHEMA).language, tokenizer, ends),
    }
    turns: dict[str, list[Turn]] = {name: [] for name in constraints}
    config = Limits(max_num_seqs=MAX_NUM_SEQS)
    with closing(start_engine(artifact, "generate", "cpu", config)) as engine:
        for name, constraint in constraints.items():
            run_ours(engine, name, requests_of(prompts[:2], constraint))
        for _ in range(flags.repeats):
            for name, constraint in constraints.items():
                turns[name].append(run_ours(engine, name, requests_of(prompts, constraint)))
    check(turns["objects"][0], tokenizer)
    theirs = []
    if flags.checkpoint is not None:
        folder = transformers_folder(flags.checkpoint, Path(flags.model))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = [run_theirs(model, prompts, constraints["objects"], n) for n in BATCH_SIZES]
    print(report(turns, theirs))


def report(turns: dict[str, list[Turn]], theirs: list[Turn]) -> str:
    """Return a table of all turns, and the ratios with their targets."""
    costs = {name: statistics.median(turn.cost for turn in own) for name, own in turns.items()}
    lines = [
        (turn.system, f"{turn.secs:.1f}", f"{turn.num_tokens:,}", f"{turn.cost:.2f}")
        for turn in (*(turn for own in turns.values() for turn in own), *theirs)
    ]
    rate = costs["free text"] / costs["constrained text"]
    bars = [Bar(name="tokens/s, constrained / free text", value=rate, least=RATE_BAR)]
    if theirs:
        ours, peer = (min(turn.secs for turn in own) for own in (turns["objects"], theirs))
        bars.append(Bar(name="objects/s, ours / transformers", value=peer / ours, least=1.0))
    return "\n\n".join([table(("rows", "s", "tokens", "ms per token"), lines), bar_lines(bars)])


if __name__ == "__main__":
    main()
