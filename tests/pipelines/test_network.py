"""Nothing calls home: a job without cloud storage talks to processes of its own machine alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doubles.network import addresses_of, beyond_loopback, can_trace
from tests.doubles.workers_path import WORKERS_PATH

OPT_OUTS = {"CI", "ORT_RUNNING_UNIT_TESTS", "ORT_DISABLE_TELEMETRY"}
"""Variables of which any one keeps ONNX Runtime from sending telemetry."""
PROCESSES = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")


@pytest.fixture
def users_env(tmp_path):
    """The variables of a user who has opted out of nothing, and whose home is empty."""
    home = tmp_path / "home"
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in OPT_OUTS}
    return env | {"HOME": str(home), "PYTHONPATH": WORKERS_PATH}


@pytest.mark.parametrize("mode", [(), PROCESSES], ids=["one process", "worker processes"])
def test_job_calls_no_other_machine_and_leaves_nothing_at_home(
    mode, tiny_gemma3, tmp_path, users_env
):
    table = tmp_path / "in.jsonl"
    table.write_text("".join(json.dumps({"text": f"the {i}"}) + "\n" for i in range(20)))
    command = [
        sys.executable, "-m", "pipelines.generate", f"--model={tiny_gemma3.artifact.path}",
        f"--input={table}", f"--output={tmp_path}/out.parquet", "--prompt={text}",
        "--max_tokens=2", *mode,
    ]  # fmt: skip
    trace = tmp_path / "trace"
    trace.mkdir()
    done, addresses = addresses_of(command, trace, users_env, by_strace=can_trace())
    assert "read 20 = ok 20" in done.stdout, done.stderr
    assert bool(addresses) == bool(mode)  # workers are called, so calls are seen
    assert beyond_loopback(addresses) == set()
    assert list(Path(users_env["HOME"]).rglob("*")) == []


CALL = "import socket; socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.1', 53))"


@pytest.mark.parametrize("by_strace", [True, False] if can_trace() else [False])
def test_call_to_another_machine_is_seen(by_strace, tmp_path, users_env):
    _, addresses = addresses_of(
        [sys.executable, "-c", CALL], tmp_path, users_env, by_strace=by_strace
    )
    assert beyond_loopback(addresses) == {"192.0.2.1"}


@pytest.mark.parametrize("package", ["beam_gemma", "export", "benchmarks.rate"])
def test_telemetry_is_off_before_onnx_runtime_can_be_imported(package, users_env):
    """By the time that any part of ours is imported, and so in its child processes too."""
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime':\n"
        "            assert os.environ.get('ORT_DISABLE_TELEMETRY') == '1'\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {package}\n"
        "print(os.environ.get('ORT_DISABLE_TELEMETRY'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=users_env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"
