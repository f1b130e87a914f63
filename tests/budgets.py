"""Time budgets of test files: a pytest plugin that orders files, slowest first, and keeps budgets.

`budgets.json` holds the CPU seconds that each file took when it was recorded, child processes
included, and those of a yardstick, a fixed loop that tells a slow processor from a fast one. CPU
time is counted, not wall time, so a busy machine breaks no budget. What files share
(`tests/doubles/once.py`) is counted apart, because it falls to whichever file is first. A run fails
when a file takes more than one and a half times its budget. After a change that is worth its time:

    pytest -m "not gpu" --numprocesses 2 --dist loadfile --record-budgets
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.once import MAKING

BUDGETS = Path(__file__).with_suffix(".json")
TOLERANCE = 1.5
SLACK_SECS = 60.0
"""CPU seconds any file may take beyond its budget: imports fall to whichever file is first, and the
time of a child process to the file that runs when the system hears of its end."""
NEW_FILE_SECS = 20.0
"""CPU seconds that a file without a budget is thought to take."""
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-budgets", action="store_true", help="write tests/budgets.json")


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def read_budgets() -> dict[str, Any]:
    return json.loads(BUDGETS.read_text())


def yardstick() -> float:
    """Return the CPU seconds of a fixed loop, the best of three."""
    taken = []
    for _ in range(3):
        before = time.process_time()
        sum(i * i % 7 for i in range(1_000_000))
        taken.append(time.process_time() - before)
    return min(taken)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files by their budgets, longest first: no worker is left alone with a long one."""
    budgets = read_budgets()["cpu_secs"]
    items.sort(key=lambda item: -budgets.get(file_of(item.nodeid), NEW_FILE_SECS))


def cpu_secs() -> float:
    """Return the CPU seconds of this process and those it has waited for, without shared work."""
    times = os.times()
    spent = times.user + times.system + times.children_user + times.children_system
    return spent - MAKING.total()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[STARTED] = cpu_secs()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add to each phase's report the CPU seconds since the phase before it."""
    report = yield
    now = cpu_secs()
    report.cpu_secs = now - item.stash[STARTED]
    report.shared_secs = dict(MAKING)
    item.stash[STARTED] = now
    return report


class Totals:
    """Sums CPU and wall seconds by file, in the process that sees all reports."""

    def __init__(self, *, record: bool) -> None:
        self._record = record
        self._cpu: Counter[str] = Counter()
        self._wall: Counter[str] = Counter()
        self._shared: dict[str, float] = {}
        self._yardstick = yardstick()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = file_of(report.nodeid)
        self._cpu[file] += getattr(report, "cpu_secs", 0.0)
        self._wall[file] += report.duration
        self._shared |= getattr(report, "shared_secs", {})

    def over_budget(self) -> list[str]:
        """Return a sentence for each file that took too long."""
        recorded = read_budgets()
        slower = max(1.0, self._yardstick / recorded["yardstick_secs"])
        budgets = {file: slower * secs for file, secs in recorded["cpu_secs"].items()}
        return [
            f"{file}: expected at most {TOLERANCE} times its {budgets[file]:.0f} CPU seconds and "
            f"{SLACK_SECS:.0f} more, got {secs:.0f}; make it faster, or say why not with "
            "--record-budgets"
            for file, secs in self._cpu.items()
            if file in budgets and secs > TOLERANCE * budgets[file] + SLACK_SECS
        ]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._record:
            budgets = read_budgets()["cpu_secs"] | {f: round(s, 1) for f, s in self._cpu.items()}
            kept = {file: budgets[file] for file in sorted(budgets) if Path(file).exists()}
            record = {"yardstick_secs": round(self._yardstick, 4), "cpu_secs": kept}
            BUDGETS.write_text(json.dumps(record, indent=2) + "\n")
        elif self.over_budget() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        total, shared = sum(self._cpu.values()), sum(self._shared.values())
        terminalreporter.section(
            f"CPU seconds of test files: {total:.0f} in all, and {shared:.0f} for what they share"
        )
        for file, secs in self._cpu.most_common(25):
            terminalreporter.line(f"{secs:7.1f} CPU {self._wall[file]:7.1f} wall  {file}")
        for sentence in [] if self._record else self.over_budget():
            terminalreporter.line(sentence, red=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Totals(record=config.getoption("--record-budgets")), "totals")
