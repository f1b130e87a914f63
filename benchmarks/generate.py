"""Generation on the CPU against the floor: seconds beside what the matrix products alone must take.

    python -m benchmarks.generate --model models/gemma-3-270m

Runs the engine on the 64 prompts of the parity test, 48 new tokens each, and compares prefill and
decode with the floating-point operations of the model's matrices at the rate that ONNX Runtime
reaches on one large float32 product of this machine, measured in the same run.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from beam_gemma.artifact import Artifact
from beam_gemma.config import GemmaConfig
from beam_gemma.engine import Engine, EngineConfig
from beam_gemma.progress import Count
from beam_gemma.sampling import SamplingParams
from beam_gemma.sequence import Request
from beam_gemma.session import Session

PROMPTS = Path(__file__).parent.parent / "tests/data/greedy64.json"
NUM_NEW_TOKENS = 48


def matrix_rate() -> float:
    """Return the float32 operations per second of a large product in ONNX Runtime."""
    rows, inner, columns = 512, 2048, 2048
    names = [("x", (rows, inner)), ("w", (columns, inner)), ("y", (rows, columns))]
    x, w, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in names)
    weight = onnx.numpy_helper.from_array(np.ones((columns, inner), np.float32), "w")
    node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    graph = onnx.helper.make_graph([node], "rate", [x], [y], [weight], value_info=[w])
    opset = onnx.helper.make_opsetid("", 23)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {"x": np.ones((rows, inner), np.float32)}
    session.run(None, feeds)
    best = min(_seconds(lambda: session.run(None, feeds)) for _ in range(20))
    return 2 * rows * inner * columns / best


def operations(config: GemmaConfig) -> tuple[int, int]:
    """Return the operations of the layers' matrices for a token, and of the head for a row."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * (2 * heads + 2 * kv_heads)
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    layers = 2 * config.num_hidden_layers * (attention + feed_forward)
    return layers, 2 * config.hidden_size * config.vocab_size


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Exported model folder.")
    artifact = Artifact.open(parser.parse_args().model)
    layer_ops, head_ops = operations(artifact.config)
    rate = matrix_rate()
    start = time.perf_counter()
    config = EngineConfig()
    session = Session.of(
        artifact,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    loaded = time.perf_counter() - start
    seconds = {True: 0.0, False: 0.0}
    last = time.perf_counter()

    def on_step(count: Count) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[count.prompt_tokens > 0] += now - last
        last = now

    engine = Engine(session, config, on_step=on_step)
    params = SamplingParams(max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    prompts = [row["prompt_token_ids"] for row in json.loads(PROMPTS.read_text())]
    last = time.perf_counter()
    engine.generate(
        Request(request_id=str(i), prompt_token_ids=tuple(ids), params=params)
        for i, ids in enumerate(prompts)
    )
    stats = engine.stats
    prefill_ops = stats.num_prompt_tokens * layer_ops + len(prompts) * head_ops
    decode_ops = stats.num_decode_rows * (layer_ops + head_ops)
    print(f"load {loaded:.1f} s; one float32 product {rate / 1e9:.0f} GFLOP/s")
    for name, tokens, ops, taken in (
        ("prefill", stats.num_prompt_tokens, prefill_ops, seconds[True]),
        ("decode", stats.num_decode_rows, decode_ops, seconds[False]),
    ):
        print(
            f"{name}: {tokens:,} tokens in {taken:.1f} s = {tokens / taken:.0f} tokens/s; "
            f"matrices alone {ops / rate:.1f} s ({ops / rate / taken:.0%} of the time)"
        )


def _seconds(run: object) -> float:
    start = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
