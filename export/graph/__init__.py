"""Writes ONNX graphs, links weights and quantizes them."""
