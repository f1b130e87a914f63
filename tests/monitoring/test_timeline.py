"""Pulse: totals over time, thin for a long job, and one timeline of all engines."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.monitoring.timeline import (
    COLUMNS,
    GPU_SECS,
    MAX_STEPS,
    DeviceStats,
    Pulse,
    Work,
    timeline,
    used_mib,
)

STEP = Work(
    prompt_tokens=1, cached_tokens=5, completion_tokens=2, used_slots=3, slots=4,
    used_cache=6, cache=7,
)  # fmt: skip
DAY = 86_400


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def engine(name, *samples):
    width = 1 + len(COLUMNS)
    samples = [(*sample, *[0] * (width - len(sample))) for sample in samples]
    return {"engine": name, "device": "cpu", "processor": "x", "samples": samples}


def of_gpu(name, *samples):
    """An engine whose samples are a time, then (busy, steps, replays, graphs, used, total)."""
    padding = [0] * (len(COLUMNS) - 6)
    return engine(name, *((now, *padding, *stats) for now, *stats in samples))


def test_pulse_keeps_one_sample_a_second(clock):
    pulse = Pulse("cpu", clock=clock)
    for _ in range(83):
        clock.now += 0.125
        pulse.add(STEP)
    samples = pulse.take()["samples"]
    start = samples[0][0]
    assert samples[0][1:] == (0,) * len(COLUMNS)
    assert [round(s[0] - start) for s in samples[1:-1]] == list(range(1, 11))
    assert samples[-1][1:8] == (83, 415, 166, 249, 332, 498, 581)
    assert samples[-1][0] - start == pytest.approx(10.375)


def test_each_sample_is_given_once(clock):
    pulse = Pulse("cpu", clock=clock)
    taken = []
    for _ in range(50):
        clock.now += 0.5
        pulse.add(STEP)
        if random.Random(clock.now).random() < 0.3:
            taken += pulse.take()["samples"]
    taken += pulse.take()["samples"]
    assert taken == sorted(taken)
    assert len(set(taken)) >= 25
    assert taken[-1][1] == 50


def test_pulse_of_a_day_keeps_few_samples(clock):
    pulse = Pulse("cpu", clock=clock)
    for _ in range(DAY):
        clock.now += 1
        pulse.add(STEP)
    samples = pulse.take()["samples"]
    assert len(samples) < 2000
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(samples)]
    assert max(gaps) <= DAY / 256 + 1


def test_a_timeline_holds_every_step(clock):
    pulse = Pulse("cpu", clock=clock)
    for _ in range(2000):
        clock.now += 1
        pulse.add(STEP)
    line = timeline([pulse.take()])
    assert len(line["seconds"]) == MAX_STEPS + 1
    assert line["seconds"][-1] == pytest.approx(2000, abs=0.01)
    assert [line[name][-1] for name in COLUMNS[:5]] == [2000, 10_000, 4000, 6000, 8000]
    assert line["slots"][MAX_STEPS // 2] == pytest.approx(4000, rel=0.02)


def test_engines_add_up_on_one_timeline():
    line = timeline(
        [
            engine("a", (10.0, 0, 0, 0, 0, 0), (12.0, 20, 0, 0, 0, 0)),
            engine("b", (14.0, 5, 0, 0, 0, 0)),
            engine("b", (12.0, 0, 0, 0, 0, 0)),
            engine("a", (13.0, 30, 0, 0, 0, 0)),
        ]
    )
    assert line["seconds"] == [0, 1, 2, 3, 4]
    # An engine has done nothing before its first sample, and nothing more after its last.
    assert line["prompt_tokens"] == [0, 10, 20, 32, 35]


SAMPLES = st.lists(
    st.tuples(st.floats(0, 50), *[st.integers(0, 9)] * len(COLUMNS)), min_size=1, max_size=9
)


@given(st.dictionaries(st.sampled_from("abc"), SAMPLES, min_size=1), st.randoms())
def test_lost_and_shuffled_samples_leave_the_totals(engines, rng):
    pulses, totals = [], [0] * len(COLUMNS)
    for name, steps in engines.items():
        done, samples = [0] * len(COLUMNS), []
        for now, *step in sorted(steps):
            done = [a + b for a, b in zip(done, step, strict=True)]
            samples.append((now, *done))
        totals = [a + b for a, b in zip(totals, done, strict=True)]
        kept = [sample for sample in samples[:-1] if rng.random() < 0.5] + samples[-1:]
        pulses += [engine(name, sample) for sample in kept]
    rng.shuffle(pulses)
    line = timeline(pulses)
    assert [line[name][-1] for name in COLUMNS] == totals
    for name in COLUMNS:
        assert line[name] == sorted(line[name])


def test_timeline_of_no_samples_is_empty():
    assert set(timeline([])) == {"seconds", *COLUMNS, GPU_SECS}
    assert timeline([])["seconds"] == []


def test_timeline_of_one_sample_holds_its_totals_at_both_ends():
    line = timeline([engine("a", (1.0, 5, 0, 0, 0, 0))])
    assert line["prompt_tokens"] == [5, 5]


def test_samples_hold_what_the_device_says(clock):
    told = iter(DeviceStats(busy_secs=0.25 * n, steps=n, used_mib=9) for n in range(1, 10))
    pulse = Pulse("cuda", stats=lambda: next(told), clock=clock)
    for _ in range(4):
        clock.now += 0.5
        pulse.add(STEP)
    # Whoever takes samples is in another thread, and does not ask the device.
    assert [s[8:] for s in pulse.take()["samples"]] == [
        (0.0, 0, 0, 0, 0, 0),
        (0.5, 2, 0, 0, 9, 0),
        (1.0, 4, 0, 0, 9, 0),
        (1.0, 4, 0, 0, 9, 0),
    ]
    assert pulse.counts() == {
        "used_cache": 24, "cache": 28, "gpu_busy_ms": 1000, "gpu_steps": 4, "gpu_replays": 0
    }  # fmt: skip


def test_used_memory_is_that_of_the_last_sample():
    pulse = of_gpu("a", (10.0, 0, 0, 0, 0, 0, 0), (12.0, 1.5, 20, 10, 2, 30, 80))
    assert used_mib(pulse) == 30
    assert used_mib(engine("c", (10.0, 0))) is None


def test_gpus_add_up_on_one_timeline():
    """Each counts for the time that it had an engine; a CPU counts for nothing."""
    line = timeline(
        [
            of_gpu("a", (10.0, 0, 0, 0, 0, 0, 0), (12.0, 1.5, 20, 10, 2, 30, 80)),
            of_gpu("b", (11.0, 0, 0, 0, 0, 0, 0), (14.0, 3.0, 30, 30, 1, 50, 80)),
            engine("c", (10.0, 0), (14.0, 9)),
        ]
    )
    assert line["seconds"] == [0, 1, 2, 3, 4]
    assert line["gpu_secs"] == [0, 1, 3, 4, 5]
    assert line["busy_secs"] == [0, 0.75, 2.5, 3.5, 4.5]
    assert line["steps"] == [0, 10, 30, 40, 50]
    assert line["replays"] == [0, 5, 20, 30, 40]
    assert [line[name][-1] for name in ("graphs", "used_mib", "total_mib")] == [3, 80, 160]


def test_timeline_without_a_gpu_has_no_gpu_seconds():
    line = timeline([engine("c", (10.0, 0), (14.0, 9))])
    assert line["gpu_secs"] == [0, 0, 0, 0, 0]


def test_pulse_gives_the_time_of_the_first_row_once_noted(clock):
    pulse = Pulse("cpu", clock=clock)
    assert pulse.take()["first_row_secs"] is None
    pulse.note_first_row(7.5)
    assert [pulse.take()["first_row_secs"] for _ in range(2)] == [7.5, 7.5]
