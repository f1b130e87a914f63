"""Measured throughput per model, precision and machine.

`profiles.json` holds the figures of `docs/benchmarks.md` and the commands that reproduce them.
"""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.monitoring.processor import cpu_name

PROFILES = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Measured throughput of one worker."""

    model: str
    config: Mapping[str, Any]
    """Config values that identify the model's shapes; fine-tuned weights are as fast."""
    precision: str
    head: Head
    device: Device
    machine: str
    prompt_tokens_per_sec: float
    completion_tokens_per_sec: float | None
    """Completion tokens per second; None for a head without completions."""
    date: str
    command: str
    section: str
    """Section of `docs/benchmarks.md` with the figures."""

    @property
    def origin(self) -> str:
        """Source of the figures, as a sentence."""
        return f"throughput as measured with {self.model} on {self.machine}, {self.date}"

    def fits(self, artifact: Artifact, head: Head, device: str) -> bool:
        """Return whether this profile covers such a model, head and device, on any machine."""
        is_this_shape = all(getattr(artifact.config, k) == v for k, v in self.config.items())
        asked = artifact.precision, head, device
        return is_this_shape and (self.precision, self.head, self.device) == asked


@functools.cache
def profiles() -> tuple[Profile, ...]:
    """Return all measured profiles."""
    return tuple(Profile(**fields) for fields in json.loads(PROFILES.read_text()))


def find_profile(
    artifact: Artifact, head: Head, device: str, machine: str | None
) -> Profile | None:
    """Return the profile of a model on a machine, or None."""
    found = (p for p in profiles() if p.machine == machine and p.fits(artifact, head, device))
    return next(found, None)


def this_machine() -> str:
    """Return this machine's name in the profiles: the number and model of its cores."""
    return f"{os.cpu_count()} cores of {cpu_name() or 'an unknown kind'}"
