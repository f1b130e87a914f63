"""Compares seconds and memory of long prompts: RecurrentGemma, transformers' and a Gemma.

    python -m benchmarks.recurrent --folder /tmp/recurrent --output out/recurrent.json

All models have the shapes of RecurrentGemma 2B, random weights and a small vocabulary, cut to
`NUM_LAYERS` layers: two recurrent blocks to one attention block, and for Gemma attention over all
earlier tokens alone. One prompt at a time is completed by `NEW_TOKENS` tokens, each length and
system in its own process, in float32.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.rate import matrix_rate
from benchmarks.runs import Step, Timeline, last_words, peak_bytes
from benchmarks.table import table

NUM_LAYERS = 3
NEW_TOKENS = 33
VOCAB = 512
SHAPES = {
    "hidden_size": 2560,
    "num_attention_heads": 10,
    "num_key_value_heads": 1,
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": VOCAB,
}
WIDE = 7680
"""Width of the feed-forward blocks."""
MODELS = {
    "recurrent": {
        "model_type": "recurrent_gemma",
        **SHAPES,
        "intermediate_size": 2 * WIDE,
        "attention_window_size": 2048,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "gemma": {
        "model_type": "gemma",
        **SHAPES,
        "head_dim": 256,
        "intermediate_size": WIDE,
        "max_position_embeddings": 131072,
    },
}
SYSTEMS = {"ours": "recurrent", "transformers": "recurrent", "ours, Gemma": "gemma"}
"""Model of each system."""
HEADER = ("system", "prompt", "prompt, s", "of the rate", "new token, ms", "memory, GB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The time and memory of one run."""

    prompt_secs: float
    token_secs: float
    """Mean time of a decode step."""
    grown_bytes: int
    """Peak memory beyond that of the loaded model, warm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Models and systems of a benchmark, each of which completes one long prompt at a time."""

    module: str
    """Module of the benchmark, which runs each system in a process of its own."""
    models: Mapping[str, Mapping[str, Any]]
    """Content of the config.json of each model."""
    systems: Mapping[str, str]
    """Model of each system; names of systems begin with `ours` or `transformers`."""
    operations: Callable[[str], int]
    """Function that returns, for the name of a system, the floating-point operations that its
    matrices take for each token of a prompt, those of the head left out."""
    lengths: tuple[int, ...]
    """Lengths of prompts in tokens, unless others are asked for."""


def prepare(folder: Path, models: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a checkpoint of each model with random weights, and export it."""
    import torch
    import transformers

    from export.__main__ import export, hide_messages
    from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

    hide_messages()
    shutil.rmtree(folder, ignore_errors=True)
    for name, raw in models.items():
        checkpoint = folder / f"{name}.checkpoint"
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(**raw)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(checkpoint)
        (checkpoint / "config.json").write_text(json.dumps(raw))
        (checkpoint / "tokenizer.model").write_bytes(tiny_tokenizer_model())
        export(checkpoint, folder / name, tasks=("generate",), checksums="later")


def prompt_of(num_tokens: int) -> tuple[int, ...]:
    """Return a prompt of this many tokens that repeats late."""
    return tuple(4 + (i * i + 7 * i) % (VOCAB - 8) for i in range(num_tokens))


def run_ours(folder: Path, model: str, num_tokens: int) -> Figures:
    """Complete one prompt on our engine."""
    from beam_gemma.engine.engine import Engine
    from beam_gemma.engine.sampling import SamplingParams
    from beam_gemma.engine.sequence import Request
    from beam_gemma.model.artifact import Artifact
    from beam_gemma.runtime.cpu_session import Session
    from beam_gemma.runtime.limits import EngineConfig

    config = EngineConfig(max_num_seqs=1)
    session = Session.of(
        Artifact.open(folder / model),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    timeline = Timeline()
    engine = Engine(session, config, on_step=timeline.add)

    def complete(length: int, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        ids = prompt_of(length)
        engine.generate([Request(request_id="long", prompt_token_ids=ids, params=params)])

    complete(64, 2)
    before = psutil.Process().memory_info().rss
    timeline.restart()
    complete(num_tokens, NEW_TOKENS)
    engine.close()
    return _figures(timeline.steps, before)


def run_transformers(folder: Path, model: str, num_tokens: int) -> Figures:
    """Complete one prompt with transformers' `generate`."""
    import torch
    import transformers

    from benchmarks.run_transformers import Clock

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder / f"{model}.checkpoint", dtype=torch.float32
    )
    loaded.generation_config.eos_token_id = None
    loaded.generation_config.pad_token_id = 0

    def complete(length: int, max_tokens: int) -> list[Step]:
        clock = Clock()
        ids = torch.tensor([prompt_of(length)])
        with torch.inference_mode():
            loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        times = clock.times
        return [
            Step(now - then, length if i == 0 else 0, 1)
            for i, (then, now) in enumerate(itertools.pairwise(times))
        ]

    complete(64, 2)
    before = psutil.Process().memory_info().rss
    return _figures(complete(num_tokens, NEW_TOKENS), before)


