"""Measures the memory of one step far into a long prompt, up to 128K positions.

    python -m benchmarks.long_prompts --folder /tmp/long_prompts

Exports a model of two layers, one with a window and one without, with the heads of Gemma 3 4B (8 of
width 256, 4 for keys) and otherwise small shapes. All chunks of a prompt but the last are only
scheduled and given cache blocks, which hold zeros; the last is computed. Each step has its own
process.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import safetensors.torch
import torch

from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.engine.packing import pack
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.scheduler import Scheduler
from beam_gemma.engine.sequence import Request, Sequence
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.layer_types import FULL, SLIDING
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig
from benchmarks.runs import peak_bytes
from benchmarks.table import table
from export.__main__ import export
from export.checkpoints.released_sizes import Size
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
BUDGET = EngineConfig().max_num_batched_tokens
SIZE = Size(
    name="two layers of Gemma 3 4B",
    raw={
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
        "hidden_size": 64,
        "intermediate_size": 64,
        **HEADS,
        "vocab_size": 512,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
    },
)
HEADER = ("prompt", "chunk", "blocks, window", "blocks, full", "cache, GB", "step, GB", "seconds")


def make_artifact(folder: Path) -> Path:
    """Export the model with random weights."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.{name}": torch.randn(shape, generator=generator) / 8
        for name, shape in SIZE.tensor_shapes().items()
    }
    safetensors.torch.save_file(weights, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(SIZE.raw))
    (checkpoint / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    export(checkpoint, folder / "model", tasks=("generate",))
    return folder / "model"


def last_step(model: Path, num_tokens: int) -> list[float]:
    """Schedule a prompt and compute its last chunk; return a row of the table, as numbers."""
    artifact = Artifact.open(model)
    signature = artifact.signature("generate", "cpu")
    num_blocks = {
        SLIDING: (SIZE.raw["sliding_window"] + BUDGET) // signature.block_size + 64,
        FULL: num_tokens // signature.block_size + 64,
    }
    cache = KVCache(signature, num_blocks=num_blocks, max_num_seqs=1, max_num_batched_tokens=BUDGET)
    scheduler = Scheduler(
        cache, signature, max_num_batched_tokens=BUDGET, enable_prefix_caching=False
    )
    params = SamplingParams(max_tokens=1)
    request = Request(request_id="long", prompt_token_ids=(7,) * num_tokens, params=params)
    scheduler.add([Sequence(request, end_token_ids=frozenset())])
    [(sequence, chunk)] = step = scheduler.schedule()
    while sequence.num_pending_tokens > chunk:
        sequence.num_computed_tokens += chunk
        [(sequence, chunk)] = step = scheduler.schedule()
    graph_path = str(artifact.graph_path("generate", "cpu"))
    session = Session(graph_path, signature, Capacity(num_blocks=num_blocks, num_state_slots=0))
    feeds = pack(step, signature, cache)
    held = [num_blocks[group] - 1 - cache.num_free_blocks(group) for group in (SLIDING, FULL)]
    block_bytes = 2 * 4 * signature.block_size * HEADS["num_key_value_heads"] * HEADS["head_dim"]
    before = psutil.Process().memory_info().rss
    start = time.monotonic()
    session.run(feeds)
    seconds = time.monotonic() - start
    grown = peak_bytes() - before
    return [num_tokens, chunk, *held, sum(held) * block_bytes / 1e9, grown / 1e9, seconds]


def main() -> None:
    """Run each step in its own process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="Where to work; emptied.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(last_step(args.folder / "model", args.step)))
        return
    make_artifact(args.folder)
    rows = []
    for num_tokens in args.tokens:
        step = ["--folder", str(args.folder), "--step", str(num_tokens)]
        command = [sys.executable, "-m", "benchmarks.long_prompts", *step]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        *counts, cache, memory, seconds = json.loads(output)
        rows.append(
            [*(f"{n:,}" for n in counts), f"{cache:.2f}", f"{memory:.2f}", f"{seconds:.1f}"]
        )
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
