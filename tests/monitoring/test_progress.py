"""Progress: the meter loses nothing, the display tells it in one line."""

import io
import threading

from beam_gemma.monitoring.progress import Count, Display, Meter, describe


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.secs = 0.0

    def __call__(self):
        return self.secs


def test_meter_adds_up_from_many_threads():
    meter = Meter()

    def work():
        for _ in range(1000):
            meter.add(Count(rows=1, failed=0, prompt_tokens=3, completion_tokens=2))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.read() == Count(rows=8000, prompt_tokens=24000, completion_tokens=16000)


def test_line_tells_rows_failures_rate_and_time_left():
    count = Count(rows=1000, failed=2, prompt_tokens=90_000, completion_tokens=5000)
    line = describe(count, 4000, 50.0)
    assert line == (
        "1,000/4,000 rows (25 %), 2 failed, 1,800 prompt + 100.0 completion tokens/s, "
        "2 min 30 s left"
    )


def test_line_without_a_total_and_before_the_first_row():
    assert describe(Count(), None, 0.0) == "0 rows, 0 tokens/s"
    assert describe(Count(), 0, 1.0) == "0/0 rows (100 %), 0 tokens/s"
    long = describe(Count(rows=1), 7201, 1.0)
    assert long.endswith(", 2 h left")


def test_terminal_gets_one_line_that_is_overwritten():
    meter, stream, clock = Meter(), Terminal(), Clock()
    with Display(10, meter=meter, stream=stream, clock=clock) as display:
        meter.add(Count(rows=5, failed=5))
        clock.secs = 1.0
        display.show()
        meter.add(Count(rows=5))
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert "\r5/10 rows (50 %)" in text
    assert "10/10 rows (100 %)" in text.rpartition("\r")[2]


def test_shorter_line_wipes_the_longer_one():
    meter, stream, clock = Meter(), Terminal(), Clock()
    with Display(None, meter=meter, stream=stream, clock=clock) as display:
        clock.secs = 1.0
        meter.add(Count(rows=1, completion_tokens=123456))
        display.show()
        clock.secs = 100000.0
        display.show()
        first, second = stream.getvalue().split("\r")[-2:]
        assert len(second) == len(first) > len(second.rstrip())


def test_counts_of_an_earlier_job_are_left_out():
    meter, stream = Meter(), Terminal()
    meter.add(Count(rows=100))
    with Display(3, meter=meter, stream=stream):
        meter.add(Count(rows=3))
    assert "3/3 rows" in stream.getvalue()
    assert "103" not in stream.getvalue()


def test_file_gets_plain_lines():
    meter, stream, clock = Meter(), io.StringIO(), Clock()
    with Display(2, meter=meter, stream=stream, clock=clock) as display:
        meter.add(Count(rows=2))
        display.show()
    assert stream.getvalue() == ("2/2 rows (100 %), 0 tokens/s, 0 s left\n")