def _figures(steps: list[Step], before: int) -> Figures:
    prompt = sum(step.seconds for step in steps if step.prompt_tokens)
    decode = [step.seconds for step in steps if not step.prompt_tokens]
    return Figures(
        prompt_secs=prompt,
        token_secs=sum(decode) / len(decode),
        grown_bytes=max(0, peak_bytes() - before),
    )


def operations(system: str) -> int:
    """Return the floating-point operations of all matrices per prompt token, without the head."""
    model = SYSTEMS[system]
    hidden, heads = SHAPES["hidden_size"], SHAPES["num_attention_heads"]
    feed_forward = 3 * hidden * WIDE
    attention = hidden * 256 * (2 * heads + 2 * SHAPES["num_key_value_heads"])
    gates = 2 * hidden * hidden // heads
    recurrent = 3 * hidden * hidden + gates
    blocks = [recurrent, recurrent, attention] if model == "recurrent" else [attention] * NUM_LAYERS
    return 2 * sum(block + feed_forward for block in blocks)


def run_apart(module: str, folder: Path, system: str, num_tokens: int) -> Figures:
    """Run one system on one length in a new process.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", module, "--folder", str(folder)]
    command += ["--system", system, "--tokens", str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{system} at {num_tokens}: {last_words(done)}")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def compare(of: Comparison, folder: Path, lengths: list[int]) -> list[dict[str, Any]]:
    """Run all systems on all lengths, shortest first; return their figures."""
    results = []
    for num_tokens in lengths:
        for system in of.systems:
            rate = matrix_rate()
            figures = run_apart(of.module, folder, system, num_tokens)
            work = of.operations(system) * num_tokens
            results.append(
                {
                    "system": system,
                    "tokens": num_tokens,
                    "prompt_secs": figures.prompt_secs,
                    "share_of_rate": work / figures.prompt_secs / rate,
                    "token_secs": figures.token_secs,
                    "grown_bytes": figures.grown_bytes,
                }
            )
            print(json.dumps(results[-1]), file=sys.stderr)
    return results


def main(of: Comparison, description: str | None) -> None:
    """Prepare the models if needed, run everything and print the table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, required=True, help="Where models are written.")
    parser.add_argument("--tokens", type=int, nargs="+", default=of.lengths)
    parser.add_argument("--output", type=Path, help="JSON file for the figures.")
    parser.add_argument("--system", choices=list(of.systems), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.system:
        run = run_transformers if args.system.startswith("transformers") else run_ours
        figures = run(args.folder, of.systems[args.system], args.tokens[0])
        print(json.dumps({name: getattr(figures, name) for name in Figures.__dataclass_fields__}))
        return
    if not all((args.folder / name).exists() for name in of.models):
        prepare(args.folder, of.models)
    results = compare(of, args.folder, args.tokens)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1))
    rows = [
        [
            r["system"],
            f"{r['tokens']:,}",
            f"{r['prompt_secs']:.1f}",
            f"{r['share_of_rate']:.2f}",
            f"{1000 * r['token_secs']:.0f}",
            f"{r['grown_bytes'] / 1e9:.2f}",
        ]
        for r in results
    ]
    print(table(HEADER, rows))


COMPARISON = Comparison(
    module="benchmarks.recurrent",
    models=MODELS,
    systems=SYSTEMS,
    operations=operations,
    lengths=(2048, 8192, 32768),
)


if __name__ == "__main__":
    main(COMPARISON, __doc__)
