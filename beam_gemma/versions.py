"""What has to be the same where a job is submitted and where it runs."""

import sys
from collections.abc import Mapping
from importlib.metadata import version

import beam_gemma
from beam_gemma.errors import OptionsError


def versions() -> dict[str, str]:
    """Return the versions on this side, by name."""
    return {
        "beam-gemma": beam_gemma.__version__,
        "Beam": version("apache-beam"),
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def check_versions(where: str, there: Mapping[str, str]) -> None:
    """Compare another side with this one.

    Args:
        where: The other side.
        there: Its versions.

    Raises:
        OptionsError: they differ.
    """
    if (here := versions()) != there:
        raise OptionsError(
            f"{where}: expected {_listed(here)} as on this side, got {_listed(there)}; build the "
            "image of workers and submit the job from the same checkout"
        )


def _listed(numbers: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())
