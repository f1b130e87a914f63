"""The audit of pinned versions: none of them has a vulnerability that is known."""

import json

import pytest
from packaging.specifiers import SpecifierSet

from templates import audit

PINS = audit.pins(audit.CONSTRAINTS.read_text())
LIST = json.loads(audit.ADVISORIES.read_text())


def test_no_pinned_version_is_on_the_list() -> None:
    assert audit.listed(PINS, LIST) == []


def test_the_list_is_of_packages_that_are_pinned() -> None:
    for entry in LIST["advisories"]:
        assert entry["package"] in PINS
        assert SpecifierSet(entry["affected"])


@pytest.mark.parametrize(("version", "number"), [("3.1.5", 1), ("3.1.4", 3), ("3.1.6", 0)])
def test_a_vulnerable_version_is_named(version: str, number: int) -> None:
    found = audit.listed(audit.pins(f"Jinja2=={version}\nnumpy==2.0  # exact\n"), LIST)
    assert len(found) == number
    if found:
        assert found[-1] == f"jinja2 {version}: CVE-2025-27516, which holds for <3.1.6"


def test_pip_audit_is_heard_where_it_answers(monkeypatch, tmp_path, capsys) -> None:
    """A program in its place tells of a vulnerability, and then does not reach its data."""
    told = [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}]
    told.append({"name": "b", "skip_reason": "not found"})
    (tmp_path / "pip_audit.py").write_text(
        f"print({json.dumps(json.dumps({'dependencies': told}))}); exit(1)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert audit.main() == 1
    out, err = capsys.readouterr()
    assert err == "a 1: CVE-1\n"
    assert f"{len(PINS)} packages, 1 faults; pip-audit knew 1, and" in out
    (tmp_path / "pip_audit.py").write_text("raise ConnectionError")
    assert audit.main() == 0
    assert "0 faults; pip-audit knew 0" in capsys.readouterr().out
