"""Compares the pinned versions of all packages with known vulnerabilities.

    make audit

Where pip-audit is installed in .venv and reaches its data, it says what is vulnerable. The versions
are also compared with `advisories.json`, a short list that is only as new as the date in it. Exit
code 1: a version is vulnerable.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
ADVISORIES = Path(__file__).with_name("advisories.json")
PIP_AUDIT = ["-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off"]
TIMEOUT_SECS = 300


def pins(text: str) -> dict[str, str]:
    """Return the version of each package of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in found}


def listed(versions: Mapping[str, str], advisories: Mapping[str, Any]) -> list[str]:
    """Return a line for each advisory of the list that holds for a version."""
    return [
        f"{entry['package']} {version}: {entry['id']}, which holds for {entry['affected']}"
        for entry in advisories["advisories"]
        if (version := versions.get(canonicalize_name(entry["package"]))) is not None
        and SpecifierSet(entry["affected"]).contains(version, prereleases=True)
    ]


def audited(constraints: Path) -> tuple[list[str], int]:
    """Return a line for each vulnerability that pip-audit finds, and how many packages it knows.

    It passes over packages that its service does not answer for: without a service, over all.
    """
    if importlib.util.find_spec("pip_audit") is None:
        return [], 0
    command = [sys.executable, *PIP_AUDIT, "--format=json", f"--requirement={constraints}"]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECS
        )
        packages = json.loads(ended.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return [], 0
    known = [package for package in packages if "skip_reason" not in package]
    found = [
        f"{package['name']} {package['version']}: {fault['id']}"
        for package in known
        for fault in package.get("vulns", ())
    ]
    return found, len(known)


def main() -> int:
    """Print what is vulnerable and return the exit code."""
    versions = pins(CONSTRAINTS.read_text())
    advisories = json.loads(ADVISORIES.read_text())
    found, num_known = audited(CONSTRAINTS)
    found += listed(versions, advisories)
    for line in found:
        sys.stderr.write(f"{line}\n")
    sys.stdout.write(
        f"{len(versions)} packages, {len(found)} faults; pip-audit knew {num_known}, and "
        f"{ADVISORIES.name} is as of {advisories['as_of']}\n"
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
