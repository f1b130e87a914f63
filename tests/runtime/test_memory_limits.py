"""Processes with too little address space end in one sentence that names memory."""

import os
import resource
import subprocess
import sys

import pipelines
from tests.conftest import TinyModel
from tests.faults.conftest import ROOT

LOAD = """
import resource, sys
import psutil
from beam_gemma.errors import OptionsError
from beam_gemma.model.artifact import Artifact
from beam_gemma.runtime.limits import Limits
from beam_gemma.runtime.open_session import open_session

artifact = Artifact.open(sys.argv[1])
for more in (0, 16, 64):
    limit = psutil.Process().memory_info().vms + (more << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        session = open_session(artifact, "generate", "cpu", Limits())
        print("blocks", session.num_blocks["full_attention"])
    except OptionsError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_what_a_limit_leaves_is_what_a_session_takes(tiny_gemma3: TinyModel) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOAD, str(tiny_gemma3.artifact.path)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    none, little, enough = ended.stdout.splitlines()
    assert none.startswith("cache: expected memory for at least 2 blocks")
    assert little.startswith("memory: expected enough for the graph and caches of ")
    assert little.endswith("; free memory, raise the limit of ulimit -v, or lower --max_num_seqs")
    assert 2 <= int(enough.removeprefix("blocks ")) < 2305


def test_a_limit_that_holds_no_library_is_refused_before_imports() -> None:
    limit = pipelines.ADDRESS_SPACE // 2
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines.generate", "--help"], cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "error: memory: expected a limit of at least 2,097,152 KiB and the size of the model, got "
        "1,048,576 KiB; raise the limit of ulimit -v\n"
    )
