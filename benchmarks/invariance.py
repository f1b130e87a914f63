"""Records row independence: a row gives the same bits under all conditions.

    python -m benchmarks.invariance --model models/gemma-3-270m --rows 2000

Each condition runs in its own processes. Each row's token ids, finish reason and log-probability
bits are compared with the base run: all rows at once, greedy, 64 slots, steps of 1,024 tokens,
prefix reuse, one thread per core. Sampled conditions have a sampled base run.

Two conditions, each row alone and more threads than cores, take ten times as long as the others.
For these only `--sample` rows run, drawn once; set `--sample` to `--rows` to run all.

Results are kept in `--record`, so a record can be made in parts (`--only`). A record for another
model, ONNX Runtime, processor or number of rows is refused. Exit code 1: a row differs, or a run
did not meet its condition (for example, no preemption with a small cache).
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from beam_gemma.model.artifact import Artifact
from beam_gemma.monitoring.processor import cpu_name
from benchmarks.conditions import CONDITIONS, Outcome, base_of
from benchmarks.table import table

HEADER = ("condition", "rows", "differ", "preemptions", "reused tokens", "seconds", "as meant")


class Record:
    """Outcomes of the base runs, and the comparison of each condition with its base run."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Continue the record at a path, or begin a new one.

        Raises:
            ValueError: the existing record has other facts.
        """
        self._path = path
        self._content: dict[str, Any] = {"facts": facts, "bases": {}, "results": {}}
        if path.exists():
            self._content = json.loads(path.read_text())
            if self._content["facts"] != facts:
                raise ValueError(
                    f"{path}: expected a record of {facts}, got one of {self._content['facts']}; "
                    "choose another --record or delete it"
                )

    def base(self, name: str) -> dict[str, Outcome] | None:
        """Return the outcomes of a base run by row number, or None if it has not run."""
        return self._content["bases"].get(name)

    def add(self, name: str, answer: dict[str, Any]) -> None:
        """Compare a run with its base run, which must be recorded already or be this run."""
        outcomes = answer.pop("outcomes")
        if name == base_of(name):
            self._content["bases"][name] = outcomes
        base = self._content["bases"][base_of(name)]
        differing = sorted((i for i in outcomes if outcomes[i] != base[i]), key=int)
        self._content["results"][name] = answer | {
            "rows": len(outcomes),
            "differ": len(differing),
            "first_differing": differing[:20],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._content) + "\n")

    def is_clean(self) -> bool:
        """Return whether no row differs and every run met its condition."""
        results = self._content["results"].values()
        return all(result["differ"] == 0 and result["holds"] for result in results)

    def lines(self) -> str:
        """Return the record as a Markdown table."""
        results = self._content["results"]
        return table(HEADER, [_line(name, results[name]) for name in CONDITIONS if name in results])


def _line(name: str, result: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{result['rows']:,}",
        f"{result['differ']:,}",
        f"{result['preemptions']:,}",
        f"{result['cached_tokens']:,}",
        f"{result['seconds']:.0f}",
        "yes" if result["holds"] else "NO",
    ]


def run_condition(name: str, model: str, num_rows: int, sample: int) -> dict[str, Any]:
    """Run a condition's processes in parallel; return their combined answers."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(i)) for i in range(CONDITIONS[name].num_processes)]
        command = [sys.executable, "-m", "benchmarks.conditions", name, "--model", model]
        command += ["--rows", str(num_rows), "--sample", str(sample)]
        processes = [
            subprocess.Popen([*command, "--part", str(part), "--output", output])
            for part, output in enumerate(outputs)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"{name}: expected exit codes of 0, got {codes}")
        answers = [json.loads(output.read_text()) for output in outputs]
    return {
        "outcomes": {i: o for answer in answers for i, o in answer["outcomes"].items()},
        "seconds": max(answer["seconds"] for answer in answers),
        "preemptions": sum(answer["preemptions"] for answer in answers),
        "cached_tokens": sum(answer["cached_tokens"] for answer in answers),
        "holds": all(answer["holds"] for answer in answers),
    }


def facts_of(model: str, num_rows: int) -> dict[str, Any]:
    """Return the facts that the bits may depend on."""
    return {
        "model": Artifact.open(model).digest,
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "processor": cpu_name() or platform.machine(),
        "rows": num_rows,
    }


def main() -> int:
    """Run the conditions of `--only`, and missing base runs; print the whole record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="exported model folder")
    add("--rows", type=int, default=2000, help="rows (default: 2000)")
    add("--sample", type=int, default=200, help="rows of the slow conditions (default: 200)")
    add("--only", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), help="conditions to run")
    add("--record", type=Path, default=Path("out/invariance.json"), help="JSON file")
    flags = parser.parse_args()
    record = Record(flags.record, facts_of(flags.model, flags.rows))
    bases = [base for base in dict.fromkeys(map(base_of, flags.only)) if record.base(base) is None]
    for name in dict.fromkeys([*bases, *flags.only]):
        if name != base_of(name) or name in bases:
            record.add(name, run_condition(name, flags.model, flags.rows, flags.sample))
            sys.stderr.write(f"{name}: done\n")
    print(record.lines())
    return int(not record.is_clean())


if __name__ == "__main__":
    sys.exit(main())
