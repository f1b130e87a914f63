"""Writes ONNX graphs, links their weights and quantizes them."""
