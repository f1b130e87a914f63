"""All three pipelines on a portable runner, with workers in processes of their own."""

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.cli import run as cli
from pipelines import classify, embed, generate
from tests.doubles.job_server import job_server

pytestmark = pytest.mark.timeout(600)
TASKS = {
    "generate": (generate, ["--prompt=say {text}", "--max_tokens=4", "--ignore_eos"]),
    "classify": (classify, ["--prompt={text}: ", "--labels=a,b"]),
    "embed": (embed, ["--text_column=text"]),
}
BALANCE = "read 40 = ok 39 + failed 1 = written 40 rows"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The flags that lead to a job server."""
    with job_server(tmp_path_factory.mktemp("server")) as (_, flags):
        yield flags


@pytest.mark.parametrize("task", TASKS)
def test_the_same_files_as_in_this_process(
    task, server, tiny_gemma3, two_sided, tmp_path, monkeypatch, capsys
):
    module, settings = TASKS[task]
    artifact = two_sided[1] if task == "embed" else tiny_gemma3.artifact
    texts = [f"text {i}" for i in range(39)] + [None]
    pq.write_table(pa.table({"id": range(40), "text": texts}), tmp_path / "rows.parquet")
    flags = [*settings, f"--model={artifact.path}", f"--input={tmp_path}/rows.parquet"]

    for place, runner in (("here", []), ("there", server)):
        output = f"--output={tmp_path}/{place}/rows.parquet"
        monkeypatch.setattr(sys, "argv", [module.__name__, *flags, output, *runner])
        assert cli.exit_code(module.main) == 0
        assert BALANCE in capsys.readouterr().out

    files = [
        [file.read_bytes() for file in sorted((tmp_path / folder).glob("*.parquet"))]
        for folder in ("here", "there")
    ]
    assert files[0] == files[1] != []
