"""Export of a Gemma 3 27B-shaped checkpoint: seconds, memory and bytes written.

    python benchmarks/export_27b.py --folder /tmp/gemma-3-27b-shaped

Makes a bf16 safetensors checkpoint of the real shapes in 12 shards of sparse files (54 GB by name,
a few KB on disk), exports it for CUDA in a process of its own, and prints what that took.
"""

import argparse
import json
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

NUM_SHARDS = 12
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 168,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "rms_norm_eps": 1e-06,
    "hidden_activation": "gelu_pytorch_tanh",
    "torch_dtype": "bfloat16",
}


def tensor_shapes() -> dict[str, list[int]]:
    """Return the tensors of the published checkpoint's text half, in layer order."""
    hidden, wide = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    dim = CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * dim, CONFIG["num_key_value_heads"] * dim
    layer = {
        "self_attn.q_proj": [queries, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, queries],
        "self_attn.q_norm": [dim],
        "self_attn.k_norm": [dim],
        "mlp.gate_proj": [wide, hidden],
        "mlp.up_proj": [wide, hidden],
        "mlp.down_proj": [hidden, wide],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "pre_feedforward_layernorm": [hidden],
        "post_feedforward_layernorm": [hidden],
    }
    shapes = {"model.embed_tokens.weight": [CONFIG["vocab_size"], hidden]}
    for i in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {**shapes, "model.norm.weight": [hidden]}


def make_checkpoint(folder: Path) -> None:
    """Write config, index and sparse shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.model").write_bytes(b"placeholder")
    shapes = list(tensor_shapes().items())
    weight_map = {}
    for shard in range(NUM_SHARDS):
        name = f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        header, end = {}, 0
        for tensor, shape in shapes[shard::NUM_SHARDS]:
            start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def main() -> None:
    """Make the checkpoint, export it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="Where to work; on one disk.")
    folder = parser.parse_args().folder
    checkpoint, output = folder / "checkpoint", folder / "exported"
    make_checkpoint(checkpoint)
    start = time.monotonic()
    command = ["--device", "cuda", "--precision", "bf16", "--checksums", "later", "--overwrite"]
    subprocess.run(
        [sys.executable, "-m", "export", "--checkpoint", checkpoint, "--output", output, *command],
        check=True,
    )
    seconds = time.monotonic() - start
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    sizes = {False: 0, True: 0}
    for file in output.rglob("*"):
        if file.is_file():
            sizes[file.stat().st_nlink > 1] += file.stat().st_size
    print(
        f"{seconds:.1f} s, {memory:.2f} GB of memory at most, "
        f"{sizes[False] / 1e6:.1f} MB written, {sizes[True] / 1e9:.1f} GB linked"
    )


if __name__ == "__main__":
    main()
