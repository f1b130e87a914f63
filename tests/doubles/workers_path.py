"""Where processes of workers find modules: as in their images, they have no PyTorch."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
NO_TORCH = Path(__file__).parent / "no_torch"
WORKERS_PATH = f"{NO_TORCH}{os.pathsep}{ROOT}"
"""`PYTHONPATH` of such a process."""
