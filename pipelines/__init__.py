"""Command lines: one pipeline each, run from a checkout or an image."""
