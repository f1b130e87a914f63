"""Checks of a worker's software and hardware: `python -m beam_gemma.preflight`.

The checks go from the machine to one row of a model, in the order in which a job needs them, and
end at the first missing or outdated item, with the reason and the remedy. Run them by hand, on a
worker or in its image; jobs perform the same checks silently.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from beam_gemma.errors import BeamGemmaError
from beam_gemma.model.artifact import PURPOSES, Artifact
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.model.signature import HEADS
from beam_gemma.monitoring.processor import processor_of
from beam_gemma.runtime.device_memory import (
    BF16_CAPABILITY,
    CudaMemory,
    compute_capability,
    cuda_release,
    driver_version,
)
from beam_gemma.runtime.download import open_model
from beam_gemma.runtime.host_memory import host_memory
from beam_gemma.versions import installed, versions

if TYPE_CHECKING:
    from beam_gemma.inference.task_handler import TaskHandler
    from beam_gemma.runtime.devices import DeviceChoice

GIB = 1 << 30
TEXT = "The capital of France is"
LABELS = (" Paris", " Rome")
NEW_TOKENS = 8
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One finding of the checks."""

    name: str
    text: str
    """Readable text."""
    values: dict[str, Any] = field(default_factory=dict)
    """Machine-readable values, for JSON."""


def checks(model: str | None, device: "DeviceChoice") -> Iterator[Fact]:
    """Yield findings until a check fails.

    Args:
        model: Model folder, local or on gs://; None to check only the machine.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        BeamGemmaError: an item is missing or too old; the message names the remedy.
        ModuleNotFoundError: ONNX Runtime is not installed.
    """
    yield from _packages()
    yield from _machine()
    # Imported only here: without ONNX Runtime this fails, after the first findings are reported.
    from beam_gemma.runtime.devices import choose_device, has_device, providers, require_device

    yield Fact(name="providers", text=", ".join(providers()), values={"names": providers()})
    wants_gpu = device == "cuda" or (device == "auto" and has_device("cuda"))
    if wants_gpu:
        require_device("cuda")
        yield from _gpu()
    if model is None:
        return
    start = time.monotonic()
    artifact = open_model(model)
    yield _described(artifact)
    yield _compared(artifact, round(time.monotonic() - start, 1))
    of_tasks = [(head, on) for head, on in artifact.signatures if head in HEADS.values()]
    heads = [head for head, on in of_tasks if device in ("auto", on)]
    head = heads[0] if heads else of_tasks[0][0]
    chosen = choose_device(artifact, head, device)
    yield _row(artifact, head, chosen)


def _packages() -> Iterator[Fact]:
    here = versions() | {"Python": platform.python_version()}
    for name in ("Python", "Beam", "beam-gemma"):
        yield Fact(name=name, text=here[name], values={"version": here[name]})
    builds = installed(ONNXRUNTIMES)
    text = ", ".join(f"{name} {version}" for name, version in builds.items()) or "none"
    yield Fact(name="ONNX Runtime", text=text, values=builds)


def _machine() -> Iterator[Fact]:
    yield Fact(name="processor", text=processor_of("cpu"))
    memory = host_memory()
    yield _amount("memory", memory.available, memory.total)
    folder = tempfile.gettempdir()
    disk = shutil.disk_usage(folder)
    yield _amount("disk", disk.free, disk.total, f", for models from gs:// in {folder}")


def _gpu() -> Iterator[Fact]:
    """Yield driver, name, memory and precisions of a usable GPU."""
    version = driver_version()
    yield Fact(name="driver", text=f"for {cuda_release(version)}", values={"cuda": version})
    capability = compute_capability()
    name, generation = processor_of("cuda"), f"{capability[0]}.{capability[1]}"
    yield Fact(
        name="GPU",
        text=f"{name}, compute capability {generation}",
        values={"name": name, "compute_capability": list(capability)},
    )
    room = CudaMemory().room()
    yield _amount("GPU memory", room.free, room.total)
    kinds = ["bf16"] * (capability >= BF16_CAPABILITY) + ["fp16", "int8", "int4"]
    yield Fact(name="precisions", text=", ".join(kinds), values={"names": kinds})


def _described(artifact: Artifact) -> Fact:
    graphs = [f"{PURPOSES[head]} on {device}" for head, device in artifact.signatures]
    return Fact(
        name="model",
        text=f"{artifact.name}, {artifact.precision}: {', '.join(graphs)}",
        values={"digest": artifact.digest, "precision": artifact.precision, "graphs": graphs},
    )


