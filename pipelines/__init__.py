"""Command lines, one per pipeline, run from a checkout or an image."""
