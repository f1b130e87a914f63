"""Writes the model's license and terms to every exported folder."""

import shutil
from pathlib import Path

from export.checkpoints.tensors import Checkpoint

APACHE = {"gemma4_text": "Gemma 4", "embedding_gemma2_text": "EmbeddingGemma 2"}
"""Models that Google publishes under the Apache License; all others come under the Gemma terms."""
APACHE_TEXT = Path(__file__).parents[2] / "LICENSE"
"""The text of the Apache License, which is this project's too."""
CONVERTED = """Model weights in this folder: {name}

{terms}

The weights were converted from the checkpoint "{name}" ({format}) by beam_gemma, which changed
their format and, where the manifest's precision says so, their number format.
"""
GEMMA_TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms"
)
RESTRICTIONS = """
The use restrictions of section 3.2 of the terms (ai.google.dev/gemma/prohibited_use_policy) apply
to whoever receives this folder. The license of beam_gemma itself does not cover the weights.
"""
APACHE_TERMS = """{model} is provided under the Apache License, Version 2.0
(ai.google.dev/gemma/apache_2), whose text is in the file LICENSE beside this one."""
STATED = """
The checkpoint states its license as: {license}
"""


def write_legal(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the notice that the model's license requires, and copy the checkpoint's legal files.

    The license is that of the model's family. What the checkpoint states is added to the notice,
    since a model that others have trained further may have terms besides.
    """
    folder.mkdir()
    apache = APACHE.get(checkpoint.config.model_type)
    terms = GEMMA_TERMS if apache is None else APACHE_TERMS.format(model=apache)
    notice = CONVERTED.format(name=checkpoint.name, format=checkpoint.format, terms=terms)
    notice += RESTRICTIONS if apache is None else ""
    if checkpoint.license is not None:
        notice += STATED.format(license=checkpoint.license)
    (folder / "NOTICE").write_text(notice)
    if apache is not None:
        shutil.copyfile(APACHE_TEXT, folder / "LICENSE")
    for file in checkpoint.legal_files:
        shutil.copyfile(file, folder / f"checkpoint-{file.name}")
