"""Compares embedding speed with sentence-transformers and with the machine's matrix rate.

The model has the shapes of EmbeddingGemma 300M and random weights; texts have log-normal lengths.
Each system runs in its own process. Both sort the texts by length; sentence-transformers uses the
fastest of several batch sizes.

python -m benchmarks.embed --texts 200 --output out/embed.json
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from beam_gemma.inference.handlers import GemmaEmbedModelHandler
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.config import GemmaConfig
from beam_gemma.runtime.limits import EMBED_TOKENS, Limits
from beam_gemma.tasks.text_encoder import EmbedSettings
from benchmarks.rate import Operations, matrix_rate, pair_operations
from export.__main__ import export
from export.modules.encoder import reach

SHAPE = {
    "vocab_size": 262144,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
"""Config of EmbeddingGemma 300M."""
DENSE_SIZES = (3072, 768)
LETTERS = list("abcdfgjklmopqrsuvwxyz")
"""Letters that the tiny vocabulary always encodes as one token each."""
MEDIAN, SIGMA, LONGEST = 128, 0.9, 2048
"""Median, sigma and maximum of the log-normal lengths in tokens; their mean is 190."""
BATCH_SIZES = (1, 2, 4, 8)
SAMPLE = 10
"""Number of texts used to choose sentence-transformers' batch size."""


def texts_of(number: int) -> list[str]:
    """Return texts whose lengths, including `<bos>` and `<eos>`, are log-normal."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(MEDIAN), SIGMA, number)).clip(3, LONGEST).astype(int)
    return ["".join(rng.choice(LETTERS, length - 2)) for length in lengths]


def operations(config: GemmaConfig, lengths: list[int]) -> int:
    """Return the floating-point operations of texts: matrices and attention pairs in reach."""
    pairs = 0
    for layer_type in config.layer_types:
        back, ahead = reach(config, layer_type)
        for n in lengths:
            at = np.arange(n)
            pairs += int((np.minimum(at + ahead, n - 1) - np.maximum(at - back, 0) + 1).sum())
    widths = (config.hidden_size, *DENSE_SIZES)
    dense = sum(2 * a * b for a, b in pairwise(widths))
    attention = pair_operations(config) * pairs
    return Operations.of(config).layers * sum(lengths) + attention + dense * len(lengths)


def run_ours(folder: Path, texts: list[str], max_num_batched_tokens: int) -> dict[str, Any]:
    """Return the time of our embedder in seconds; save its embeddings."""
    handler = GemmaEmbedModelHandler(
        str(folder / "model"),
        EmbedSettings(),
        limits=Limits(max_num_batched_tokens=max_num_batched_tokens),
        large_model=False,
    )
    model = handler.load_model()
    model(texts[:4])
    start = time.perf_counter()
    results = model(texts)
    seconds = time.perf_counter() - start
    np.save(folder / "ours.npy", np.array([result["embedding"] for result in results], np.float32))
    return {"seconds": seconds}


def run_sentence_transformers(folder: Path, texts: list[str], _: int) -> dict[str, Any]:
    """Return sentence-transformers' time in seconds and best batch size; save its embeddings."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder / "checkpoint"), device="cpu")
    model.encode(texts[:4])
    seconds = {}
    for batch_size in BATCH_SIZES:
        start = time.perf_counter()
        model.encode(texts[:SAMPLE], batch_size=batch_size)
        seconds[batch_size] = time.perf_counter() - start
    best = min(seconds, key=lambda size: seconds[size])
    start = time.perf_counter()
    embeddings = model.encode(texts, batch_size=best)
    total = time.perf_counter() - start
    np.save(folder / "sentence_transformers.npy", embeddings)
    return {"seconds": total, "batch_size": best}


SYSTEMS = {"ours": run_ours, "sentence_transformers": run_sentence_transformers}


def prepare(folder: Path) -> None:
    """Write the checkpoint and export it, unless the model exists."""
    if (folder / "model").exists():
        return
    from tests.doubles.sentence_model import sentence_model

    checkpoint = folder / "checkpoint"
    sentence_model(checkpoint, dense_sizes=DENSE_SIZES, attention="sdpa", **SHAPE)
    export(checkpoint, folder / "model", checksums="later")


def compare(folder: Path, number: int, budget: int) -> dict[str, Any]:
    """Run each system in its own process and return the figures."""
    config = Artifact.open(folder / "model").config
    lengths = [len(text) + 2 for text in texts_of(number)]
    count = operations(config, lengths)
    rates = [matrix_rate()]
    report: dict[str, Any] = {
        "texts": number,
        "tokens": sum(lengths),
        "operations": count,
        "max_num_batched_tokens": budget,
    }
    for name in SYSTEMS:
        command = [sys.executable, "-m", "benchmarks.embed", "--system", name]
        command += ["--folder", str(folder), "--texts", str(number), "--budget", str(budget)]
        report[name] = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        )
        rates.append(matrix_rate())
    # The best of several measurements, since other processes may use the machine.
    report["matrix_rate"] = max(rates)
    for name in SYSTEMS:
        seconds = report[name]["seconds"]
        report[name] |= {
            "texts_per_second": number / seconds,
            "tokens_per_second": sum(lengths) / seconds,
            "share_of_matrix_rate": count / seconds / max(rates),
        }
    ours, theirs = (np.load(folder / f"{name}.npy") for name in SYSTEMS)
    report["largest_difference"] = float(np.abs(ours - theirs).max())
    report["times_faster"] = report["sentence_transformers"]["seconds"] / report["ours"]["seconds"]
    return report


def main() -> None:
    """Run the benchmark, or one system of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("models/embed-benchmark"))
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--budget", type=int, default=EMBED_TOKENS["cpu"])
    parser.add_argument("--system", choices=SYSTEMS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.system:
        figures = SYSTEMS[args.system](args.folder, texts_of(args.texts), args.budget)
        sys.stdout.write(json.dumps(figures))
        return
    prepare(args.folder)
    report = json.dumps(compare(args.folder, args.texts, args.budget), indent=1) + "\n"
    sys.stdout.write(report)
    if args.output:
        args.output.write_text(report)


if __name__ == "__main__":
    main()
