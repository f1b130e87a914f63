"""Measures a card's best rates: one large matrix product, and a copy within its memory.

python -m benchmarks.gpu.card --device cuda --dtype bfloat16
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.floors import Rates

SIDE = {"cuda": 8192, "cpu": 512}
COPIED_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
REPEATS, WARM_UP = 10, 3


def rates(device: str, dtype: str) -> Rates:
    """Return a card's rates, each from the median of several times."""
    kind = getattr(torch, dtype)
    side = SIDE[device]
    # Random numbers: zeros are multiplied faster.
    x, y = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    product = torch.empty(side, side, device=device, dtype=kind)
    product_secs = seconds(lambda: torch.mm(x, y, out=product), device)
    source = torch.empty(COPIED_BYTES[device], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy_secs = seconds(lambda: target.copy_(source), device)
    return Rates(
        operations_per_sec=2 * side**3 / product_secs,
        bytes_per_sec=2 * COPIED_BYTES[device] / copy_secs,
    )


def seconds(work: Callable[[], object], device: str) -> float:
    """Return the median time of some work on a device, in seconds."""
    taken = []
    for i in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= WARM_UP:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    """Measure the rates and print them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=SIDE)
    parser.add_argument("--dtype", default="bfloat16")
    flags = parser.parse_args()
    found = rates(flags.device, flags.dtype)
    name = torch.cuda.get_device_name() if flags.device == "cuda" else "cpu"
    print(
        json.dumps(
            {
                "card": name,
                "operations_per_sec": found.operations_per_sec,
                "bytes_per_sec": found.bytes_per_sec,
            }
        )
    )


if __name__ == "__main__":
    main()
