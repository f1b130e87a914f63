"""A job that is killed goes on where it was: nothing lost, nothing twice, hardly a token anew."""

import signal

import pytest

from tests.faults.conftest import LENGTH, NUM_REQUESTS, Faulty, assert_whole, resumed

PIECE, SLOTS = 16, 8
"""Rows of a piece, rows that run at once."""


def test_killed_twice_on_its_way(job: Faulty, undisturbed: Faulty, run) -> None:
    first = job.kill("piece:3")
    assert job.outcome() == {}
    kept = job.durable()
    assert kept >= 2 * PIECE
    second = job.kill("piece:4")
    assert NUM_REQUESTS > job.durable() >= kept + 3 * PIECE
    left = NUM_REQUESTS - job.durable()
    last = resumed(job, run)
    assert last == left * LENGTH
    assert_whole(job, undisturbed)
    once = NUM_REQUESTS * LENGTH
    # Lost at each kill: the rows that run, and the piece that is not written.
    assert once <= first + second + last <= once + 2 * (SLOTS + 2 * PIECE) * LENGTH


@pytest.mark.parametrize("place", ["stage:1", "rename:0", "rename:2", "record"])
def test_killed_while_it_writes(job: Faulty, undisturbed: Faulty, run, place: str) -> None:
    """All results are durable by then, so nothing is computed again."""
    job.kill(place)
    assert resumed(job, run) == 0
    assert_whole(job, undisturbed)


@pytest.mark.parametrize("place", ["aside:2", "rename:1"])
def test_killed_while_it_replaces(job: Faulty, undisturbed: Faulty, run, place: str) -> None:
    """An earlier output, of other shards, is never seen with the new one, and is not lost."""
    earlier = ["--limit=20", "--max_tokens=1", "--num_shards=2"]
    assert run(job.flags(*earlier))[0] == 0
    before = {**job.outcome(), job.record.name: job.record.read_bytes()}
    ended = job.doomed(place, "--overwrite")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not job.record.exists()
    renamed = job.outcome()
    assert len(renamed) == 1
    assert (renamed.items() <= before.items()) == (place == "aside:2")
    code, _, err = run(job.flags("--resume", "--prompt={nothing}"))
    assert (code, "'nothing'" in err) == (2, True)
    assert resumed(job, run) == 0
    assert_whole(job, undisturbed)


def test_killed_while_it_puts_things_in_order(job: Faulty, undisturbed: Faulty, run) -> None:
    """The output is whole; what has been removed of its pieces is all that is computed again."""
    job.kill("clear:2")
    kept = job.durable()
    assert job.outcome() == undisturbed.outcome()
    removed = NUM_REQUESTS - kept
    assert 0 < removed <= 2 * PIECE
    assert resumed(job, run) == removed * LENGTH
    assert_whole(job, undisturbed)
