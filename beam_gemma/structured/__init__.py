"""Constrained completions: schemas, regular expressions and choices as regular languages."""
