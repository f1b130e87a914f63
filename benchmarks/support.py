"""Checks that the three pipelines give the same rows with other Python and Beam versions.

    python -m benchmarks.support --model models/gemma-3-270m PYTHON...

Each PYTHON is an interpreter in an environment with the packages that workers need. Each completes,
classifies and embeds the same few rows locally; its output is compared with the first
interpreter's, to the bit. Prints a Markdown table.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.runs import last_words
from benchmarks.table import table

ROOT = Path(__file__).parent.parent
TASKS = {
    "generate": ["--prompt=Title: {title}\nThree keywords:", "--max_tokens=8"],
    "classify": ["--prompt={title} is about", "--label= food", "--label= traffic"],
    "embed": ["--text_column=title"],
}
ROWS = [
    "Sopa para todos",
    "A new tram line",
    "Heat wave empties the schools",
    "Ein Fuchs im Garten",
]
VERSIONS = """
import platform, apache_beam, onnxruntime, numpy, pyarrow
print(platform.python_version(), apache_beam.__version__, onnxruntime.__version__,
      numpy.__version__, pyarrow.__version__)
"""
HEADER = ("Python", "Beam", "ONNX Runtime", "NumPy", "PyArrow", *TASKS)


def versions(python: str) -> list[str]:
    """Return an interpreter's own version and those of its main packages."""
    told = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True)
    return told.stdout.split()


def outcome(python: str, task: str, model: str, folder: Path) -> str:
    """Return a digest of a task's output rows, or the last line of its error."""
    output = folder / f"{task}.parquet"
    run = subprocess.run(
        [python, "-m", f"pipelines.{task}", f"--model={model}", f"--input={folder}/rows.jsonl",
         f"--output={output}", "--num_shards=1", "--overwrite", *TASKS[task]],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        return last_words(run)
    [shard] = folder.glob(f"{task}-*.parquet")
    rows = pq.read_table(shard).to_pylist()
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def main() -> int:
    """Run all interpreters and print the table; return 1 if an output differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="exported model folder, with all tasks")
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="interpreters")
    flags = parser.parse_args()
    expected: dict[str, str] = {}
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines_of_rows = (json.dumps({"title": title}) + "\n" for title in ROWS)
        (folder / "rows.jsonl").write_text("".join(lines_of_rows))
        for python in flags.pythons:
            found = {task: outcome(python, task, flags.model, folder) for task in TASKS}
            expected = expected or found
            marks = ["same rows" if found[t] == expected[t] else found[t] for t in TASKS]
            lines.append([*versions(python), *marks])
            print(*lines[-1], file=sys.stderr)
    print(table(HEADER, lines))
    return int(any(line[-len(TASKS) :] != ["same rows"] * len(TASKS) for line in lines))


if __name__ == "__main__":
    sys.exit(main())
