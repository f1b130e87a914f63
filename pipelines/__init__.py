"""Command lines, one per pipeline, run from a checkout or an image."""

import resource
import sys

ADDRESS_SPACE = 2 << 30
"""Bytes that a job maps before it loads a model; with less, imports of libraries never end."""

if 0 <= (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) < ADDRESS_SPACE:
    sys.exit(
        f"error: memory: expected a limit of at least {ADDRESS_SPACE >> 10:,} KiB and the size of "
        f"the model, got {limit >> 10:,} KiB; raise the limit of ulimit -v"
    )
