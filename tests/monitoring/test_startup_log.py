"""A worker's log says how long each part of its start took; it stops where versions differ."""

import logging
import re

import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import OptionsError
from beam_gemma.inference.handlers import GemmaGenerateModelHandler
from beam_gemma.monitoring import startup_log
from beam_gemma.monitoring.progress import Count
from beam_gemma.monitoring.startup_log import FirstRow
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.versions import check_versions, versions

NUMBER = r"\d+\.\d"


@pytest.fixture
def handler(tiny_gemma3):
    settings = GenerateSettings(sampling=SamplingParams(max_tokens=2))
    return GemmaGenerateModelHandler(str(tiny_gemma3.artifact.path), settings)


def test_each_part_of_a_start_is_a_line_once(handler, tiny_gemma3, caplog):
    caplog.set_level(logging.INFO, "beam_gemma.monitoring.startup_log")
    model = handler.load_model()
    for _ in range(2):
        handler.run_inference(["one", "two"], model)
    lines = [record.getMessage() for record in caplog.records]
    expected = [
        rf"start: the process began {NUMBER} s ago, {NUMBER} s after its machine",
        rf"start: checked {re.escape(str(tiny_gemma3.artifact.path))} in {NUMBER} s",
        rf"start: loaded generate on cpu in {NUMBER} s",
        rf"start: first row {NUMBER} s after the model was there, "
        rf"{NUMBER} s after the process began",
    ]
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line)


def test_every_row_goes_on_to_the_callback():
    rows = []
    first_row = FirstRow(rows.append)
    first_row(Count(rows=1))
    first_row(Count(rows=2))
    assert rows == [Count(rows=1), Count(rows=2)]


def test_a_worker_of_another_version_does_not_start(handler):
    handler._versions = {**versions(), "Beam": "2.1.0"}
    here, there = (
        ", ".join(f"{k} {v}" for k, v in v.items()) for v in (versions(), handler._versions)
    )
    with pytest.raises(OptionsError) as error:
        handler.load_model()
    assert str(error.value) == (
        f"the side that submitted the job: expected {here} as on this side, got {there}; build the "
        "image of workers and submit the job from the same checkout"
    )
    assert "beam-gemma 0." in here
    check_versions("anything", versions())


def test_a_clock_that_was_set_back_gives_no_negative_age(monkeypatch):
    monkeypatch.setattr(startup_log.time, "time", lambda: 0.0)
    assert startup_log.process_age() == 0
