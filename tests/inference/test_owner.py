"""Owners: a dead one is announced, and nobody else is."""

import os
import subprocess
import sys
import tempfile

import pytest

from beam_gemma.inference import task_handler

KEY = "key"


@pytest.fixture
def note(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"beam-gemma-{KEY}.pid"


def claim_elsewhere(note, code):
    """Claim in another process, which then ends with some code."""
    script = f"import tempfile; tempfile.tempdir = {str(note.parent)!r}\n"
    script += f"from beam_gemma.inference.task_handler import claim; claim({KEY!r})\n{code}"
    subprocess.run([sys.executable, "-c", script], timeout=200)


def test_first_owner_is_silent(note, caplog):
    task_handler.claim(KEY)
    assert note.read_text() == str(os.getpid())
    assert not caplog.messages


def test_owner_of_another_key_or_still_alive_is_no_matter(note, caplog):
    task_handler.claim("other")
    note.write_text(str(os.getppid()))
    task_handler.claim(KEY)
    task_handler.claim(KEY)
    assert not caplog.messages


def test_owner_that_died_is_named(note, caplog):
    claim_elsewhere(note, "import os; os._exit(1)")
    former = note.read_text()
    task_handler.claim(KEY)
    (warning,) = caplog.messages
    assert warning.startswith(f"engine: process {former}, which ran it for this machine, has died")
    assert note.read_text() == str(os.getpid())


def test_owner_that_ended_in_peace_leaves_no_trace(note, caplog):
    claim_elsewhere(note, "assert tempfile.tempdir")
    assert not note.exists()
    task_handler.claim(KEY)
    assert not caplog.messages
