"""Compares generation on the CPU: our engine and pipeline with transformers and llama.cpp.

    python -m benchmarks.generate --model models/gemma-3-270m --checkpoint models/gemma-3-270m.gguf

All systems complete the same prompts greedily, with the same weights in float32 (`llama.cpp-gguf`:
quantized, as in the file) and the same number of new tokens per row; end tokens are ignored, so the
work is equal. Each run has its own process, and so its own peak memory. The systems take turns,
`--repeats` times; the table shows each system's best run and the spread of its repetitions. In the
first turn transformers and llama.cpp run with every batch size, afterwards, also in later regimes,
only with the fastest. The machine's rate at one large float32 product is measured before and after.

- `prompt tok/s`, `new tok/s`: rates in steps with and without prompt tokens.
- `of rate`: operations per second of the model's matrices for useful tokens, divided by the rate of
  the large product; in decode steps and in all steps.
- `work s`: first prompt to last token, without start (loading, a warm-up row) and tail.
- `occupancy`: share of slots with useful tokens in decode steps; `while waiting`: while rows wait.
- `same rows`: rows whose tokens all equal our engine's.

The pipeline has one `--max_tokens` for all rows, so it runs only in regimes with one length. Its
steady state, all steps after the first, is compared with the engine's.

llama.cpp needs `pip install -e '.[benchmarks]'`, which compiles for about 15 minutes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.tokenizer import Tokenizer
from benchmarks.comparison import Comparison, bar_lines
from benchmarks.rate import Operations, matrix_rate
from benchmarks.runs import Job, Run, run_system
from benchmarks.workload import REGIMES, Regime, Row, draw_rows

MODULES = {
    "engine": "benchmarks.run_engine",
    "pipeline": "benchmarks.run_pipeline",
    "transformers": "benchmarks.run_transformers",
    "llama.cpp": "benchmarks.run_llama_cpp",
    "llama.cpp-gguf": "benchmarks.run_llama_cpp",
}
OURS = ("engine", "pipeline")
SLOTS = 64
"""Number of slots of our engine."""


class Bench:
    """Runs systems in turn and remembers each system's fastest batch size."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags = flags
        self._weights = weights_of(flags)
        self._sizes = {
            system: [SLOTS] if system in OURS else list(flags.batch_sizes)
            for system in flags.systems
        }

    def measure(self, regime: Regime, rows: list[Row]) -> dict[str, list[Run]]:
        """Return all runs of a regime, by system."""
        systems = [s for s in self._flags.systems if fits(s, regime)]
        runs: dict[str, list[Run]] = {system: [] for system in systems}
        for _ in range(self._flags.repeats):
            for system in systems:
                runs[system] += [
                    self._run(system, size, rows, regime) for size in self._sizes[system]
                ]
                best = min(runs[system], key=lambda run: run.work_secs)
                self._sizes[system] = [best.batch_size]
        return runs

    def _run(self, system: str, batch_size: int, rows: list[Row], regime: Regime) -> Run:
        weights = self._weights.get(system, "")
        job = Job(
            model=self._flags.model,
            weights=weights,
            rows=rows,
            batch_size=batch_size,
            sort_by=self._flags.sort_by,
        )
        run = run_system(MODULES[system], job)
        sys.stderr.write(
            f"{regime.name}: {system}, batch {batch_size}: {run.work_secs:.1f} s of work, "
            f"{run.decode_rate:.0f} new tok/s\n"
        )
        return run


def fits(system: str, regime: Regime) -> bool:
    """Return whether a system runs in a regime."""
    if system == "pipeline":
        fewest, most = regime.new_tokens
        return fewest == most
    return system in OURS or regime.name != "table"


def weights_of(flags: argparse.Namespace) -> dict[str, str]:
    """Return the path of the weights for each system that needs its own format."""
    if set(flags.systems) <= set(OURS):
        return {}
    # Imported here, so that our own systems can run without transformers and torch.
    from benchmarks.weights import f32_gguf, transformers_folder

    forms = {
        "transformers": transformers_folder,
        "llama.cpp": f32_gguf,
        "llama.cpp-gguf": lambda checkpoint, _: checkpoint,
    }
    model = Path(flags.model)
    return {
        system: str(form(flags.checkpoint, model))
        for system, form in forms.items()
        if system in flags.systems
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="exported model folder")
    add("--checkpoint", type=Path, help="GGUF file that it was exported from")
    add("--regimes", type=_listed(REGIMES), default=["fixed", "natural"], help=", ".join(REGIMES))
    add("--systems", type=_listed(MODULES), default=list(MODULES), help=", ".join(MODULES))
    add("--repeats", type=int, default=3, help="turns of each system")
    add("--rows", type=int, help="only the first rows of each regime, to try it")
    add("--batch_sizes", type=_numbers, default=[16, 32, 64], help="of the other systems")
    add(
        "--sort_by",
        choices=["prompt_tokens", "max_tokens"],
        default="prompt_tokens",
        help="order of transformers' rows (default: prompt_tokens)",
    )
    add("--record", type=Path, help="JSON file for every run with all its steps")
    flags = parser.parse_args(argv)
    if flags.checkpoint is None and not set(flags.systems) <= set(OURS):
        parser.error("--checkpoint: expected a GGUF file for the other systems, got none")
    return flags


def main() -> None:
    """Run all regimes and print the tables."""
    flags = parse()
    artifact = Artifact.open(flags.model)
    tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
    bench = Bench(flags)
    before = matrix_rate()
    runs, descriptions = {}, {}
    for name in flags.regimes:
        rows = draw_rows(REGIMES[name], tokenizer, flags.rows)
        descriptions[name] = describe(name, rows)
        runs[name] = bench.measure(REGIMES[name], rows)
    after = matrix_rate()
    print(f"one float32 product: {before / 1e9:.0f} GFLOP/s before, {after / 1e9:.0f} after")
    for name, by_system in runs.items():
        comparison = Comparison(
            regime=name,
            runs=by_system,
            operations=Operations.of(artifact.config),
            rate=max(before, after),
        )
        print(f"\n{descriptions[name]}\n\n{comparison.lines()}")
        if bars := comparison.bars():
            print(f"\n{bar_lines(bars)}")
    if flags.record:
        write_record(flags.record, {"matrix_rate": [before, after]}, runs)


def describe(name: str, rows: Sequence[Row]) -> str:
    """Return a one-line summary of a workload."""
    lengths = [len(row.prompt_token_ids) for row in rows]
    new = [row.max_tokens for row in rows]
    return (
        f"{name}: {len(rows)} rows, prompts of {min(lengths)} to {max(lengths)} tokens "
        f"({sum(lengths):,} in all), {min(new)} to {max(new)} new ones ({sum(new):,})"
    )


def write_record(path: Path, facts: dict, runs: dict[str, dict[str, list[Run]]]) -> None:
    """Write every run, with all its steps, as JSON."""
    as_dicts = {
        regime: {system: [asdict(run) for run in many] for system, many in by_system.items()}
        for regime, by_system in runs.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | {"runs": as_dicts}) + "\n")


def _listed(known: Sequence[str] | dict) -> object:
    """Return a parser of comma-separated names."""

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"expected {', '.join(known)}, got {unknown[0]}")
        return chosen

    return names


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
