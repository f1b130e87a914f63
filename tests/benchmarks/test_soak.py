"""The soak: what it samples of processes, and when it calls a mode flat."""

import subprocess
import sys

import psutil
import pytest

from benchmarks.soak import Sample, fifths, is_flat, lines, sample


def test_medians_are_of_the_first_the_middle_and_the_last_fifth() -> None:
    assert fifths([1, 2, 3, 9, 9, 9, 7, 8, 9, 9, 9, 9, 4, 5, 6]) == (2, 8, 5)
    assert fifths([1, 2, 3]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("what", "last", "flat"),
    [
        ("memory", 110, True),
        ("memory", 111, False),
        ("threads", 108, True),
        ("threads", 109, False),
    ],
)
def test_an_amount_is_flat_up_to_a_limit(what: str, last: int, flat: bool) -> None:
    assert is_flat(what, 100, last) == flat


def test_only_samples_of_the_computing_engine_count() -> None:
    idle = Sample(5, 1, 1, is_computing=False)
    busy = [Sample(100 + 50 * (i > 7), 10, 20, is_computing=True) for i in range(10)]
    found = lines("in_memory", 1000, 12.3, [idle, *busy, Sample(900, 99, 9, is_computing=False)])
    assert found[0] == [
        "in_memory", "1,000", "12", "memory MiB", "100", "100", "150", "900", "not flat"
    ]  # fmt: skip
    assert [line[-1] for line in found[1:]] == ["flat", "flat"]
    with pytest.raises(SystemExit, match="add --rows"):
        lines("in_memory", 1, 0.1, [idle])


def test_a_sample_holds_all_processes_that_descend_from_one(tmp_path) -> None:
    alone = sample(psutil.Process(), tmp_path)
    wait = "import sys; print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        both = sample(psutil.Process(), tmp_path)
        child.communicate()
    assert both.threads > alone.threads
    assert both.descriptors >= alone.descriptors + 3
    assert not both.is_computing
    for folder in ("pieces/digest/x.arrow", "staged/0"):
        (tmp_path / folder).mkdir(parents=True)
        computing = sample(psutil.Process(), tmp_path).is_computing
        assert computing == folder.startswith("pieces")
