"""Plain memory that does what a stream may do.

What is copied to the host arrives when it is waited for, and until then, what was copied from there
must stay as it is.
"""

from typing import Any

import numpy as np

from beam_gemma.runtime.device_memory import HostMemory, Mark

MEMORY = 64 << 20


class LateMemory(HostMemory):
    """Memory whose copies take until they are waited for."""

    def __init__(self, num_bytes: int = MEMORY) -> None:
        super().__init__(num_bytes)
        self.late: list[tuple[Any, Any, bool]] = []

    def copy_in(self, address: int, source: np.ndarray) -> None:
        super().copy_in(address, source)
        self.late.append((source, source.copy(), False))

    def copy_out(self, target: np.ndarray, address: int) -> None:
        value = np.empty_like(target)
        super().copy_out(value, address)
        target.view(np.uint8)[...] = 0xAA
        self.late.append((target, value, True))

    def mark(self) -> Any:
        return LateMark(super().mark(), self, len(self.late))


class LateMark:
    """A mark that ends the copies before it."""

    def __init__(self, mark: Mark, memory: LateMemory, count: int) -> None:
        self.mark, self.memory, self.count = mark, memory, count

    def wait(self) -> None:
        for i, (array, value, is_output) in enumerate(self.memory.late[: self.count]):
            if value is not None and is_output:
                array[...] = value
            elif value is not None:
                np.testing.assert_array_equal(array, value, "changed on its way")
            self.memory.late[i] = (None, None, False)

    def seconds_since(self, earlier: "LateMark") -> float:
        return self.mark.seconds_since(earlier.mark)
