"""Stands in for PyTorch in processes of workers, which do not have it.

Beam imports PyTorch wherever it is installed, which takes a process seconds. A process whose
`PYTHONPATH` begins with this folder does not find it, as in the workers' image.
"""

raise ImportError("torch: expected in no worker")
