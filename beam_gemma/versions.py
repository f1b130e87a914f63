"""Software versions that must match between the submitting machine and the workers."""

import sys
from collections.abc import Mapping
from importlib.metadata import version

import beam_gemma
from beam_gemma.errors import OptionsError


def versions() -> dict[str, str]:
    """Return the versions on this machine, by name."""
    return {
        "beam-gemma": beam_gemma.__version__,
        "Beam": version("apache-beam"),
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


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
