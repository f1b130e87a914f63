"""Opens a session for a model folder's graph, on the CPU or on a GPU."""

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count, takewhile
from pathlib import Path

from beam_gemma.errors import OptionsError, one_line
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.model.signature import Signature
from beam_gemma.monitoring.startup_log import logged
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.cuda_session import CudaSession
from beam_gemma.runtime.device_memory import (
    FLASH_CAPABILITY,
    CudaMemory,
    DeviceMemory,
    compute_capability,
    require_bfloat16,
    require_two_sided,
)
from beam_gemma.runtime.limits import Limits
from beam_gemma.runtime.step_shapes import StepSizes

LEAST_ROW_HEADS = 64
"""Fewest rows times query heads of a decode step with heads too wide for flash attention. In a
smaller step, ONNX Runtime splits the keys of a row over up to 32 blocks of threads, but no more
than there are tiles of 128 keys in the longest context, so a row's sums would depend on other rows.
With so many, a device of 256 multiprocessors splits them over 8 blocks, and the narrowest block
table covers 8 tiles (`step_shapes.MIN_CONTEXT`)."""
NO_MEMORY = re.compile(
    r"MemoryError|bad_alloc|bad allocation|[Cc]annot allocate memory|[Ff]ailed to allocate|"
    r"pthread_create failed"
)
"""What errors of numpy, ONNX Runtime and the system say when no memory is left."""


def open_session(
    artifact: Artifact, head: Head, device: Device, limits: Limits
) -> Session | CudaSession:
    """Load a graph, with caches sized to the memory that is left.

    Raises:
        OptionsError: the device is missing, cannot run the graph, or has too little memory.
        ArtifactError: the graph is missing or damaged.
    """
    limits.check(device)
    if device == "cuda":
        signature = artifact.signature(head, device)
        require_bfloat16(signature.dtype, compute_capability)
        require_two_sided(signature, compute_capability)
        has_flash = compute_capability() >= FLASH_CAPABILITY
        return open_on(CudaMemory(), artifact, signature, limits, has_flash=has_flash)
    config = limits.engine_config(device)
    tokens = limits.embed_tokens(device) if head == "embed" else config.max_num_batched_tokens
    try:
        return Session.of(
            artifact, head=head, max_num_seqs=config.max_num_seqs, max_num_batched_tokens=tokens
        )
    except Exception as error:  # ONNX Runtime raises several types, and those of a damaged graph
        if NO_MEMORY.search(one_line(error)) is None:
            raise
        raise OptionsError(
            f"memory: expected enough for the graph and caches of {artifact.path}, got "
            f"{one_line(error)}; free memory, raise the limit of ulimit -v, or lower --max_num_seqs"
        ) from error


def open_on(
    memory: DeviceMemory,
    artifact: Artifact,
    signature: Signature,
    limits: Limits,
    *,
    has_flash: bool = True,
) -> CudaSession:
    """Load a CUDA graph with its inputs, outputs and state in a device's memory.

    Args:
        memory: The device's memory.
        artifact: The model folder.
        signature: Contract of the graph.
        limits: Limits set by the user.
        has_flash: Whether the device has flash attention.
    """
    names = [name for name in artifact.files if name.startswith("weights/")]
    with logged("read weights ahead"):
        read_ahead(artifact.path / name for name in names)
    return CudaSession(
        str(artifact.graph_path(signature.head, signature.device)),
        signature,
        memory,
        sizes=_sizes(signature, limits, has_flash=has_flash),
        max_num_seqs=limits.engine_config("cuda").max_num_seqs,
        memory_utilization=limits.memory_utilization,
    )


def _sizes(signature: Signature, limits: Limits, *, has_flash: bool) -> StepSizes:
    """Return the sizes to pad steps to.

    For whole texts and for sources, they cover one that is longer than the budget.

    Args:
        signature: Contract of the graph.
        limits: Limits set by the user.
        has_flash: Whether the device has flash attention.
    """
    if signature.head == "embed":
        sizes = _doubled(limits.embed_tokens("cuda"), signature.max_model_len)
        return StepSizes(decode=(), prefill=sizes)
    tokens = limits.engine_config("cuda").max_num_batched_tokens
    if signature.head == "encode":
        return StepSizes(decode=(), prefill=_doubled(tokens, signature.max_model_len))
    # Only a decoder with wide heads says how many there are.
    least = -(-LEAST_ROW_HEADS // signature.gathered_heads) if signature.gathered_heads else 1
    return StepSizes(
        decode=tuple(sorted({max(width, least) for width in limits.capture_sizes})),
        prefill=(signature.prefill_tokens(tokens),),
        sources=_doubled(tokens, signature.max_source_len) if signature.has_source else (),
        has_flash=has_flash,
    )


def _doubled(tokens: int, longest: int) -> tuple[int, ...]:
    """Return a size and its doubles, up to one that `longest` tokens fit into."""
    larger = takewhile(lambda n: n < 2 * longest, (tokens << i for i in count()))
    return tuple(larger) or (tokens,)


NUM_THREADS = 8


PIECE_BYTES = 16 << 20


def read_ahead(paths: Iterable[Path]) -> None:
    """Read files into the page cache; several links to one file are read once."""
    files = {(info.st_dev, info.st_ino): path for path in paths for info in [path.stat()]}
    pieces = [
        (path, offset)
        for path in files.values()
        for offset in range(0, path.stat().st_size, PIECE_BYTES)
    ]
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="read-ahead") as pool:
        for _ in pool.map(_read, pieces):
            pass


def _read(piece: tuple[Path, int]) -> None:
    path, offset = piece
    file = os.open(path, os.O_RDONLY)
    try:
        os.pread(file, PIECE_BYTES, offset)
    finally:
        os.close(file)
