"""A job that Dataflow does not take is one sentence, whatever its clients raise."""

import sys

import pyarrow as pa
import pyarrow.parquet as pq

from beam_gemma import launch
from pipelines import generate
from tests.dataflow_service import dataflow_service


def test_a_job_that_dataflow_does_not_take(gcp, tiny_gemma3, tmp_path, monkeypatch, capsys):
    folder = f"{gcp.bucket}/refused"
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in/rows.parquet")
    gcp.upload(tmp_path / "in", folder)
    gcp.upload(tiny_gemma3.artifact.path, f"{folder}/model")
    with dataflow_service() as service:
        service.refusal = "the account may not create jobs"
        flags = [
            f"--model={folder}/model", f"--input={folder}/rows.parquet", "--prompt={text}",
            f"--output={folder}/out.parquet", f"--temp_location={gcp.bucket}/tmp",
            f"--project={gcp.project}", "--region=us-central1", "--sdk_container_image=image",
            *service.flags,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["pipelines.generate", *flags])
        assert launch.exit_code(generate.main) == launch.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    sentence = next(line for line in err.splitlines() if line.startswith("error: "))
    assert sentence.startswith("error: Dataflow: expected the job to be taken, got ")
    assert service.refusal in sentence
    assert sentence.endswith("; docs/dataflow.md names the roles and settings that it takes")
    assert "Traceback" not in err
