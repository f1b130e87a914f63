"""Killed jobs of models with an encoder or recurrent layers go on as those of others do."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.encoder_decoder_models import tiny_pair
from tests.doubles.recurrent_models import tiny_recurrent
from tests.faults.conftest import NUM_OK, NUM_ROWS, Faulty

PIECE = 16
"""Rows of a piece."""
DECODER_PROMPT = "--decoder_prompt={id} "
OTHER_PROMPT = "--decoder_prompt={id}: "


@dataclass(frozen=True)
class Job(Faulty):
    """A job with flags of its own."""

    own: tuple[str, ...] = ()

    def flags(self, *more: str) -> list[str]:
        return super().flags(*self.own, *more)


def job_of(name: str, table: Path, folder: Path) -> Job:
    """Return the job of a model; its decoder prompt tells all rows apart."""
    folder.mkdir()
    (folder / "in.parquet").hardlink_to(table)
    if name == "recurrent":
        return Job(str(tiny_recurrent() / "artifact"), folder)
    return Job(str(tiny_pair(name).artifact.path), folder, (DECODER_PROMPT,))


def finished(job: Job, run: Callable[..., Any], *more: str) -> dict[str, Any]:
    """Run a job to its end; return what its record says of its task."""
    code, out, err = run(job.flags(*more))
    assert code == 0, err
    assert out.startswith(f"read {NUM_ROWS} = ok {NUM_OK} + failed 1 = written {NUM_ROWS} rows; ")
    return json.loads(job.record.read_text())["tasks"][0]


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2", "recurrent"])
def test_killed_on_its_way(name: str, table: Path, tmp_path: Path, run) -> None:
    undisturbed = job_of(name, table, tmp_path / "undisturbed")
    finished(undisturbed, run)
    job = job_of(name, table, tmp_path / "killed")
    job.kill("piece:3")
    kept = job.durable()
    assert kept >= 2 * PIECE
    assert finished(job, run, "--resume")["resumed_rows"] >= kept
    assert job.outcome() == undisturbed.outcome()
    assert job.summary() == undisturbed.summary()


def test_another_decoder_prompt_asks_something_else(table: Path, tmp_path: Path, run) -> None:
    """Results of the one are never taken for those of the other."""
    job = job_of("t5gemma2", table, tmp_path / "killed")
    job.kill("piece:2")
    assert job.durable() >= PIECE
    other = Job(job.model, job.folder, (OTHER_PROMPT,))
    assert finished(other, run, "--resume")["resumed_rows"] == 0
    undisturbed = job_of("t5gemma2", table, tmp_path / "undisturbed")
    assert finished(undisturbed, run)["resumed_rows"] == 0
    assert other.outcome() != undisturbed.outcome()
