"""Storage that fails: nothing half-written is ever visible, and what was computed is kept."""

import os

import pytest

from beam_gemma.inference import saved_results
from beam_gemma.tables import exchange, file_sink
from tests.faults.conftest import LENGTH, NUM_REQUESTS, Faulty, assert_whole, resumed


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_no_space_for_pieces(job: Faulty, undisturbed: Faulty, run, monkeypatch) -> None:
    """After a few of them; the job ends in a sentence, with what was durable before."""
    fsync, left = os.fsync, [9]

    def failing(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            no_space()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(saved_results, "MAX_ROWS", saved_results.MIN_ROWS)
    code, out, err = run(job.flags())
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "No space left on device; once that is set right, go on with --resume" in err
    monkeypatch.undo()
    assert job.outcome() == {}
    assert not list(job.work.rglob("*.tmp"))
    kept = job.durable()
    assert 0 < kept < NUM_REQUESTS
    assert resumed(job, run) == (NUM_REQUESTS - kept) * LENGTH
    assert_whole(job, undisturbed)


@pytest.mark.parametrize("num_bytes", [500, 4500], ids=["pieces", "output"])
def test_a_disk_that_is_full(job: Faulty, undisturbed: Faulty, run, num_bytes: int) -> None:
    """For real, by a limit of the system: first on what pieces need, then on what shards need."""
    ended = job.doomed(f"disk:{num_bytes}", "--num_shards=1")
    assert ended.returncode == 1
    assert "File too large" in ended.stderr
    assert job.outcome() == {}
    kept = job.durable()
    assert kept == (0 if num_bytes == 500 else NUM_REQUESTS)
    tokens = resumed(job, run)
    assert tokens == (NUM_REQUESTS - kept) * LENGTH
    assert_whole(job, undisturbed)


@pytest.mark.parametrize("place", ["write", "close", "rename", "record"])
def test_a_sink_that_fails(job: Faulty, undisturbed: Faulty, run, monkeypatch, place: str) -> None:
    match place:
        case "write" | "close":
            monkeypatch.setattr(file_sink._ParquetShard, place, no_space)
        case "rename":
            monkeypatch.setattr(exchange, "move", no_space)
        case "record":
            monkeypatch.setattr(file_sink, "write_once", no_space)
    code, out, err = run(job.flags())
    assert (code, out) == (1, "")
    assert "No space left on device" in err
    monkeypatch.undo()
    assert not job.record.exists()
    assert job.outcome() == {}
    assert resumed(job, run) == 0
    assert_whole(job, undisturbed)


def test_a_torn_piece_is_named(job: Faulty, undisturbed: Faulty, run) -> None:
    job.kill("piece:4")
    kept = job.durable()
    torn = next(job.work.rglob("*.arrow"))
    torn.write_bytes(torn.read_bytes()[:-9])
    code, _, err = run(job.flags("--resume"))
    assert code == 1
    assert err.startswith(f"error: {torn}: expected a piece of results")
    assert job.outcome() == {}
    torn.unlink()
    left = job.durable()
    assert 0 < left < kept
    assert resumed(job, run) == (NUM_REQUESTS - left) * LENGTH
    assert_whole(job, undisturbed)
