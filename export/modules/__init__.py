"""The PyTorch modules that are exported."""
