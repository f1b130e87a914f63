"""Runs one step of an exported graph, on a CPU or a CUDA device."""
