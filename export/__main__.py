"""Export a checkpoint: `python -m export --checkpoint PATH --output DIR`."""

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import onnx_ir as ir

import beam_gemma
from beam_gemma.errors import BeamGemmaError, OptionsError, nearest
from beam_gemma.model.artifact import (
    CHAT_TEMPLATE,
    LEGAL,
    TOKENIZER,
    graph_name,
    write_manifest,
)
from beam_gemma.model.embedding_config import EmbeddingConfig, Pooling
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.signature import HEADS, Signature
from export.checkpoints.hf_folder import check_names, expected_shapes, read_checkpoint
from export.checkpoints.legal import write_legal
from export.checkpoints.lora import merge_adapter
from export.checkpoints.tensors import Checkpoint
from export.graph.quantize import BITS, quantize_graph
from export.graph.tables import with_tables_as_inputs
from export.graph.tasks import (
    check_tasks,
    default_tasks,
    embedding_config,
    for_embeddings,
    graph_module,
    graph_signatures,
    table_dtype,
)
from export.graph.to_onnx import trace
from export.graph.weights import WEIGHTS, WRITTEN, attach

LOGGER = logging.getLogger("export")
PRECISIONS = {"cpu": ("fp32",), "cuda": ("bf16", "fp16", "int8", "int4")}
"""Supported precisions by device; the first is the default."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"} | dict.fromkeys(("fp16", *BITS), "float16")
EPILOG = """examples:
  python -m export --checkpoint gemma-3-270m.gguf --output models/gemma-3-270m

  python -m export --checkpoint gemma-3-27b-it --output models/gemma-3-27b-it --device cuda

  python -m export --checkpoint gemma-3-12b-it-qat-q4_0.gguf --output models/gemma-3-12b-it \\
      --device cuda --precision int4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    LOGGER.setLevel(logging.INFO)
    hide_messages()
    try:
        args = _parse(argv)
        export(
            args.checkpoint,
            args.output,
            adapter=args.adapter,
            device=args.device,
            precision=args.precision,
            tasks=args.tasks,
            pooling=args.pooling,
            text_only=args.text_only,
            checksums=args.checksums,
            overwrite=args.overwrite,
        )
    except BeamGemmaError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def export(
    checkpoint_path: Path,
    output: Path,
    *,
    adapter: Path | None = None,
    device: Device = "cpu",
    precision: str = "auto",
    tasks: Sequence[str] | None = None,
    pooling: Pooling | None = None,
    text_only: bool = False,
    checksums: str = "now",
    overwrite: bool = False,
) -> None:
    """Export a checkpoint as a model folder.

    The folder is renamed to `output` only when it is complete.

    Raises:
        BeamGemmaError: the checkpoint, a setting or the output folder is invalid.
    """
    _check(output, precision, device, overwrite=overwrite)
    start = time.monotonic()
    precision = PRECISIONS[device][0] if precision == "auto" else precision
    checkpoint = read_checkpoint(checkpoint_path, text_only=text_only)
    check_names(checkpoint.tensors, expected_shapes(checkpoint))
    if adapter is not None:
        checkpoint = merge_adapter(checkpoint, adapter)
    tasks = tasks or default_tasks(checkpoint)
    check_tasks(checkpoint.config, tasks, checkpoint.vision)
    if set(tasks) == {"embed"}:
        checkpoint = for_embeddings(checkpoint)
    embedding = _embedding(checkpoint, tasks, pooling)
    signatures = graph_signatures(checkpoint, embedding, tasks, device, DTYPES[precision])
    folder = output.with_name(output.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / WEIGHTS).mkdir(parents=True)
    signatures = _write_graphs(checkpoint, embedding, signatures, precision, folder)
    _write_texts(checkpoint, folder)
    linked = {f"{WEIGHTS}/{f.name}" for f in (folder / WEIGHTS).iterdir()} - {WRITTEN}
    write_manifest(
        folder,
        name=output.name,
        config=checkpoint.config,
        precision=precision,
        signatures=signatures,
        eos_token_ids=checkpoint.eos_token_ids,
        source=_source(checkpoint),
        embedding=embedding,
        vision=checkpoint.vision,
        sound=checkpoint.sound,
        encoder=checkpoint.encoder,
        without_checksum=frozenset(linked if checksums == "later" else ()),
    )
    if output.exists():
        shutil.rmtree(output)
    folder.rename(output)
    LOGGER.info("%s", _summary(output, linked, time.monotonic() - start))


def _source(checkpoint: Checkpoint) -> dict[str, str]:
    """Return where a model comes from, for its manifest."""
    return {
        "checkpoint": checkpoint.name,
        "format": checkpoint.format,
        "exporter": f"beam_gemma {beam_gemma.__version__}",
    }


