"""Leases: of all jobs that write an output, one may publish, and who may take another's place."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from apache_beam.io.filesystems import FileSystems

from beam_gemma import storage
from beam_gemma.errors import StorageError
from beam_gemma.tables import lease
from beam_gemma.tables.lease import Lease, Standing, check_held, is_held, take

NUM_JOBS = 6


@pytest.fixture(params=["local", "gs", "another file system"])
def work(request, tmp_path, monkeypatch):
    """Return a work folder on each kind of file system."""
    if request.param == "gs":
        return f"{request.getfixturevalue('gcp').bucket}/{tmp_path.name}/_x.parquet.work"
    if request.param == "another file system":
        monkeypatch.setattr(storage, "_create_local", storage._create_if_missing)
    return f"{tmp_path}/_x.parquet.work"


@pytest.fixture
def sleeper():
    """Return a process of this machine that runs."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def elsewhere(job):
    return Lease.of_this_process(job, is_remote=True)


def of_process(pid, **fields):
    mine = Lease.of_this_process("a", is_remote=False)
    return dataclasses.replace(mine, **{"pid": pid, "process": lease._process(pid) or "", **fields})


def test_the_first_job_takes_the_lease_and_a_second_is_told_of_it(work):
    assert take(work, elsewhere("a"), up_to=Standing.ENDED) is None
    other = take(work, elsewhere("b"), up_to=Standing.ENDED)
    assert other is not None
    assert other.job == "a"
    assert str(other).startswith(f"a job that {other.host} submitted at ")
    check_held(work, "a")
    with pytest.raises(StorageError, match="expected the lease of this job, got a job that "):
        check_held(work, "b")


def test_a_job_whose_place_was_taken_no_longer_holds_the_lease(work, caplog):
    take(work, elsewhere("a"), up_to=Standing.ENDED)
    assert take(work, elsewhere("b"), up_to=Standing.UNSEEN) is None
    assert (is_held(work, "a"), is_held(work, "b")) == (False, True)
    assert "which can no longer publish" in caplog.text
    with pytest.raises(StorageError, match="nothing more is published"):
        check_held(work, "a")


def test_of_many_jobs_at_once_one_takes_the_lease(tmp_path, gcp):
    for work in (f"{tmp_path}/work", f"{gcp.bucket}/{tmp_path.name}/many"):
        barrier = Barrier(NUM_JOBS)

        def launch(job, work=work, barrier=barrier):
            barrier.wait()
            return take(work, elsewhere(job), up_to=Standing.ENDED)

        with ThreadPoolExecutor(NUM_JOBS) as pool:
            others = list(pool.map(launch, map(str, range(NUM_JOBS))))
        assert others.count(None) == 1
        assert {other.job for other in others if other} == {str(others.index(None))}


def test_of_many_jobs_at_once_one_takes_the_place_of_a_dead_one(tmp_path, sleeper, monkeypatch):
    """The others find it running, because a place is taken by what nobody has created yet."""
    work = f"{tmp_path}/work"
    dead = of_process(sleeper.pid, job="dead", process="0")
    take(work, dead, up_to=Standing.ENDED)
    barrier = Barrier(NUM_JOBS)
    newest = lease._newest
    seen = []

    def together(work):
        found = newest(work)
        if len(seen) < NUM_JOBS:
            seen.append(found)
            barrier.wait()
        return found

    monkeypatch.setattr(lease, "_newest", together)

    def launch(job):
        return take(work, of_process(sleeper.pid, job=job), up_to=Standing.ENDED)

    with ThreadPoolExecutor(NUM_JOBS) as pool:
        others = list(pool.map(launch, map(str, range(NUM_JOBS))))
    assert [found[1].job for found in seen] == ["dead"] * NUM_JOBS
    assert others.count(None) == 1


def test_a_lease_that_is_given_back_is_that_of_the_job_before(work):
    take(work, elsewhere("a"), up_to=Standing.ENDED)
    take(work, elsewhere("b"), up_to=Standing.UNSEEN)
    lease.release(work, "a")
    assert is_held(work, "b")
    lease.release(work, "b")
    assert is_held(work, "a")


def test_a_write_that_the_client_repeats_is_still_the_first(work):
    assert storage.create_once(f"{work}/file", b"mine")
    assert not storage.create_once(f"{work}/file", b"another")
    if work.startswith("gs://"):
        assert storage.create_once(f"{work}/file", b"mine")
    with FileSystems.open(f"{work}/file") as stream:
        assert stream.read() == b"mine"


@pytest.mark.parametrize("is_there", [False, True])
def test_a_file_system_without_hard_links_has_leases_too(tmp_path, monkeypatch, is_there):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    work = f"{tmp_path}/work"
    if is_there:
        take(work, elsewhere("a"), up_to=Standing.ENDED)
    assert (take(work, elsewhere("b"), up_to=Standing.ENDED) is None) is not is_there
    assert is_held(work, "b") is not is_there


def test_a_process_that_is_killed_has_ended_at_once(sleeper):
    holder = of_process(sleeper.pid)
    assert holder.standing is Standing.RUNNING
    sleeper.kill()
    deadline = time.monotonic() + 10
    while holder.standing is Standing.RUNNING and time.monotonic() < deadline:
        time.sleep(0.001)
    assert holder.standing is Standing.ENDED  # also before its parent has read its exit code
    sleeper.wait()
    assert holder.standing is Standing.ENDED


def test_a_process_number_that_is_used_again_is_not_the_job(sleeper):
    assert of_process(sleeper.pid, process="1").standing is Standing.ENDED


def test_jobs_of_other_machines_and_services_are_not_seen(sleeper):
    assert of_process(sleeper.pid, machine="another").standing is Standing.UNSEEN
    assert of_process(sleeper.pid, machine="").standing is Standing.UNSEEN
    assert of_process(sleeper.pid, is_remote=True).standing is Standing.UNSEEN


def test_an_earlier_job_of_this_process_has_ended():
    assert Lease.of_this_process("a", is_remote=False).standing is Standing.ENDED


@pytest.mark.parametrize("content", [b"", b"{", b"[]", json.dumps({"job": "a"}).encode()])
def test_a_lease_of_another_form_is_one_sentence(tmp_path, content):
    folder = tmp_path / "work" / lease.FOLDER
    folder.mkdir(parents=True)
    (folder / "000001.json").write_bytes(content)
    with pytest.raises(StorageError, match="expected the lease of a job, got a file of another"):
        take(f"{tmp_path}/work", elsewhere("b"), up_to=Standing.RUNNING)
