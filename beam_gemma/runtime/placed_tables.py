"""Tables of weights that a graph takes as inputs, on the device or in host memory.

A table of per-layer embeddings is as large as half of a model, and a step reads one row of it for
each token. Where it would take much of the device's memory, it lies in pinned host memory, whose
address is valid on the device too: the kernel reads its rows over the bus, 18 KB for each token of
a Gemma 4 E2B. Nothing is copied before a step, and a captured graph chooses the rows by itself.
"""

from pathlib import Path

import numpy as np

from beam_gemma.errors import ArtifactError
from beam_gemma.model.graph_tensors import MOST_TABLE_SHARE, Table
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.bound_graph import Place
from beam_gemma.runtime.device_memory import DeviceMemory

PIECE_BYTES = 64 << 20


class PlacedTables:
    """The tables of a graph, each at a fixed address that the device can read."""

    def __init__(self, signature: Signature, folder: Path, memory: DeviceMemory) -> None:
        """Read the tables.

        Args:
            signature: The graph's contract.
            folder: The graph's folder.
            memory: The device's memory.

        Raises:
            ArtifactError: a file is shorter than it was.
            DeviceError: the memory does not suffice.
        """
        self._memory = memory
        self._held: list[np.ndarray] = []
        num_bytes = sum(table.num_bytes for table in signature.tables)
        is_on_device = num_bytes <= MOST_TABLE_SHARE * memory.room().total
        place = self._on_device if is_on_device else self._on_host
        self.places = [
            Place(table.name, table.dtype, table.shape, place(table, folder))
            for table in signature.tables
        ]
        """Where each table lies, as an input of the graph."""

    def _on_host(self, table: Table, folder: Path) -> int:
        """Read a table into host memory; return its address."""
        target = self._memory.allocate_host(table.num_bytes)
        for start in range(0, table.num_bytes, PIECE_BYTES):
            _read(table, folder, start, target[start : start + PIECE_BYTES])
        self._held.append(target)
        return target.ctypes.data

    def _on_device(self, table: Table, folder: Path) -> int:
        """Read a table into the device's memory; return its address."""
        address = self._memory.allocate(table.num_bytes)
        for start in range(0, table.num_bytes, PIECE_BYTES):
            piece = np.empty(min(PIECE_BYTES, table.num_bytes - start), np.uint8)
            _read(table, folder, start, piece)
            self._memory.copy_in(address + start, piece)
            self._memory.mark().wait()
        return address


def _read(table: Table, folder: Path, start: int, target: np.ndarray) -> None:
    """Read bytes of a table from one on.

    Raises:
        ArtifactError: the file ends before.
    """
    file = folder / table.file
    with file.open("rb") as stream:
        stream.seek(table.offset + start)
        if stream.readinto(target.data) < len(target):
            raise ArtifactError(
                f"{file}: expected {len(target):,} bytes of {table.name} from "
                f"{table.offset + start:,} on, got fewer; export the model again"
            )
