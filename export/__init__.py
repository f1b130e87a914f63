"""From a PyTorch checkpoint to a folder that workers run: `python -m export`.

Only this package may import torch, onnx, onnxscript, safetensors and gguf. It shares the seams
`config`, `signature`, `artifact` and `tokenizer` with the worker library and imports nothing else
of it.
"""
