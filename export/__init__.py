"""Converts a PyTorch checkpoint to a model folder that workers run: `python -m export`.

Only this package may import torch, onnx, onnxscript, safetensors and gguf. From the worker library
it imports nothing but the shared modules `config`, `signature`, `artifact` and `tokenizer`.
"""

import beam_gemma as beam_gemma  # it turns off ONNX Runtime's telemetry, before torch imports it
