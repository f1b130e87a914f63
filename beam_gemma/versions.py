"""Software versions on this machine, some of which must match those of the workers."""

import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

import beam_gemma
from beam_gemma.errors import OptionsError


def versions() -> dict[str, str]:
    """Return the versions that must match on all machines of a job, by name."""
    return {
        "beam-gemma": beam_gemma.__version__,
        "Beam": version("apache-beam"),
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed, by package."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_versions(where: str, there: Mapping[str, str]) -> None:
    """Check that another machine has the same versions as this one.

    Args:
        where: Description of the other machine, for the error message.
        there: Versions on the other machine, by name.

    Raises:
        OptionsError: the versions differ.
    """
    if (here := versions()) != there:
        raise OptionsError(
            f"{where}: expected {_listed(here)} as on this side, got {_listed(there)}; build the "
            "image of workers and submit the job from the same checkout"
        )


def _listed(numbers: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())
