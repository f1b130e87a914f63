"""Budgets of test files: which CPU times fail a run, on this processor and on a slower one."""

import json
from types import SimpleNamespace

import pytest

from tests import budgets

FILE = "tests/test_x.py"


@pytest.fixture
def totals(tmp_path, monkeypatch):
    """Sums of a run, beside a budget of 10 CPU seconds for one file."""
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps({"yardstick_secs": 0.05, "cpu_secs": {FILE: 10.0}}))
    monkeypatch.setattr(budgets, "BUDGETS", path)
    monkeypatch.setattr(budgets, "yardstick", lambda: 0.05)
    return budgets.Totals(record=False)


def report(cpu_secs, file=FILE):
    return SimpleNamespace(nodeid=f"{file}::test_a[b]", cpu_secs=cpu_secs, duration=1.0)


@pytest.mark.parametrize(("cpu_secs", "num_sentences"), [(74.9, 0), (75.1, 1)])
def test_file_fails_beyond_half_of_its_budget_and_the_slack(totals, cpu_secs, num_sentences):
    for secs in (cpu_secs - 20, 20):
        totals.pytest_runtest_logreport(report(secs))
    assert len(totals.over_budget()) == num_sentences


def test_file_may_take_longer_on_a_slower_processor(totals):
    totals._yardstick = 0.10
    totals.pytest_runtest_logreport(report(89.9))
    assert totals.over_budget() == []
    totals.pytest_runtest_logreport(report(0.2))
    assert totals.over_budget() == [
        f"{FILE}: expected at most 1.5 times its 20 CPU seconds and 60 more, got 90; make it "
        "faster, or say why not with --record-budgets"
    ]


def test_file_without_a_budget_does_not_fail(totals):
    totals.pytest_runtest_logreport(report(500, "tests/test_new.py"))
    assert totals.over_budget() == []


@pytest.mark.parametrize(("cpu_secs", "status"), [(70, 0), (80, 1)])
def test_run_fails_with_a_file_over_its_budget(totals, cpu_secs, status):
    totals.pytest_runtest_logreport(report(cpu_secs))
    session = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    totals.pytest_sessionfinish(session)
    assert session.exitstatus == status


@pytest.mark.usefixtures("totals")
def test_longest_files_come_first():
    items = [SimpleNamespace(nodeid=f"{name}::test_a") for name in ("tests/test_new.py", FILE)]
    # A file without a budget counts as 20 seconds.
    budgets.BUDGETS.write_text(json.dumps({"yardstick_secs": 0.05, "cpu_secs": {FILE: 30.0}}))
    budgets.pytest_collection_modifyitems(items)
    assert [budgets.file_of(item.nodeid) for item in items] == [FILE, "tests/test_new.py"]
