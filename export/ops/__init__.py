"""The custom ops: their reference in PyTorch and their lowerings for each device."""
