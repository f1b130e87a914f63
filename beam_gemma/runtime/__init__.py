"""Execution of single steps of an exported graph, on a CPU or a CUDA device."""
