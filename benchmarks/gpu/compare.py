"""Benchmarks a GPU in one command and under eight minutes; prints a table and writes JSON.

    python -m benchmarks.gpu.compare --folder models/gpu-benchmark --output out/gpu.json
    python -m benchmarks.gpu.compare --smoke --folder DIR --output FILE    (tiny models, CPU)

- `generate`: Gemma 3 270M, and the shapes of 1B and 4B with random weights; 256 requests, prompts
  and completions of 100 to 1,024 tokens, end tokens ignored, so the work is fixed.
- `classify`: 2,000 rows after 512 shared tokens, 3 labels of one token.
- `embed`: the shapes of EmbeddingGemma 300M; texts of log-normal lengths.

Each case also runs on transformers, in batches and with continuous batching, and on vLLM if it is
installed; every system has its own process. First the card's own rates are measured: one large
matrix product and a copy within its memory. These rates and the operations and bytes counted in
`benchmarks/floors.py` give the floor, the least time for the work: completions read weights and
caches once per decode step, everything else is products. `of the floor` is the floor divided by the
measured time; `decode` is the same for decode steps alone, if a system reports them.

Our systems run first, for all cases, then the others. Runs that do not fit into the time budget are
left out and marked in the table. The budget includes making models that the folder lacks. `--model`
takes an exported 270M with its real weights in place of random ones; `--only` and `--systems` run a
part. `benchmarks.gpu.rows` measures row independence and its cost.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.embed import operations as embed_operations
from benchmarks.floors import Rates, classify_operations, generate_floor
from benchmarks.gpu import models, work
from benchmarks.gpu.systems import is_installed
from benchmarks.gpu.work import FULL_SCALE, SMOKE, Job, Scale
from benchmarks.runs import last_words
from benchmarks.table import table
from export.__main__ import hide_messages
from export.checkpoints.released_sizes import SIZES, Size

BUDGET_SECS = 450.0
LEAST_SECS = 15.0
"""Least remaining time, in seconds, to start another system."""
HEADER = ("case", "system", "start s", "seconds", "rows/s", "tok/s", "floor s", "of the floor",
          "decode", "ours is faster")  # fmt: skip
COMPLETING = ("engine", "transformers generate_batch", "vLLM", "transformers generate")
SYSTEMS = {
    "generate": COMPLETING,
    "classify": ("engine, scores", "transformers forward"),
    "embed": ("embedder", "transformers embed"),
}
"""Systems of each task in order of running, ours first."""
CASES = {
    "270M": ("generate", "Gemma 3 270M"),
    "1B": ("generate", "Gemma 3 1B"),
    "4B": ("generate", "Gemma 3 4B"),
    "classify": ("classify", "Gemma 3 270M"),
    "embed": ("embed", "EmbeddingGemma 300M"),
}
TINY = {
    "model_type": "gemma3_text", "vocab_size": 300, "hidden_size": 48, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 256, "sliding_window": 24, "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
SMOKE_SIZES = (
    Size(name="Tiny", raw=TINY),
    Size(name="Tiny Embedding", raw={**TINY, "use_bidirectional_attention": True}),
)
SMOKE_CASES = {
    "tiny": ("generate", "Tiny"),
    "classify": ("classify", "Tiny"),
    "embed": ("embed", "Tiny Embedding"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The result of one system on one case."""

    case: str
    system: str
    rows: int = 0
    tokens: int = 0
    """Number of new tokens for completions, else of prompt or text tokens."""
    floor_secs: float = 0.0
    decode_floor_secs: float = 0.0
    answer: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: str = ""
    """Reason why there is no answer."""

    def cells(self, ours: "Line | None") -> list[str]:
        """Return a line of the table, compared with our own line of the same case."""
        if not self.answer:
            return [self.case, f"{self.system}: {self.left_out}", *[""] * (len(HEADER) - 2)]
        secs, decode = self.answer["seconds"], self.answer.get("decode_secs")
        times = secs / ours.answer["seconds"] if ours and ours.answer and ours != self else 0.0
        return [
            self.case,
            self.system,
            f"{self.answer['startup_secs']:.1f}",
            f"{secs:.2f}",
            f"{self.rows / secs:,.1f}",
            f"{self.tokens / secs:,.0f}",
            f"{self.floor_secs:.3g}",
            f"{self.floor_secs / secs:.2f}",
            f"{self.decode_floor_secs / decode:.2f}" if decode else "",
            f"{times:.1f} x" if times else "",
        ]