def _compared(artifact: Artifact, seconds: float) -> Fact:
    """Return the number and total size of files with verified checksums."""
    summed = [entry for entry in artifact.files.values() if entry.sha256 is not None]
    size = sum(entry.num_bytes for entry in summed) / 1e9
    left = len(artifact.files) - len(summed)
    unknown = f"; {left} files were exported without one" if left else ""
    return Fact(
        name="checksums",
        text=f"{len(summed)} files, {size:.2f} GB, as exported; read in {seconds} s{unknown}",
        values={"files": len(summed), "without": left, "seconds": seconds},
    )


def _row(artifact: Artifact, head: Head, device: Device) -> Fact:
    """Return a model's result for one row, with the times to load it and to compute the row."""
    start = time.monotonic()
    model = _handler(artifact, head, device).load_model()
    loaded = time.monotonic()
    (result,) = model([{"text": TEXT}])
    done = time.monotonic()
    if result["error"] is not None:
        raise BeamGemmaError(f"row: expected a result, got the error {result['error']!r}")
    told = {"generate": "completion", "score": "label", "embed": "embedding"}[head]
    value = result[told] if head != "embed" else f"a vector of {len(result[told])} numbers"
    seconds = {"load_secs": round(loaded - start, 2), "row_secs": round(done - loaded, 2)}
    return Fact(
        name="row",
        text=f"{TEXT!r} on {device}: {value!r}; loaded in {seconds['load_secs']} s, "
        f"computed in {seconds['row_secs']} s",
        values={"device": device, "head": head, "result": value, **seconds},
    )


def _handler(artifact: Artifact, head: Head, device: Device) -> "TaskHandler":
    """Return the task handler of a head, with a minimal request."""
    from beam_gemma.engine.sampling import SamplingParams
    from beam_gemma.inference.handlers import (
        GemmaClassifyModelHandler,
        GemmaEmbedModelHandler,
        GemmaGenerateModelHandler,
    )
    from beam_gemma.tasks.generate import GenerateSettings
    from beam_gemma.tasks.questions import ClassifySettings
    from beam_gemma.tasks.text_encoder import EmbedSettings

    path = str(artifact.path)
    own: dict[str, Any] = {"device": device, "large_model": False}
    if head == "score":
        question = ClassifySettings(prompt="{text}", labels=LABELS)
        return GemmaClassifyModelHandler(path, question, **own)
    if head == "embed":
        return GemmaEmbedModelHandler(path, EmbedSettings(text_column="text"), **own)
    sampling = SamplingParams(max_tokens=NEW_TOKENS)
    return GemmaGenerateModelHandler(
        path, GenerateSettings(prompt="{text}", sampling=sampling), **own
    )


def _amount(name: str, free: int, total: int, more: str = "") -> Fact:
    return Fact(
        name=name,
        text=f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{more}",
        values={"free_bytes": free, "total_bytes": total},
    )


def preflight_parser() -> argparse.ArgumentParser:
    """Return the parser for command-line flags."""
    parser = argparse.ArgumentParser(
        prog="python -m beam_gemma.preflight",
        description="Check that a machine can run jobs: software, memory, disk and GPU, and with "
        "--model also the model. Exit with code 1 at the first problem.",
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="Model folder to check, on this machine or on gs://. One row is computed with it. "
        "(default: none, only the machine is checked)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="Device to check. auto checks the GPU if the machine has one, and computes the row "
        "on it if the model folder supports CUDA. (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print the report as JSON, for programs. (default: false)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and write the findings; return 1 if a check fails, else 0."""
    args = preflight_parser().parse_args(argv)
    facts: list[Fact] = []
    problem = None
    try:
        for fact in checks(args.model, args.device):
            facts.append(fact)
            if not args.json:
                sys.stdout.write(f"{fact.name:<14}{fact.text}\n")
                sys.stdout.flush()
    except (BeamGemmaError, ModuleNotFoundError) as error:
        problem = str(error)
    except Exception as error:  # a device may raise anything; report it in one sentence
        problem = f"{type(error).__name__}: {error}"
    if args.json:
        found = {fact.name: fact.values | {"text": fact.text} for fact in facts}
        told = {"ready": problem is None, "problem": problem, "facts": found}
        sys.stdout.write(json.dumps(told, indent=1) + "\n")
    else:
        sys.stdout.write("ready\n" if problem is None else f"not ready: {problem}\n")
    return int(problem is not None)


if __name__ == "__main__":
    sys.exit(main())
