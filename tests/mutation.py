"""Plugin of pytest for mutation testing, and the table of its scores.

    mutmut run
    python -m tests.mutation

mutmut writes the mutants of the modules that pyproject.toml names to the folder `mutants`, runs
with each of them the tests that reach it, and notes the exit status of pytest.
"""

import json
from pathlib import Path

import hypothesis
import pytest

MUTANTS = Path(__file__).parents[1] / "mutants"
SURVIVED = (0, 5, 33)
"""Exit status if all tests passed, or if there was none."""


def pytest_configure() -> None:
    """Count a failing example as it is found, without the search for a smaller one."""
    hypothesis.settings.register_profile(
        "mutation",
        hypothesis.settings.get_profile("repeatable"),
        database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    hypothesis.settings.load_profile("mutation")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort properties, which try many examples, after all other tests."""
    items.sort(key=lambda item: hypothesis.is_hypothesis_test(getattr(item, "obj", None)))


def scores() -> list[tuple[str, int, int, float]]:
    """Return each module with its number of mutants, of those killed, and their share."""
    found = []
    for path in sorted(MUTANTS.rglob("*.py.meta")):
        statuses = json.loads(path.read_text())["exit_code_by_key"].values()
        if None in statuses:
            raise SystemExit(f"{path}: expected a finished run; run mutmut again, and it goes on")
        if statuses:
            killed = sum(status not in SURVIVED for status in statuses)
            module = path.relative_to(MUTANTS).with_suffix("").as_posix()
            found.append((module, len(statuses), killed, killed / len(statuses)))
    return found


if __name__ == "__main__":
    print("| module | mutants | killed | survived | score |")
    print("|---|---|---|---|---|")
    for module, num_mutants, killed, share in scores():
        print(f"| `{module}` | {num_mutants} | {killed} | {num_mutants - killed} | {share:.1%} |")
