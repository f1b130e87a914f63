"""Writes the model's license and terms to every exported folder."""

import shutil
from pathlib import Path

from export.checkpoints.tensors import Checkpoint

NOTICE = """Model weights in this folder: {name}

Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

The weights were converted from the checkpoint "{name}" ({format}) by beam_gemma, which changed
their format and, where the manifest's precision says so, their number format. The use restrictions
of section 3.2 of the terms (ai.google.dev/gemma/prohibited_use_policy) apply to whoever receives
this folder. The licence of beam_gemma itself does not cover the weights.
"""


def write_legal(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the notice required by the Gemma terms, and copy the checkpoint's legal files."""
    folder.mkdir()
    (folder / "NOTICE").write_text(NOTICE.format(name=checkpoint.name, format=checkpoint.format))
    for file in checkpoint.legal_files:
        shutil.copyfile(file, folder / f"checkpoint-{file.name}")