class Bench:
    """Runs cases until the time budget is spent."""

    def __init__(self, flags: argparse.Namespace, *, until: float) -> None:
        self._flags = flags
        self._until = until
        self._scale: Scale = SMOKE if flags.smoke else FULL_SCALE
        self._sizes = {s.name: s for s in (SMOKE_SIZES if flags.smoke else SIZES)}
        self._jobs: dict[str, tuple[Job, Line]] = {}
        every = SMOKE_CASES if flags.smoke else CASES
        self.cases = {name: every[name] for name in every if name in (flags.only or every)}
        self.card: dict[str, Any] = {}

    def measure_card(self) -> None:
        """Measure the card's best rates in a process of its own."""
        command = [sys.executable, "-m", "benchmarks.gpu.card"]
        command += ["--device", self._flags.device, "--dtype", self._dtype]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        self.card = json.loads(done.stdout)

    def line(self, case: str, system: str) -> Line:
        """Run a system on a case and return its result."""
        if not is_installed(system):
            return Line(case=case, system=system, left_out="not installed")
        if self._left < LEAST_SECS:
            return Line(case=case, system=system, left_out="no time was left")
        if case not in self._jobs:
            self._jobs[case] = self._job(case)
        job, line = self._jobs[case]
        return self._run(job, dataclasses.replace(line, system=system))

    @property
    def _left(self) -> float:
        return self._until - time.monotonic()

    @property
    def _dtype(self) -> str:
        return {"fp32": "float32", "fp16": "float16"}.get(self._flags.precision, "bfloat16")

    def _job(self, case: str) -> tuple[Job, Line]:
        """Return the job of a case, and a line with only its floor."""
        task, name = self.cases[case]
        size = self._sizes[name]
        config, precision = size.config, self._flags.precision
        rates = Rates(
            operations_per_sec=self.card["operations_per_sec"],
            bytes_per_sec=self.card["bytes_per_sec"],
        )
        new: list[int] = []
        labels: list[int] = []
        decode_secs = 0.0
        if task == "generate":
            prompts, new = work.completions(config.vocab_size, self._scale)
            rows = list(zip(map(len, prompts), new, strict=True))
            slots = self._scale.slots
            floor = generate_floor(config, rows, slots=slots, precision=precision, rates=rates)
            secs, decode_secs, tokens = floor.seconds, floor.decode, sum(new)
        elif task == "classify":
            prompts, labels = work.classifications(config.vocab_size, self._scale)
            own = [len(ids) - self._scale.shared for ids in prompts]
            count = classify_operations(config, self._scale.shared, own, len(labels))
            secs, tokens = count / rates.operations_per_sec, sum(map(len, prompts))
        else:
            prompts = work.texts(config.vocab_size, self._scale)
            lengths = [len(ids) for ids in prompts]
            secs = embed_operations(config, lengths) / rates.operations_per_sec
            tokens = sum(lengths)
        folder = self._flags.folder
        job = Job(
            model=str(self._model(task, size)),
            shapes=str(models.hf_folder(size, folder)),
            device=self._flags.device,
            dtype=self._dtype,
            prompts=prompts,
            new_tokens=new,
            label_ids=labels,
            scale=self._scale,
        )
        line = Line(
            case=case, system="", rows=len(prompts), tokens=tokens,
            floor_secs=secs, decode_floor_secs=decode_secs,
        )  # fmt: skip
        return job, line

    def _model(self, task: str, size: Size) -> Path:
        flags = self._flags
        if flags.model is not None and size.name == "Gemma 3 270M":
            return flags.model
        return models.ready(
            size, flags.folder / task, device=flags.device, task=task, precision=flags.precision
        )

    def _run(self, job: Job, line: Line) -> Line:
        """Run a system in its own process, for at most the remaining time."""
        with tempfile.TemporaryDirectory() as name:
            asked, answered = Path(name, "job.json"), Path(name, "answer.json")
            asked.write_text(json.dumps(asdict(job)))
            command = [sys.executable, "-m", "benchmarks.gpu.systems", line.system]
            left = self._left
            try:
                done = subprocess.run(
                    [*command, asked, answered],
                    capture_output=True, text=True, timeout=left, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return dataclasses.replace(line, left_out=f"stopped after {left:.0f} s")
            if done.returncode:
                return dataclasses.replace(line, left_out=f"failed: {last_words(done)[:200]}")
            return dataclasses.replace(line, answer=json.loads(answered.read_text()))


def in_turn(cases: Mapping[str, tuple[str, str]], only: Sequence[str] | None) -> list[list[str]]:
    """Return pairs of case and system: the first system of every case, then the second, etc."""
    ranks = max(map(len, SYSTEMS.values()))
    pairs = [
        [case, SYSTEMS[task][rank]]
        for rank in range(ranks)
        for case, (task, _) in cases.items()
        if rank < len(SYSTEMS[task])
    ]
    return [pair for pair in pairs if pair[1] in (only or pair)]


def report(card: dict[str, Any], lines: Sequence[Line]) -> str:
    """Return the card's rates and the table."""
    ours = {line.case: line for line in lines if line.system.startswith(("engine", "embed"))}
    rates = (
        f"{card['card']}: one large product {card['operations_per_sec'] / 1e12:.3g} TFLOP/s, "
        f"a copy {card['bytes_per_sec'] / 1e12:.3g} TB/s read and written"
    )
    return f"{rates}\n\n{table(HEADER, [line.cells(ours.get(line.case)) for line in lines])}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="for models, which are kept")
    add("--output", type=Path, required=True, help="JSON file for all figures")
    add("--model", type=Path, help="exported Gemma 3 270M, with --tasks generate,classify")
    add("--only", action="append", help="cases (default: all)")
    add("--systems", action="append", help="systems (default: all)")
    add("--precision", help="of our models (default: bf16; fp32 on the CPU)")
    add("--budget_secs", type=float, default=BUDGET_SECS, help="(default: %(default)s)")
    add("--smoke", action="store_true", help="tiny models on the CPU, to try it")
    flags = parser.parse_args(argv)
    flags.device = "cpu" if flags.smoke else "cuda"
    flags.precision = flags.precision or ("fp32" if flags.smoke else "bf16")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cases and print the table; return 1 if a run failed."""
    began = time.monotonic()
    flags = parse(argv)
    hide_messages()
    bench = Bench(flags, until=began + flags.budget_secs)
    bench.measure_card()
    lines: list[Line] = []
    for case, system in in_turn(bench.cases, flags.systems):
        line = bench.line(case, system)
        lines.append(line)
        sys.stderr.write(f"{case}: {system}: {line.answer or line.left_out}\n")
    lines.sort(key=lambda line: list(bench.cases).index(line.case))
    figures = {
        "card": bench.card,
        "seconds": round(time.monotonic() - began, 1),
        "lines": [asdict(line) for line in lines],
    }
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(report(bench.card, lines))
    return int(any(line.left_out.startswith("failed") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
