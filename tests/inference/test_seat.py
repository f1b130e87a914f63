"""Seats: one process has one, a dead owner is announced, and nothing that others made is used."""

import os
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import pytest

from beam_gemma.errors import StorageError
from beam_gemma.inference.seat import Seat

KEY = "key"
FORKED = """
import os, time
if os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
time.sleep(60)
"""
"""A process that ends while one that it forked goes on."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"beam-gemma-engines-{os.geteuid()}"


def take_elsewhere(folder, code):
    """Take the seat in another process, which then runs some code; return what it printed."""
    script = f"import tempfile; tempfile.tempdir = {str(folder.parent)!r}\n"
    script += f"from beam_gemma.inference.seat import Seat; taken = Seat({KEY!r}).take()\n{code}"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        process.wait(200)
        process.stdout.close()
    return process.pid, said


def test_first_owner_is_silent_and_alone(folder, caplog):
    taken = Seat(KEY).take()
    assert (folder / "key.lock").read_text() == str(os.getpid())
    assert Seat(KEY).take() is None
    assert Seat("other").take() is not None
    taken.leave()
    assert not (folder / "key.lock").exists()
    assert Seat(KEY).take() is not None
    assert not caplog.messages


def test_folder_and_files_are_this_users_alone(folder):
    _taken = Seat(KEY).take()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "key.lock").stat().st_mode) == 0o600
    assert {file.name for file in folder.iterdir()} == {"key.lock", "key.socket"}


def test_owner_that_died_is_named(folder, caplog):
    former, _ = take_elsewhere(folder, "import os; os._exit(1)")
    assert len(list(folder.iterdir())) == 2
    taken = Seat(KEY).take()
    (warning,) = caplog.messages
    assert warning.startswith(f"engine: process {former}, which ran it for this machine, has died")
    assert (folder / "key.lock").read_text() == str(os.getpid())
    wire = Seat(KEY).connect(lambda _: None)
    assert wire.pid == os.getpid()
    wire.close()
    taken.leave()


def test_owner_that_ended_in_peace_leaves_no_trace(folder, caplog):
    take_elsewhere(folder, "assert taken")
    assert list(folder.iterdir()) == []
    assert Seat(KEY).take() is not None
    assert not caplog.messages


def test_a_fork_does_not_keep_the_seat_of_an_owner_that_died(folder):
    """Neither its lock, nor its socket, at which nobody would answer."""
    _, forked = take_elsewhere(folder, FORKED)
    try:
        began = time.monotonic()
        assert Seat(KEY).connect(lambda _: None) is None
        assert Seat(KEY).take() is not None
        assert time.monotonic() - began < 5
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(forked), 9)


def test_a_long_path_is_no_matter(folder, monkeypatch):
    """The address of a socket has at most 107 bytes."""
    long = folder.parent / ("x" * 200)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    taken = Seat(KEY).take()
    wire = Seat(KEY).connect(lambda _: None)
    assert wire is not None
    wire.close()
    taken.leave()


def plant_link(folder):
    (folder.parent / "target").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "target")


def plant_open(folder):
    folder.mkdir()
    folder.chmod(0o777)


def plant_foreign(folder):
    folder.mkdir(mode=0o700)
    if os.geteuid():
        folder.chmod(0o750)  # only root can give a folder away
    else:
        os.chown(folder, 65534, 65534)


@pytest.mark.parametrize("plant", [plant_link, plant_open, plant_foreign])
def test_a_planted_folder_is_refused(folder, plant):
    plant(folder)
    with pytest.raises(StorageError, match=r"engines-\d+: expected a folder of user .*TMPDIR"):
        Seat(KEY)


def test_a_planted_lock_is_refused(folder):
    folder.mkdir(mode=0o700)
    (folder / "key.lock").symlink_to(folder.parent / "target")
    with pytest.raises(StorageError, match=r"key\.lock: expected to create it, got OSError"):
        Seat(KEY).take()
    assert not (folder.parent / "target").exists()
