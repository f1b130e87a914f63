"""Constrained completions: schemas, regular expressions and choices as regular languages."""

from typing import Any

from beam_gemma import moved


def __getattr__(name: str) -> Any:
    """Return a class that version 0.7 had in a module of this name."""
    return moved.attribute(__name__, name)
