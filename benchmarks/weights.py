"""Decodes a checkpoint to the same float32 weights in each system's own format.

The files are written once, beside the exported model.
"""

from pathlib import Path

import numpy as np
import transformers
from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

from tests.doubles.reference import real_model

FILE_TYPE = "general.file_type"


def f32_gguf(checkpoint: Path, model: Path) -> Path:
    """Return a GGUF file for llama.cpp with all tensors in float32."""
    path = model.with_name(f"{model.name}-f32.gguf")
    if not path.exists():
        partial = path.with_suffix(".partial")
        _write_gguf(GGUFReader(checkpoint), partial)
        partial.rename(path)
    return path


def transformers_folder(checkpoint: Path, model: Path) -> Path:
    """Return a float32 model folder for transformers."""
    folder = model.with_name(f"{model.name}-transformers")
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        reference = real_model(checkpoint)
        assert isinstance(reference, transformers.PreTrainedModel)
        reference.save_pretrained(partial)
        partial.rename(folder)
    return folder


def _write_gguf(reader: GGUFReader, path: Path) -> None:
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(path, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", FILE_TYPE):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(
            tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