def hide_messages() -> None:
    """Hide torch's and the optimizer's messages on optional packages and unattached weights."""
    for name in ("torch.onnx", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _check(output: Path, precision: str, device: Device, *, overwrite: bool) -> None:
    if precision not in (allowed := ("auto", *PRECISIONS[device])):
        raise OptionsError(
            f"--precision: expected {' or '.join(allowed)} for --device {device}, got {precision}"
        )
    if output.exists() and not overwrite:
        raise OptionsError(f"{output}: the output exists already; pass --overwrite to replace it")


def _embedding(
    checkpoint: Checkpoint, tasks: Sequence[str], pooling: Pooling | None
) -> EmbeddingConfig | None:
    """Return the embedding settings if a task needs them."""
    if "embed" in tasks:
        return embedding_config(checkpoint, pooling)
    if pooling is not None:
        raise OptionsError(
            f"--pooling: expected none without the task embed, got {pooling} with --tasks "
            f"{','.join(tasks)}"
        )
    return None


def _write_graphs(
    checkpoint: Checkpoint,
    embedding: EmbeddingConfig | None,
    signatures: Sequence[Signature],
    precision: str,
    folder: Path,
) -> tuple[Signature, ...]:
    """Write one graph per head, of which all share one set of weights; return their signatures."""
    config, vision, encoder = checkpoint.config, checkpoint.vision, checkpoint.encoder
    sound = checkpoint.sound
    models = [
        trace(
            partial(graph_module, config, embedding, signature, vision, sound, encoder),
            signature,
            table_dtype(checkpoint, signature),
        )
        for signature in signatures
    ]
    for model, signature in zip(models, signatures, strict=True):
        # A tower is small, and its matrices do not divide into blocks.
        if precision in BITS and signature.head not in ("vision", "sound"):
            quantize_graph(model, BITS[precision])
    attach(models, checkpoint, folder)
    signatures = tuple(map(with_tables_as_inputs, models, signatures))
    for model, signature in zip(models, signatures, strict=True):
        ir.save(model, folder / graph_name(signature.head, signature.device))
    return signatures


def _write_texts(checkpoint: Checkpoint, folder: Path) -> None:
    (folder / TOKENIZER).write_bytes(checkpoint.tokenizer_model())
    if checkpoint.chat_template:
        (folder / CHAT_TEMPLATE).write_text(checkpoint.chat_template)
    write_legal(checkpoint, folder / LEGAL)


def _summary(output: Path, linked: set[str], seconds: float) -> str:
    files = {f.relative_to(output).as_posix(): f.stat().st_size for f in output.rglob("*.*")}
    written = sum(size for name, size in files.items() if name not in linked) / 1e6
    links = sum(size for name, size in files.items() if name in linked) / 1e6
    return f"{output}: {written:,.1f} MB written, {links:,.1f} MB linked, in {seconds:.1f} s"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        raise OptionsError(f"unknown flag {flag}{nearest(flag, known)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Export a Gemma checkpoint as a model folder, which the pipelines run.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="PATH",
        help="Checkpoint to export: a folder with config.json and safetensors files, or a "
        ".gguf, .ckpt or .pt file. (required)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR",
        help="Folder of a LoRA adapter, saved by PEFT, to merge into the weights. (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR",
        help="Model folder to write. (required)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu",
        help="Device that will run the model: the CPU, or NVIDIA GPUs with CUDA. "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("auto", *DTYPES), default="auto",
        help="Number format of the weights. The CPU supports fp32. CUDA supports bf16, fp16 (for "
        "GPUs without bfloat16, such as the T4), int8 and int4 (to save memory). auto is fp32 on "
        "the CPU and bf16 on CUDA. (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", type=_tasks, metavar="TASK,TASK",
        help=f"Tasks that the model folder is for, separated by commas: {', '.join(HEADS)}. Each "
        "one adds a graph of a few MB. (default: embed for a folder of sentence-transformers, "
        "otherwise generate,classify)",
    )  # fmt: skip
    parser.add_argument(
        "--pooling", choices=("mean", "lasttoken"),
        help="How to make one embedding from the states of a text's tokens: their mean, or the "
        "state of the last token. Leave it out for a folder of sentence-transformers, which sets "
        "it. (default: mean)",
    )  # fmt: skip
    parser.add_argument(
        "--text_only", action="store_true",
        help="Leave out what a model has for pictures and sound. (default: false)",
    )  # fmt: skip
    parser.add_argument(
        "--checksums", choices=("now", "later"), default="now",
        help="Whether to compute checksums of files that are linked to the checkpoint. later "
        "leaves them out: the export is faster, but jobs cannot tell whether these files are "
        "damaged. (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true",
        help="Replace an existing model folder. Without this flag, the export is refused. "
        "(default: false)",
    )  # fmt: skip
    return parser


def _tasks(text: str) -> tuple[str, ...]:
    tasks = tuple(dict.fromkeys(text.split(",")))
    for task in tasks:
        if task not in HEADS:
            raise OptionsError(
                f"--tasks: expected some of {', '.join(HEADS)}, got {task!r}{nearest(task, HEADS)}"
            )
    return tasks


if __name__ == "__main__":
    sys.exit(main())
