"""Preflight: what a worker has, or the one sentence that says what it lacks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from beam_gemma import preflight
from beam_gemma.model import artifact
from beam_gemma.runtime import cpu_session, device_memory
from beam_gemma.runtime.device_memory import Room
from export.__main__ import export
from tests.conftest import TinyModel
from tests.doubles.picture_requests import model_of

ROOT = Path(__file__).parent.parent
GPU = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture(scope="module")
def classifier(tiny_gemma3: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "model"
    export(Path(tiny_gemma3.checkpoint.path), folder, tasks=("classify",))
    return folder


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict]:
    code = preflight.main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_worker_for_the_cpu(tiny_gemma3: TinyModel) -> None:
    """As it is run by hand, in a process of its own."""
    command = [sys.executable, "-m", "beam_gemma.preflight", "--device", "cpu"]
    run = subprocess.run(
        [*command, "--model", tiny_gemma3.artifact.path],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    lines = {line[:14].strip(): line[14:] for line in run.stdout.splitlines()}
    assert lines["Python"] == sys.version.split()[0]
    assert lines["ONNX Runtime"].startswith("onnxruntime 1.")
    assert "CPUExecutionProvider" in lines["providers"]
    assert lines["processor"].endswith(" cores")
    assert lines["memory"].endswith(" GiB free")
    assert " GiB free, for models" in lines["disk"]
    assert ", fp32: generate on cpu" in lines["model"]
    assert ", as exported; read in " in lines["checksums"]
    assert lines["row"].startswith("'The capital of France is' on cpu: ")
    assert run.stdout.endswith("\nready\n")
    assert "GPU" not in lines


def test_one_row_of_each_task(
    classifier: Path, two_sided, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = told(capsys, "--model", str(classifier))
    assert (code, answer["problem"], answer["ready"]) == (0, None, True)
    row = answer["facts"]["row"]
    assert (row["head"], row["device"]) == ("score", "cpu")
    assert row["result"] in preflight.LABELS
    assert row["load_secs"] >= 0 <= row["row_secs"]
    code, answer = told(capsys, "--model", str(two_sided[1].path), "--device", "cpu")
    assert code == 0
    assert answer["facts"]["row"]["result"].startswith("a vector of ")


def test_graphs_that_are_no_tasks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = told(capsys, "--model", str(model_of("gemma3")[1].path))
    assert (code, answer["problem"]) == (0, None)
    assert answer["facts"]["model"]["graphs"][-1] == "see on cpu"
    assert answer["facts"]["row"]["head"] != "vision"


def test_a_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = told(capsys)
    assert code == 0
    assert list(answer["facts"])[-1] == "providers"


def test_without_the_provider(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = told(capsys, "--device", "cuda")
    assert (code, answer["ready"]) == (1, False)
    assert answer["problem"].startswith("device: expected cuda, got an ONNX Runtime with ")
    assert "install" in answer["problem"]
    assert "memory" in answer["facts"]


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU, as far as anybody can tell without using it."""

    class Memory:
        def room(self) -> Room:
            return Room(free=60 << 30, total=80 << 30)

    monkeypatch.setattr(cpu_session.onnxruntime, "get_available_providers", lambda: GPU)
    for module in (device_memory, preflight):
        monkeypatch.setattr(module, "driver_version", lambda: 13000)
    monkeypatch.setattr(device_memory, "num_gpus", lambda: 1)
    monkeypatch.setattr(preflight, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(preflight, "CudaMemory", Memory)
    return monkeypatch


def test_what_a_gpu_is(with_gpu, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = told(capsys, "--device", "cuda")
    facts = answer["facts"]
    assert (code, answer["problem"]) == (0, None)
    assert facts["driver"]["text"] == "for CUDA 13.0"
    assert facts["GPU"]["text"].endswith(", compute capability 9.0")
    assert facts["GPU memory"]["text"] == "60.0 of 80.0 GiB free"
    assert facts["precisions"]["names"] == ["bf16", "fp16", "int8", "int4"]
    with_gpu.setattr(preflight, "compute_capability", lambda: (7, 5))
    _, answer = told(capsys, "--device", "cuda")
    assert answer["facts"]["precisions"]["names"] == ["fp16", "int8", "int4"]


def test_a_driver_that_is_too_old(with_gpu, capsys: pytest.CaptureFixture[str]) -> None:
    with_gpu.setattr(device_memory, "driver_version", lambda: 12080)
    code = preflight.main(["--device", "cuda"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert code == 1
    assert last.startswith("not ready: device: expected an NVIDIA driver of release 580 or newer")
    assert "CUDA 12.8" in last


@pytest.mark.usefixtures("with_gpu")
def test_a_model_without_a_graph_for_the_device(
    tiny_gemma3: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_gemma3.artifact.path)
    code, answer = told(capsys, "--model", model, "--device", "cuda")
    assert code == 1
    assert "expected a graph to generate on cuda, got generate on cpu" in answer["problem"]


def test_a_damaged_model(
    tiny_gemma3: TinyModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a large file, which is not read when the folder is opened."""
    monkeypatch.setattr(artifact, "SMALL_FILE_BYTES", 0)
    model = tmp_path / "model"
    shutil.copytree(tiny_gemma3.artifact.path, model)
    file = next((model / "weights").iterdir())
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.unlink()
    file.write_bytes(damaged)
    code, answer = told(capsys, "--model", str(model))
    assert code == 1
    assert "the folder is damaged, copy or export it again" in answer["problem"]
    code, answer = told(capsys, "--model", str(tmp_path / "nowhere"))
    assert code == 1
    assert "make one with python -m export" in answer["problem"]


def test_without_onnxruntime() -> None:
    """In a process that has neither of its builds."""
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from beam_gemma.preflight import main; sys.exit(main([]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1] == (
        "not ready: onnxruntime: expected one of its builds, got none; install beam-gemma[cpu], or "
        "beam-gemma[gpu] for NVIDIA GPUs"
    )
